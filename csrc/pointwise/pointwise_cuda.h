// The pointwise losses on the GPU: the interface to the launchers. Torch-free, no CUDA headers. Launch and return;
// nothing synchronises, everything can be captured into a CUDA graph.
#pragma once
#include "../common/cuda_context.h"
#include "pointwise.h"

namespace fastloss {

// Scratch that a call needs on the device, 16-byte aligned; need not be initialised.
int64_t pointwise_workspace_bytes_cuda(const PointwiseArgs& a, const CudaContext& context);
Status pointwise_forward_cuda(const PointwiseArgs& a, const CudaContext& context);
Status pointwise_backward_cuda(const PointwiseArgs& a, const CudaContext& context);
Status pointwise_second_cuda(const PointwiseArgs& a, const CudaContext& context);

}  // namespace fastloss
