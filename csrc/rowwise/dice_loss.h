// Dice loss and its family: the contract between the binding (or any other caller) and the kernels. Dice: Milletari et
// al., "V-Net" (2016); Tversky: Salehi et al. (2017); focal Tversky: Abraham & Khan (2019).
//
// The input is seen as x[outer, classes, inner] with any strides; a row (a pixel) is one (outer, inner) position,
// row r = o * inner + i, rows = outer * inner. The rows are split evenly into groups that follow each other: a group
// for each sample, or a single one for the batch. p is the softmax of x over the classes, its sigmoid, or x itself; t
// is 1 for the row's class and 0 for the others, or what a dense target says. Over the rows of a group that count:
//
//   I = sum p t,   P = sum p,   T = sum t                   squared: P = sum p^2, T = sum t^2
//   loss of a group and class    l = 1 - (2 I + smooth_nr) / (P + T + smooth_dr)
//                     tversky    l = (1 - (I + smooth_nr) / (I + alpha (P - I) + beta (T - I) + smooth_dr))^gamma
//   result                       w_c l for each, or their sum, or their sum divided by their number
//
// A row whose target is ignore_index is in none of the sums. A group all of whose rows are such has loss 0 and is left
// out of the mean. Classes below first_class have no loss; they are part of the softmax nevertheless.
//
// With lambda_ce the cross entropy of the rows that count is added, from the same softmax (of index targets; reduction
// sum or mean): lambda_dice * result + lambda_ce * C, C the sum of
//
//   (1 - smoothing) w_t (-log p_t) + smoothing / classes * sum_c w_c (-log p_c)
//
// over the rows, for the mean divided by D, the sum of w_t. It takes no further read of the input.
//
// Fewest bytes: forward 1 read of the input; backward 1 read + 1 write (dense targets: one more read each). No one-hot
// tensor, no probabilities in memory. Everything else is O(rows) or O(groups * classes).
#pragma once
#include "../common/types.h"

namespace fastloss {

enum class Activation : int32_t { none = 0, softmax = 1, sigmoid = 2 };

struct DiceLossArgs {
  // ---- problem
  int64_t outer = 0, classes = 0, inner = 1;
  int64_t groups = 1;           // samples, or 1 for the whole batch; divides rows()
  const void* input = nullptr;  // [outer, classes, inner]
  DType input_type = DType::f32;
  Strides input_strides;

  bool dense = false;            // the target has an element for each class
  const void* target = nullptr;  // dense ? [outer, classes, inner] of target_type : [rows] contiguous of index_type
  IndexType index_type = IndexType::i64;
  DType target_type = DType::f32;
  Strides target_strides;  // dense only

  const void* weight = nullptr;  // [classes] contiguous, accum_of(input_type); null: all ones
  Activation activation = Activation::softmax;
  bool squared = false;  // not for tversky
  bool tversky = false;  // else dice
  double alpha = 0.5, beta = 0.5, gamma = 1;
  bool skip_absent = false;  // groups and classes with T = 0 have loss 0
  int64_t first_class = 0;
  double smooth_nr = 0, smooth_dr = 0;
  int64_t ignore_index = -100;  // index targets only
  Reduction reduction = Reduction::mean;
  double lambda_dice = 1, lambda_ce = 0, smoothing = 0;

  // ---- results of forward; null: not wanted
  void* loss = nullptr;  // [] or, for reduction none, [groups, classes - first_class]; loss_type
  DType loss_type = DType::f32;
  // What backward needs: dl/dI, dl/dP, dl/dT of each [groups, classes], then the divisors of the mean: the number of
  // losses l that count, and D.
  double* saved = nullptr;  // [3 groups classes + 2]

  // ---- backward only (saved is then an input, loss is not touched)
  const void* grad_output = nullptr;  // like the loss; loss_type
  void* grad = nullptr;               // dL/dx, input_type; null: grad_target instead
  Strides grad_strides;
  void* grad_target = nullptr;  // dense: dL/dt, target_type
  Strides grad_target_strides;

  int64_t rows() const { return outer * inner; }
  int64_t rows_per_group() const { return groups > 0 ? rows() / groups : 0; }
  int64_t saved_count() const { return 3 * groups * classes + 2; }
  // Whether a caller asks for something that is not there.
  bool consistent() const {
    return lambda_ce == 0 || (!dense && activation == Activation::softmax && reduction != Reduction::none && !tversky);
  }
};

FASTLOSS_HD bool with_cross_entropy(const DiceLossArgs& a) { return a.lambda_ce != 0; }

// CPU. A bad index target is found before anything is written.
Status dice_loss_forward_cpu(const DiceLossArgs& a, ParallelFor parallel_for);
// Writes grad or grad_target from saved, recomputing p.
Status dice_loss_backward_cpu(const DiceLossArgs& a, ParallelFor parallel_for);

}  // namespace fastloss
