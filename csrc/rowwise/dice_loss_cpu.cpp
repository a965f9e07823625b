// Chooses the instruction set; the kernels are in dice_loss_cpu_kernel.h.
#include "../common/cpu_isa.h"
#include "dice_loss.h"

namespace fastloss {

using Kernel = Status(const DiceLossArgs&, ParallelFor);
Kernel dice_loss_forward_portable, dice_loss_backward_portable;
#if defined(FASTLOSS_HAVE_AVX2)
Kernel dice_loss_forward_avx2, dice_loss_backward_avx2;
#else
constexpr Kernel *dice_loss_forward_avx2 = nullptr, *dice_loss_backward_avx2 = nullptr;
#endif
#if defined(FASTLOSS_HAVE_AVX512)
Kernel dice_loss_forward_avx512, dice_loss_backward_avx512;
#else
constexpr Kernel *dice_loss_forward_avx512 = nullptr, *dice_loss_backward_avx512 = nullptr;
#endif

namespace {
// Class indices travel in lanes of the accumulation type's size.
bool lanes_hold_classes(const DiceLossArgs& a) {
  return a.dense || accum_of(a.input_type) == DType::f64 || a.classes <= INT32_MAX;
}
}  // namespace

Status dice_loss_forward_cpu(const DiceLossArgs& a, ParallelFor parallel_for) {
  if (!lanes_hold_classes(a) || !a.consistent()) return {Status::unsupported};
  return choose_isa<Kernel>(dice_loss_forward_portable, dice_loss_forward_avx2, dice_loss_forward_avx512)(a,
                                                                                                          parallel_for);
}
Status dice_loss_backward_cpu(const DiceLossArgs& a, ParallelFor parallel_for) {
  if (!lanes_hold_classes(a) || !a.consistent()) return {Status::unsupported};
  return choose_isa<Kernel>(dice_loss_backward_portable, dice_loss_backward_avx2, dice_loss_backward_avx512)(
      a, parallel_for);
}

}  // namespace fastloss
