#define FASTLOSS_ISA portable
#include "cross_entropy_cpu_kernel.h"

namespace fastloss {
Status cross_entropy_forward_portable(const CrossEntropyArgs& a, ParallelFor f) {
  return portable::cross_entropy_forward(a, f);
}
Status cross_entropy_backward_portable(const CrossEntropyArgs& a, ParallelFor f) {
  return portable::cross_entropy_backward(a, f);
}
}  // namespace fastloss
