// Cross entropy on the GPU: the interface to the launchers. Torch-free, no CUDA headers.
#pragma once
#include "../common/cuda_context.h"
#include "cross_entropy.h"

namespace fastloss {

// Scratch that a call needs on the device, 16-byte aligned; need not be initialised, may be reused by the next call on
// the same stream.
int64_t cross_entropy_workspace_bytes_cuda(const CrossEntropyArgs& a, const CudaContext& context);

// Launch and return; nothing synchronises, everything can be captured into a CUDA graph. Bad targets go into the
// record of errors_cuda.h: nan loss and zero gradient for the row.
Status cross_entropy_forward_cuda(const CrossEntropyArgs& a, const CudaContext& context);
Status cross_entropy_backward_cuda(const CrossEntropyArgs& a, const CudaContext& context);

// Which kernel and launch a call takes, in words; for explain(). The result is static.
const char* cross_entropy_regime_cuda(const CrossEntropyArgs& a, const CudaContext& context, bool backward);

}  // namespace fastloss
