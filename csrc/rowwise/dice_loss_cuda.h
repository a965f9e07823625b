// Dice loss on the GPU: the interface to the launchers. Torch-free, no CUDA headers. As in cross_entropy_cuda.h:
// nothing synchronises, bad targets go into the record of errors_cuda.h.
#pragma once
#include "../common/cuda_context.h"
#include "dice_loss.h"

namespace fastloss {

int64_t dice_loss_workspace_bytes_cuda(const DiceLossArgs& a, const CudaContext& context);
Status dice_loss_forward_cuda(const DiceLossArgs& a, const CudaContext& context);
Status dice_loss_backward_cuda(const DiceLossArgs& a, const CudaContext& context);

// Rows that a thread takes at a time, by one access for each class where they are more than one.
int dice_loss_rows_per_thread_cuda(const DiceLossArgs& a);

}  // namespace fastloss
