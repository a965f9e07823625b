// Gradient of log-probabilities and entropies on the GPU: the interface to the launcher. Torch-free, no CUDA headers.
// Nothing synchronises and no workspace is needed. Rows with a bad index, which forward has reported, have gradient 0.
#pragma once
#include "../common/cuda_context.h"
#include "token_log_probs.h"

namespace fastloss {

Status token_log_probs_backward_cuda(const TokenLogProbsArgs& a, const CudaContext& context);

}  // namespace fastloss
