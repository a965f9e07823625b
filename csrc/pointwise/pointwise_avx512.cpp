#define FASTLOSS_ISA avx512
#include "pointwise_cpu_kernel.h"

namespace fastloss {
Status pointwise_forward_avx512(const PointwiseArgs& a, ParallelFor f) { return avx512::pointwise_forward(a, f); }
Status pointwise_backward_avx512(const PointwiseArgs& a, ParallelFor f) { return avx512::pointwise_backward(a, f); }
}  // namespace fastloss
