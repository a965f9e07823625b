// The pointwise losses: the contract between the binding (or any other caller) and the kernels.
//
// Elements are numbered by an index space sizes[0] x ... x sizes[dim - 1], row-major; every operand has its own strides
// there (0 where it is broadcast), so no operand is ever copied into another layout. With f of losses.h, multipliers
// w_i (weight) and a mask, over the elements whose mask is true:
//
//   none   L_i = w_i f(x_i, t_i)                                   (0 where the mask is false)
//   sum    L   = sum_i w_i f_i
//   mean   L   = sum_i w_i f_i / D,   D = the count of elements, or c sum_i w_i
//
// A loss with a root gives sqrt(mean + p). Reductions are over `cols`, the trailing axes of the index space: one result
// for each of `rows`. Derivatives are those of L through dL/dx_i = factor w_i f_x(x_i, t_i); factor[rows] is 1 (sum,
// none), 1/D (mean) or 1/(2 D L) (root; 0 where the residual is zero).
//
// Fewest bytes: value alone 2 reads; value and gradient 2 reads + 1 write (2 writes with the target's); gradient alone
// 2 reads + 1 write.
#pragma once
#include <math.h>

#include "../common/types.h"

namespace fastloss {

constexpr int kPointwiseDims = 24;  // after coalescing

struct PointwiseOperand {
  void* data = nullptr;  // null: absent
  DType type = DType::f32;
  int64_t strides[kPointwiseDims] = {};  // in elements
};

struct PointwiseArgs {
  // ---- problem
  int loss = 0;      // number in losses.h
  double param = 0;  // p
  int dim = 0;       // axes of the index space
  int row_dims = 0;  // leading ones that are rows
  int64_t rows = 1, cols = 0;
  int64_t sizes[kPointwiseDims] = {};
  PointwiseOperand input, target;
  PointwiseOperand weight;   // w
  PointwiseOperand mask;     // bytes, 0 or 1 (type is not looked at)
  DType accum = DType::f32;  // f64 when an operand is
  Reduction reduction = Reduction::mean;
  double weight_denominator = 0;  // mean: c above; 0: D counts elements

  // ---- forward; null: not wanted
  void* loss_out = nullptr;  // [rows] of loss_type; reduction none: see loss_elements
  DType loss_type = DType::f32;
  PointwiseOperand loss_elements;  // reduction none
  double* factor = nullptr;        // [rows]
  // Gradients for grad_output 1; in forward without the factor, where that is known at the end only (factor_is_known).
  PointwiseOperand grad_input, grad_target;

  // ---- backward and second order: factor is then an input
  const void* grad_output = nullptr;  // [rows] of grad_output_type; null: ones
  DType grad_output_type = DType::f32;
  PointwiseOperand grad_output_elements;  // reduction none

  // ---- second order: with v = (tangent_input, tangent_target), either may be absent,
  //   loss_out, loss_elements   the directional derivative of the loss (grad_output left out)
  //   grad_input, grad_target   grad_output times the directional derivative of the gradient; not of a loss with a root
  PointwiseOperand tangent_input, tangent_target;

  constexpr int64_t count() const { return rows * cols; }
  // Is D known without having read anything?
  constexpr bool counts_all() const { return !mask.data && (!weight.data || weight_denominator == 0); }
};

FASTLOSS_HD bool factor_is_known(const PointwiseArgs& a, bool root) {
  return !root && (a.reduction != Reduction::mean || a.counts_all());
}

// The result of a row and its factor, from its sums: sum_i w_i f_i, and the count of elements that the mask lets pass
// (their weights, if weight_denominator says so).
struct RowResult {
  double value, factor;
};
FASTLOSS_HD RowResult row_result(const PointwiseArgs& a, bool root, double sum, double denominator) {
  RowResult r{sum, 1};
  if (a.reduction == Reduction::mean) {
    double d = a.counts_all() ? double(a.cols) : denominator;
    if (a.weight_denominator != 0) d *= a.weight_denominator;
    r.value = sum / d;
    r.factor = a.mask.data && d == 0 ? 0 : 1 / d;  // all masked: the loss is nan, the gradient 0
  }
  if (root) {
    r.value = sqrt(r.value + a.param);
    r.factor = r.value == 0 || r.factor == 0 ? 0 : r.factor * 0.5 / r.value;
  }
  return r;
}
// factor grad_output as a float, kept finite where it can be, so that residuals of 0 keep a gradient of 0.
FASTLOSS_HD double finite_scale(double s) { return s - s != 0 ? s : s > 3.4e38 ? 3.4e38 : s < -3.4e38 ? -3.4e38 : s; }

// The names of the losses, in the order of their numbers; ends with null.
const char* const* pointwise_names();
bool pointwise_has_root(int loss);
Status pointwise_forward_cpu(const PointwiseArgs& a, ParallelFor parallel_for);
Status pointwise_backward_cpu(const PointwiseArgs& a, ParallelFor parallel_for);
Status pointwise_second_cpu(const PointwiseArgs& a, ParallelFor parallel_for);

}  // namespace fastloss
