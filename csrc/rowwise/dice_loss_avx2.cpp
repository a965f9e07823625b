#define FASTLOSS_ISA avx2
#include "dice_loss_cpu_kernel.h"

namespace fastloss {
Status dice_loss_forward_avx2(const DiceLossArgs& a, ParallelFor f) { return avx2::dice_loss_forward(a, f); }
Status dice_loss_backward_avx2(const DiceLossArgs& a, ParallelFor f) { return avx2::dice_loss_backward(a, f); }
}  // namespace fastloss
