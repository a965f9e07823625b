// Chooses the instruction set; the kernels are in pointwise_cpu_kernel.h. Knows the losses by number.
#define FASTLOSS_ISA portable
#include "../common/cpu_isa.h"
#include "../common/full_range.h"
#include "registry.h"

namespace fastloss {

using Kernel = Status(const PointwiseArgs&, ParallelFor);
// Of a group; defined in its files, see groups.cmake.
template <LossGroup kGroup>
Status pointwise_forward_portable(const PointwiseArgs&, ParallelFor);
template <LossGroup kGroup>
Status pointwise_backward_portable(const PointwiseArgs&, ParallelFor);
#if defined(FASTLOSS_HAVE_AVX2)
template <LossGroup kGroup>
Status pointwise_forward_avx2(const PointwiseArgs&, ParallelFor);
template <LossGroup kGroup>
Status pointwise_backward_avx2(const PointwiseArgs&, ParallelFor);
#else
template <LossGroup>
constexpr Kernel* pointwise_forward_avx2 = nullptr;
template <LossGroup>
constexpr Kernel* pointwise_backward_avx2 = nullptr;
#endif
#if defined(FASTLOSS_HAVE_AVX512)
template <LossGroup kGroup>
Status pointwise_forward_avx512(const PointwiseArgs&, ParallelFor);
template <LossGroup kGroup>
Status pointwise_backward_avx512(const PointwiseArgs&, ParallelFor);
#else
template <LossGroup>
constexpr Kernel* pointwise_forward_avx512 = nullptr;
template <LossGroup>
constexpr Kernel* pointwise_backward_avx512 = nullptr;
#endif

namespace {

template <LossGroup kGroup>
Status forward_of(const PointwiseArgs& a, ParallelFor parallel_for) {
  return choose_isa<Kernel>(pointwise_forward_portable<kGroup>, pointwise_forward_avx2<kGroup>,
                            pointwise_forward_avx512<kGroup>)(a, parallel_for);
}
template <LossGroup kGroup>
Status backward_of(const PointwiseArgs& a, ParallelFor parallel_for) {
  return choose_isa<Kernel>(pointwise_backward_portable<kGroup>, pointwise_backward_avx2<kGroup>,
                            pointwise_backward_avx512<kGroup>)(a, parallel_for);
}

// One for each group.
template <int... kGroups>
struct Kernels {
  static constexpr Kernel *forward[] = {forward_of<LossGroup(kGroups)>...},
                          *backward[] = {backward_of<LossGroup(kGroups)>...};
};
template <int... kGroups>
constexpr Kernels<kGroups...> kernels_of(std::integer_sequence<int, kGroups...>) {
  return {};
}
using AllKernels = decltype(kernels_of(std::make_integer_sequence<int, kLossGroups>{}));

}  // namespace

Status pointwise_forward_cpu(const PointwiseArgs& a, ParallelFor parallel_for) {
  return AllKernels::forward[int(a.group)](a, parallel_for);
}
Status pointwise_backward_cpu(const PointwiseArgs& a, ParallelFor parallel_for) {
  return AllKernels::backward[int(a.group)](a, parallel_for);
}

const PointwiseLoss* pointwise_losses() { return portable::registry(); }

}  // namespace fastloss
