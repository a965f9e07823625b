// Where a launch goes. Torch-free, no CUDA headers.
#pragma once
#include "types.h"

namespace fastloss {

struct CudaContext {
  void* stream = nullptr;  // cudaStream_t
  int device = 0;          // current for the calling thread
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

}  // namespace fastloss
