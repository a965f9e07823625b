#define FASTLOSS_ISA avx512
#include "dice_loss_cpu_kernel.h"

namespace fastloss {
Status dice_loss_forward_avx512(const DiceLossArgs& a, ParallelFor f) { return avx512::dice_loss_forward(a, f); }
Status dice_loss_backward_avx512(const DiceLossArgs& a, ParallelFor f) { return avx512::dice_loss_backward(a, f); }
}  // namespace fastloss
