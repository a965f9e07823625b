// Chooses the instruction set; the kernels are in divergence_cpu_kernel.h.
#include "../common/cpu_isa.h"
#include "divergence.h"

namespace fastloss {

using Kernel = Status(const DivergenceArgs&, ParallelFor);
Kernel divergence_forward_portable, divergence_backward_portable;
#if defined(FASTLOSS_HAVE_AVX2)
Kernel divergence_forward_avx2, divergence_backward_avx2;
#else
constexpr Kernel *divergence_forward_avx2 = nullptr, *divergence_backward_avx2 = nullptr;
#endif
#if defined(FASTLOSS_HAVE_AVX512)
Kernel divergence_forward_avx512, divergence_backward_avx512;
#else
constexpr Kernel *divergence_forward_avx512 = nullptr, *divergence_backward_avx512 = nullptr;
#endif

Status divergence_forward_cpu(const DivergenceArgs& a, ParallelFor parallel_for) {
  return choose_isa<Kernel>(divergence_forward_portable, divergence_forward_avx2, divergence_forward_avx512)(
      a, parallel_for);
}
Status divergence_backward_cpu(const DivergenceArgs& a, ParallelFor parallel_for) {
  return choose_isa<Kernel>(divergence_backward_portable, divergence_backward_avx2, divergence_backward_avx512)(
      a, parallel_for);
}

}  // namespace fastloss
