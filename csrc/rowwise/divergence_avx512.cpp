#define FASTLOSS_ISA avx512
#include "divergence_cpu_kernel.h"

namespace fastloss {
Status divergence_forward_avx512(const DivergenceArgs& a, ParallelFor f) { return avx512::divergence_forward(a, f); }
Status divergence_backward_avx512(const DivergenceArgs& a, ParallelFor f) { return avx512::divergence_backward(a, f); }
}  // namespace fastloss
