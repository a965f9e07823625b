#define FASTLOSS_ISA avx2
#include "pointwise_cpu_kernel.h"

namespace fastloss {
Status pointwise_forward_avx2(const PointwiseArgs& a, ParallelFor f) { return avx2::pointwise_forward(a, f); }
Status pointwise_backward_avx2(const PointwiseArgs& a, ParallelFor f) { return avx2::pointwise_backward(a, f); }
}  // namespace fastloss
