#define FASTLOSS_ISA avx2
#include "scale_grad_cpu_kernel.h"

namespace fastloss {
void scale_grad_avx2(const void* grad, void* out, DType type, int64_t count, double scale, ParallelFor f) {
  avx2::scale_grad(grad, out, type, count, scale, f);
}
}  // namespace fastloss
