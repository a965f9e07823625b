// Divergences of two softmaxes on the GPU: the interface to the launchers. Torch-free, no CUDA headers. Nothing
// synchronises.
#pragma once
#include "../common/cuda_context.h"
#include "divergence.h"

namespace fastloss {

int64_t divergence_workspace_bytes_cuda(const DivergenceArgs& a, const CudaContext& context);
Status divergence_forward_cuda(const DivergenceArgs& a, const CudaContext& context);
Status divergence_backward_cuda(const DivergenceArgs& a, const CudaContext& context);
const char* divergence_regime_cuda(const DivergenceArgs& a);  // in words

}  // namespace fastloss
