#define FASTLOSS_ISA avx2
#include "cross_entropy_cpu_kernel.h"

namespace fastloss {
Status cross_entropy_forward_avx2(const CrossEntropyArgs& a, ParallelFor f) {
  return avx2::cross_entropy_forward(a, f);
}
Status cross_entropy_backward_avx2(const CrossEntropyArgs& a, ParallelFor f) {
  return avx2::cross_entropy_backward(a, f);
}
}  // namespace fastloss
