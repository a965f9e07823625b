// Row losses on the GPU: the interface to the launchers. Torch-free, no CUDA headers. As in cross_entropy_cuda.h:
// nothing synchronises, bad targets go into the record of errors_cuda.h.
#pragma once
#include "../common/cuda_context.h"
#include "row_loss.h"

namespace fastloss {

int64_t row_loss_workspace_bytes_cuda(const RowLossArgs& a, const CudaContext& context);
Status row_loss_forward_cuda(const RowLossArgs& a, const CudaContext& context);
Status row_loss_backward_cuda(const RowLossArgs& a, const CudaContext& context);

}  // namespace fastloss
