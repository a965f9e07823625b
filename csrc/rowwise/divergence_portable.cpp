#define FASTLOSS_ISA portable
#include "divergence_cpu_kernel.h"

namespace fastloss {
Status divergence_forward_portable(const DivergenceArgs& a, ParallelFor f) {
  return portable::divergence_forward(a, f);
}
Status divergence_backward_portable(const DivergenceArgs& a, ParallelFor f) {
  return portable::divergence_backward(a, f);
}
}  // namespace fastloss
