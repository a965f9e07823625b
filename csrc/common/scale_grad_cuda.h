// scale_grad.h on the GPU. Torch-free, no CUDA headers.
#pragma once
#include "cuda_context.h"

namespace fastloss {

// out[i] = grad[i] * scale for `count` contiguous elements of `type`; `scale` points to one element of scale_type on
// the device. When it is exactly 1 and out is grad, every block returns without touching them.
Status scale_grad_cuda(const void* grad, void* out, DType type, int64_t count, const void* scale, DType scale_type,
                       const CudaContext& context);

}  // namespace fastloss
