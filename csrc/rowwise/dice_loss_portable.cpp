#define FASTLOSS_ISA portable
#include "dice_loss_cpu_kernel.h"

namespace fastloss {
Status dice_loss_forward_portable(const DiceLossArgs& a, ParallelFor f) { return portable::dice_loss_forward(a, f); }
Status dice_loss_backward_portable(const DiceLossArgs& a, ParallelFor f) { return portable::dice_loss_backward(a, f); }
}  // namespace fastloss
