// Negative log likelihood of given log-probabilities: loss_r = -w_t x[o, t, i]; reductions as in cross_entropy.h.
// Reads one element per row; backward writes each gradient element once.
#pragma once
#include "../common/types.h"

namespace fastloss {

struct NllLossArgs {
  int64_t outer = 0, classes = 0, inner = 1;
  const void* input = nullptr;  // [outer, classes, inner]
  DType input_type = DType::f32;
  Strides input_strides;
  const void* target = nullptr;  // [rows] contiguous
  IndexType index_type = IndexType::i64;
  const void* weight = nullptr;  // [classes] contiguous, accum_of(input_type)
  int64_t ignore_index = -100;
  Reduction reduction = Reduction::mean;

  DType loss_type = DType::f32;  // of loss and grad_output
  void* loss = nullptr;          // [] or [rows]
  void* total_weight = nullptr;  // [1] accum_of(input_type): D; written by forward, read by backward

  const void* grad_output = nullptr;  // [] or [rows]
  bool grad_output_per_row = false;
  void* grad = nullptr;  // [outer, classes, inner], input_type; every element is written
  Strides grad_strides;

  int64_t rows() const { return outer * inner; }
};

Status nll_loss_forward_cpu(const NllLossArgs& a, ParallelFor parallel_for);
Status nll_loss_backward_cpu(const NllLossArgs& a, ParallelFor parallel_for);

}  // namespace fastloss
