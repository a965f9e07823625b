// Cross entropy: the contract between the binding (or any other caller) and the kernels.
//
// Logits are seen as x[outer, classes, inner] with any strides; a row is one (outer, inner) position,
// row r = o * inner + i, rows = outer * inner. With z = transform(x) (see cross_entropy_math.h),
// lse = log sum_c exp z_c, class weights w, smoothing e, sample weights s:
//
//   index target t:        nll  = (1-e) w_t (lse - z_t) + e/C sum_c w_c (lse - z_c)
//   probability target p:  nll  = sum_c w_c p'_c (lse - z_c),  p' = (1-e) p + e/C
//   row loss               l    = s (nll + z_loss lse^2)
//   sum                    L    = sum_r l_r
//   mean                   L    = sum_r s_r nll_r / D + z_loss sum_r s_r lse_r^2 / Dn
//                          D    = sum_r s_r w_{t_r} (index) or sum_r s_r (probability), Dn = sum_r s_r,
//                                 both over the rows that count (target != ignore_index)
//
// Fewest bytes: forward alone 1 read of the logits; value and gradient 1 read + 1 write; backward alone
// 1 read + 1 write (soft targets: one more read each). Everything else is O(rows) or O(classes).
#pragma once
#include "../common/types.h"

namespace fastloss {

struct CrossEntropyArgs {
  // ---- problem
  int64_t outer = 0, classes = 0, inner = 1;
  const void* logits = nullptr;  // [outer, classes, inner]
  DType logits_type = DType::f32;
  Strides logits_strides;

  bool soft = false;             // probability target
  const void* target = nullptr;  // soft ? [outer, classes, inner] of prob_type : [rows] contiguous of index_type
  IndexType index_type = IndexType::i64;
  DType prob_type = DType::f32;
  Strides target_strides;  // soft only

  const void* weight = nullptr;         // [classes] contiguous, accum_of(logits_type); null: all ones
  const void* sample_weight = nullptr;  // [rows] contiguous, accum_of(logits_type); null: all ones

  int64_t ignore_index = -100;  // index targets only
  double label_smoothing = 0, z_loss = 0;
  double softcap = 0;  // 0: none
  double logit_scale = 1;
  Reduction reduction = Reduction::mean;
  bool all_ignored_zero = false;  // mean over no counted row is 0 instead of nan
  bool zero_times_inf = false;    // 0 * (-inf) counts as 0 for smoothed and probability targets

  // ---- results of forward; null: not wanted
  void* loss = nullptr;  // [] or, for reduction none, [rows]; loss_type
  DType loss_type = DType::f32;
  void* saved = nullptr;      // accum_of(logits_type), [saved_count()]: what backward needs to recompute the softmax:
                              //   ref[rows], others[rows] (see RowStats), soft: mass[rows]; then D, Dn. (A rounded lse
                              //   alone would cost half the digits at logits of 1e4.)
  void* lse = nullptr;        // [rows] accum_of(logits_type)
  void* grad = nullptr;       // dL/dx for grad_output 1 (scalar reductions only); logits_type. May be the
  Strides grad_strides;       //   logits themselves (then grad_strides == logits_strides).
  int64_t* argmax = nullptr;  // [rows], first maximum, or first nan as torch.argmax
  float* accuracy = nullptr;  // []: share of counted rows with argmax == target (soft: == argmax of target)

  // ---- backward only (saved is then an input, the results above are not touched)
  const void* grad_output = nullptr;  // [] or [rows]; loss_type
  bool grad_output_per_row = false;
  void* grad_target = nullptr;  // soft: dL/dp, prob_type
  Strides grad_target_strides;

  int64_t rows() const { return outer * inner; }
  int64_t saved_count() const { return (soft ? 3 : 2) * rows() + 2; }
};

// CPU. Validates every index target before anything is written.
Status cross_entropy_forward_cpu(const CrossEntropyArgs& a, ParallelFor parallel_for);
// Writes grad (if not null) and grad_target (if not null) from saved, recomputing the softmax.
Status cross_entropy_backward_cpu(const CrossEntropyArgs& a, ParallelFor parallel_for);

}  // namespace fastloss
