// Chooses the instruction set; the kernels are in pointwise_cpu_kernel.h. Knows the losses by number.
#define FASTLOSS_ISA portable
#include "../common/cpu_isa.h"
#include "../common/simd.h"
#include "losses.h"

namespace fastloss {

using Kernel = Status(const PointwiseArgs&, ParallelFor);
Kernel pointwise_forward_portable, pointwise_backward_portable;
#if defined(FASTLOSS_HAVE_AVX2)
Kernel pointwise_forward_avx2, pointwise_backward_avx2;
#else
constexpr Kernel *pointwise_forward_avx2 = nullptr, *pointwise_backward_avx2 = nullptr;
#endif
#if defined(FASTLOSS_HAVE_AVX512)
Kernel pointwise_forward_avx512, pointwise_backward_avx512;
#else
constexpr Kernel *pointwise_forward_avx512 = nullptr, *pointwise_backward_avx512 = nullptr;
#endif

Status pointwise_forward_cpu(const PointwiseArgs& a, ParallelFor parallel_for) {
  return choose_isa<Kernel>(pointwise_forward_portable, pointwise_forward_avx2, pointwise_forward_avx512)(a,
                                                                                                          parallel_for);
}
Status pointwise_backward_cpu(const PointwiseArgs& a, ParallelFor parallel_for) {
  return choose_isa<Kernel>(pointwise_backward_portable, pointwise_backward_avx2, pointwise_backward_avx512)(
      a, parallel_for);
}

const PointwiseLoss* pointwise_losses() { return portable::list_of(portable::Losses{}); }

}  // namespace fastloss
