// out[i] = grad[i] * scale, the backward of a loss whose gradient was computed in forward.
// 1 read + 1 write, or nothing at all when scale is exactly 1 and out is grad. All losses share it.
#pragma once
#include "types.h"

namespace fastloss {

// `scale` points to one element of scale_type; grad and out are `count` contiguous elements of `type`.
void scale_grad_cpu(const void* grad, void* out, DType type, int64_t count, const void* scale, DType scale_type,
                    ParallelFor parallel_for);

}  // namespace fastloss
