#define FASTLOSS_ISA avx512
#include "cross_entropy_cpu_kernel.h"

namespace fastloss {
Status cross_entropy_forward_avx512(const CrossEntropyArgs& a, ParallelFor f) {
  return avx512::cross_entropy_forward(a, f);
}
Status cross_entropy_backward_avx512(const CrossEntropyArgs& a, ParallelFor f) {
  return avx512::cross_entropy_backward(a, f);
}
}  // namespace fastloss
