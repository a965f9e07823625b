// Chooses the instruction set; the kernels are in cross_entropy_cpu_kernel.h.
#include "../common/cpu_isa.h"
#include "cross_entropy.h"

namespace fastloss {

using Kernel = Status(const CrossEntropyArgs&, ParallelFor);
Kernel cross_entropy_forward_portable, cross_entropy_backward_portable;
#if defined(FASTLOSS_HAVE_AVX2)
Kernel cross_entropy_forward_avx2, cross_entropy_backward_avx2;
#else
constexpr Kernel *cross_entropy_forward_avx2 = nullptr, *cross_entropy_backward_avx2 = nullptr;
#endif
#if defined(FASTLOSS_HAVE_AVX512)
Kernel cross_entropy_forward_avx512, cross_entropy_backward_avx512;
#else
constexpr Kernel *cross_entropy_forward_avx512 = nullptr, *cross_entropy_backward_avx512 = nullptr;
#endif

namespace {
// Class indices travel in lanes of the accumulation type's size (RowBatch::lane_target in cross_entropy_cpu_batch.h).
bool is_supported(const CrossEntropyArgs& a) {
  return a.margin_is_supported() && (a.soft || accum_of(a.logits_type) == DType::f64 || a.classes <= INT32_MAX);
}
}  // namespace

Status cross_entropy_forward_cpu(const CrossEntropyArgs& a, ParallelFor parallel_for) {
  if (!is_supported(a)) return {Status::unsupported};
  return choose_isa<Kernel>(cross_entropy_forward_portable, cross_entropy_forward_avx2, cross_entropy_forward_avx512)(
      a, parallel_for);
}
Status cross_entropy_backward_cpu(const CrossEntropyArgs& a, ParallelFor parallel_for) {
  if (!is_supported(a)) return {Status::unsupported};
  return choose_isa<Kernel>(cross_entropy_backward_portable, cross_entropy_backward_avx2,
                            cross_entropy_backward_avx512)(a, parallel_for);
}

}  // namespace fastloss
