// The pointwise losses on the GPU: the interface to the launchers. Torch-free, no CUDA headers. Launch and return;
// nothing synchronises, everything can be captured into a CUDA graph.
#pragma once
#include "../common/cuda_context.h"
#include "pointwise_policy.h"

namespace fastloss {

// Runs the pass that `config` was made for, from these arguments; the context has config.workspace_bytes of scratch.
Status pointwise_cuda(const PointwiseArgs& a, const PointwiseConfig& config, const CudaContext& context);

}  // namespace fastloss
