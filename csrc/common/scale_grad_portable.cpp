#define FASTLOSS_ISA portable
#include "scale_grad_cpu_kernel.h"

namespace fastloss {
void scale_grad_portable(const void* grad, void* out, DType type, int64_t count, double scale, ParallelFor f) {
  portable::scale_grad(grad, out, type, count, scale, f);
}
}  // namespace fastloss
