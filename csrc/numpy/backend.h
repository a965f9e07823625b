// What a module runs: the CPU kernels (module.cpp), or the CUDA kernels on the emulator (module_emulated.cpp).
#pragma once
#include <string>

#include "../pointwise/pointwise.h"
#include "../rowwise/cross_entropy.h"
#include "../rowwise/dice_loss.h"
#include "../rowwise/divergence.h"
#include "../rowwise/row_loss.h"
#include "../rowwise/token_log_probs.h"

namespace fastloss {

Status run_cross_entropy_forward(const CrossEntropyArgs& a);
Status run_cross_entropy_backward(const CrossEntropyArgs& a);
Status run_row_loss_forward(const RowLossArgs& a);
Status run_row_loss_backward(const RowLossArgs& a);
Status run_dice_loss_forward(const DiceLossArgs& a);
Status run_dice_loss_backward(const DiceLossArgs& a);
Status run_divergence_forward(const DivergenceArgs& a);
Status run_divergence_backward(const DivergenceArgs& a);
Status run_token_log_probs_backward(const TokenLogProbsArgs& a);
Status run_pointwise_forward(const PointwiseArgs& a);
Status run_pointwise_backward(const PointwiseArgs& a);
Status run_scale_grad(const void* grad, void* out, DType type, int64_t count, const void* scale, DType scale_type);
std::string failure_message(const Status& status);  // neither ok nor bad_target

}  // namespace fastloss
