// Row losses: losses over a class axis that need no softmax. The contract between the bindings and the kernels.
//
// With f of row_losses.h, a row's elements x_c, its class index t and the weight w_t of that class:
//
//   none   L_r = w_t f(x, t)      (0 where the row does not count)
//   sum    L   = sum_r L_r
//   mean   L   = sum_r L_r / D,   D = sum_r w_t, or the number of rows that count
//
// A loss whose f depends on x_t alone reads one element per row, and backward writes each gradient element once. Others
// read the input once in forward; backward reads it (twice, the second time from a cache) and writes the gradient.
#pragma once
#include "../common/types.h"

namespace fastloss {

constexpr int kRowLossParams = 4;

struct RowLossArgs {
  int kind = 0;  // the loss: its number in row_losses.h
  double params[kRowLossParams] = {};
  int64_t outer = 0, classes = 0, inner = 1;
  const void* input = nullptr;  // [outer, classes, inner]; backward of a linear loss does not look at it
  DType input_type = DType::f32;
  Strides input_strides;
  const void* target = nullptr;  // [rows] contiguous
  IndexType index_type = IndexType::i64;
  const void* weight = nullptr;  // [classes] contiguous, accum_of(input_type); null: ones
  int64_t ignore_index = -100;
  bool ignores = true;  // rows whose target is ignore_index do not count
  Reduction reduction = Reduction::mean;
  bool mean_over_rows = false;  // D is the number of rows

  DType loss_type = DType::f32;  // of loss and grad_output
  void* loss = nullptr;          // [] or [rows]
  void* total_weight = nullptr;  // [1] accum_of(input_type): D; written by forward (null: not wanted), read by backward

  const void* grad_output = nullptr;  // [] or [rows]
  bool grad_output_per_row = false;
  void* grad = nullptr;  // [outer, classes, inner], input_type; every element is written
  Strides grad_strides;

  constexpr int64_t rows() const { return outer * inner; }
  constexpr bool counts(int64_t t) const { return !ignores || t != ignore_index; }
  constexpr bool has_class(int64_t t) const { return t >= 0 && t < classes; }
};

Status row_loss_forward_cpu(const RowLossArgs& a, ParallelFor parallel_for);
Status row_loss_backward_cpu(const RowLossArgs& a, ParallelFor parallel_for);

}  // namespace fastloss
