// The pointwise losses: the contract between the binding (or any other caller) and the kernels.
//
// Elements are numbered by an index space sizes[0] x ... x sizes[dim - 1], row-major; every operand has its own strides
// there (0 where it is broadcast), so no operand is ever copied into another layout. A loss has two to four operands
// x_k and one to four terms f_j (loss.h). With w_i (weight, times what else multiplies it) and a mask, over the
// elements whose mask is true:
//
//   none   L_i = w_i f(x_i)                                        (0 where the mask is false)
//   sum    S_j = sum_i w_i f_j(x_i)
//   mean   S_j = sum_i w_i f_j(x_i) / D,   D = the count of elements, or c sum_i w_i
//
// A loss has one term and is L = S, or it finishes: L = finish(S_1, S_2, ...), as RMSE is a root. Reductions are over
// `cols`, the trailing axes of the index space: one result for each of `rows`. Gradients are
//
//   dL/dx_k,i = grad_output sum_j factor_j w_i df_j/dx_k,   factor_j = dL/dS_j, over D where it is a mean
//
// Where D is 0 the loss is nan. So is the gradient if weights add up to 0; it is 0 if the mask leaves nothing.
//
// Fewest bytes: value alone, a read of each operand; value and gradient, or gradient alone, a write for each gradient
// as well.
#pragma once
#include <math.h>

#include "../common/types.h"

namespace fastloss {

constexpr int kPointwiseDims = 24;  // after coalescing
constexpr int kPointwiseOperands = 4, kPointwiseSums = 4, kPointwiseParams = 4;

// The losses lie in groups, losses/<group>.h; each group is compiled by itself.
enum class LossGroup : int32_t { classification, distributions, multilabel, regression, vectors, count };
constexpr int kLossGroups = int(LossGroup::count);

// What an operand may hold: anything, numbers from 0 to 1 (not nan), anything but negative numbers.
enum class Domain : int32_t { any, unit, not_negative };
// A forward that finds something outside the domain of operand k ends in Status::bad_target with k as the row and the
// bits of the value, a double. In CUDA's record of bad targets the row is the element's, and `what` is this:
constexpr int32_t outside_domain(Domain domain, int k) { return int32_t(domain) * kPointwiseOperands + k; }

// What a loss is, to those who call it by number.
struct PointwiseLoss {
  const char* name;
  LossGroup group;
  int number;     // in its group
  int operands;   // at most; the third and the fourth are 1 where they are absent
  int sums;       // terms
  int params;     // numbers that it takes
  bool finishes;  // has a formula after the sums; then there is no reduction none
  bool streams;   // has streaming CUDA kernels
  bool checks;    // not all operands may hold anything
  Domain domains[kPointwiseOperands];
};
// In the order of the numbers; ends with a name of null.
const PointwiseLoss* pointwise_losses();

struct PointwiseOperand {
  void* data = nullptr;  // null: absent
  DType type = DType::f32;
  int64_t strides[kPointwiseDims] = {};  // in elements
};

struct PointwiseArgs {
  // ---- problem
  LossGroup group = LossGroup::regression;  // of the loss, like what follows: see PointwiseLoss
  int loss = 0;                             // its number in the group
  int sums = 1;
  bool finishes = false, streams = false, checks = false;
  double params[kPointwiseParams] = {};
  int dim = 0;       // axes of the index space
  int row_dims = 0;  // leading ones that are rows; the kernels do not ask
  int64_t rows = 1, cols = 0;
  int64_t sizes[kPointwiseDims] = {};
  PointwiseOperand operands[kPointwiseOperands];  // input, target, ...
  PointwiseOperand weight;                        // w
  // What else multiplies w: a second weight, which broadcasts otherwise; in backward of reduction none the grad_output.
  PointwiseOperand multiplier;
  PointwiseOperand mask;     // bytes, 0 or 1 (type is not looked at)
  DType accum = DType::f32;  // f64 when an operand is
  Reduction reduction = Reduction::mean;
  double weight_denominator = 0;  // mean: c above; 0: D counts elements

  // ---- forward; null: not wanted
  void* loss_out = nullptr;  // [rows] of loss_type; reduction none: see loss_elements
  DType loss_type = DType::f32;
  PointwiseOperand loss_elements;  // reduction none
  double* factor = nullptr;        // [rows, sums]
  // Gradients for grad_output 1; in forward of losses with one sum only, and without the factor where that is known at
  // the end (factor_is_known).
  PointwiseOperand grads[kPointwiseOperands];

  // ---- backward: factor is then an input
  const void* grad_output = nullptr;  // [rows] of grad_output_type; null: ones. Reduction none: see multiplier
  DType grad_output_type = DType::f32;

  constexpr int64_t count() const { return rows * cols; }
  void set_loss(const PointwiseLoss& what) {
    group = what.group;
    loss = what.number;
    sums = what.sums;
    finishes = what.finishes;
    streams = what.streams;
    checks = what.checks;
  }
  // Is D known without having read anything?
  constexpr bool counts_all() const {
    return !mask.data && (weight_denominator == 0 || !(weight.data || multiplier.data));
  }
  constexpr bool wants_grads() const { return grads[0].data || grads[1].data || grads[2].data || grads[3].data; }
};

FASTLOSS_HD bool factor_is_known(const PointwiseArgs& a) {
  return !a.finishes && (a.reduction != Reduction::mean || a.counts_all());
}
// May weights that add up to 0 be found when gradients have been written already, without the factor?
FASTLOSS_HD bool may_divide_by_zero(const PointwiseArgs& a) {
  return a.reduction == Reduction::mean && !a.counts_all() && !a.mask.data;
}
// factor grad_output as a float, kept finite where it can be, so that residuals of 0 keep a gradient of 0.
FASTLOSS_HD double finite_scale(double s) { return s - s != 0 ? s : s > 3.4e38 ? 3.4e38 : s < -3.4e38 ? -3.4e38 : s; }

// Is the operand laid out as the index space is numbered, element i at i?
inline bool is_flat(const PointwiseArgs& a, const PointwiseOperand& o) {
  int64_t expected = 1;
  for (int k = a.dim - 1; k >= 0; --k) {
    if (o.strides[k] != expected && a.sizes[k] != 1) return false;
    expected *= a.sizes[k];
  }
  return true;
}

Status pointwise_forward_cpu(const PointwiseArgs& a, ParallelFor parallel_for);
Status pointwise_backward_cpu(const PointwiseArgs& a, ParallelFor parallel_for);

}  // namespace fastloss
