#define FASTLOSS_ISA avx2
#include "divergence_cpu_kernel.h"

namespace fastloss {
Status divergence_forward_avx2(const DivergenceArgs& a, ParallelFor f) { return avx2::divergence_forward(a, f); }
Status divergence_backward_avx2(const DivergenceArgs& a, ParallelFor f) { return avx2::divergence_backward(a, f); }
}  // namespace fastloss
