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
//   margins                z_t  = transform(cos(t + margin_angle) - margin_cosine), x_t = cos t the target's own logit
//                          (see Margin), z of the other classes as it is
//   mean                   L    = sum_r s_r nll_r / D + z_loss sum_r s_r lse_r^2 / Dn
//                          D    = sum_r s_r w_{t_r} (index) or sum_r s_r (probability), Dn = sum_r s_r,
//                                 both over the rows that count (target != ignore_index)
//
// Fewest bytes: forward alone 1 read of the logits; value and gradient 1 read + 1 write; backward alone
// 1 read + 1 write (soft targets: one more read each). Everything else is O(rows) or O(classes).
#pragma once
#include "../common/types.h"

namespace fastloss {

// Statistics of a row over some of its classes, see RowStats:
//   ref      the largest z, -inf where there is none
//   others   sum of exp(z - ref) over the classes but the target
//   target   z of the target, -inf where it is elsewhere
//   dot      sum of q (z - ref), mass: sum of q; with smoothing or probabilities
//   best     the largest z, or nan if there is one; best_at: its class, class_offset included; exp_dot: sum of
//            exp(z - ref) (z - ref) over the classes but the target. Where wanted.
// Sums of a row whose ref is -inf are relative to 0.
enum class Stat : int { ref, others, target, dot, mass, best, best_at, exp_dot, count };

// Fields of `saved` by number, -1: not there. ref, others: see RowStats; the target's z (shards); mass (soft); slope
// and level of a row map (level: soft).
struct SavedFields {
  int target = -1, mass = -1, slope = -1, level = -1, count = 2;
};

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

  const void* weight = nullptr;         // [all_classes()] contiguous, accum_of(logits_type); null: all ones
  const void* sample_weight = nullptr;  // [rows] contiguous, accum_of(logits_type); null: all ones

  int64_t ignore_index = -100;  // index targets only
  double label_smoothing = 0, z_loss = 0;
  double softcap = 0;  // 0: none
  double logit_scale = 1;
  int32_t row_map = 0;  // number in row_maps.h, 0: none
  double map_params[2] = {};
  double margin_angle = 0, margin_cosine = 0;   // of an index target, see has_margin
  int64_t class_offset = 0, total_classes = 0;  // shards; total_classes 0: not a shard
  Reduction reduction = Reduction::mean;
  const double* normalizer = nullptr;  // [], on the device of the logits: replaces D and Dn
  bool all_ignored_zero = false;       // mean over no counted row is 0 instead of nan
  bool zero_times_inf = false;         // 0 * (-inf) counts as 0 for smoothed and probability targets

  // ---- results of forward; null: not wanted
  void* loss = nullptr;  // [] or, for reduction none, [rows]; loss_type
  DType loss_type = DType::f32;
  // What backward needs to recompute the softmax, accum_of(logits_type), [saved_count()]: fields of [rows] in the order
  // of SavedFields, then D, Dn. (A rounded lse alone would cost half the digits at logits of 1e4.)
  void* saved = nullptr;
  void* lse = nullptr;        // [rows] accum_of(logits_type)
  void* grad = nullptr;       // dL/dx for grad_output 1 (scalar reductions only); logits_type. May be the
  Strides grad_strides;       //   logits themselves (then grad_strides == logits_strides).
  int64_t* argmax = nullptr;  // [rows], first maximum, or first nan as torch.argmax
  float* accuracy = nullptr;  // []: share of counted rows with argmax == target (soft: == argmax of target)
  void* entropy = nullptr;    // [rows] accum_of(logits_type): -sum_c softmax_c log softmax_c
  // Instead of all these: the statistics of a shard, accum_of(logits_type), [stats_count(), rows], in the order of
  // Stat.
  void* stats = nullptr;
  bool stats_best = false;  // with best, best_at and exp_dot

  // ---- backward only (saved is then an input, the results above are not touched)
  const void* grad_output = nullptr;  // [] or [rows]; loss_type
  bool grad_output_per_row = false;
  void* grad_target = nullptr;  // soft: dL/dp, prob_type
  Strides grad_target_strides;

  // Always inline: a copy that was compiled for AVX-512 could be linked for everybody.
  [[gnu::always_inline]] int64_t rows() const { return outer * inner; }
  [[gnu::always_inline]] bool is_shard() const { return total_classes > 0; }
  [[gnu::always_inline]] bool has_margin() const { return margin_angle != 0 || margin_cosine != 0; }
  // A margin asks for an index target among these classes and a positive scale. It moves the target's z away from its
  // logit, so results that tell of both do not go with it.
  [[gnu::always_inline]] bool margin_is_supported() const {
    const bool of_logits = argmax || accuracy || entropy || stats;
    return !has_margin() || (!soft && !is_shard() && logit_scale > 0 && !of_logits);
  }
  [[gnu::always_inline]] int64_t all_classes() const { return is_shard() ? total_classes : classes; }
  [[gnu::always_inline]] SavedFields saved_fields() const {
    SavedFields f;
    if (is_shard()) f.target = f.count++;
    if (soft) f.mass = f.count++;
    if (row_map != 0) f.slope = f.count++;
    if (soft && row_map != 0) f.level = f.count++;
    return f;
  }
  [[gnu::always_inline]] int64_t saved_count() const { return saved_fields().count * rows() + 2; }
  [[gnu::always_inline]] int stats_count() const { return stat_place(Stat::count); }
  [[gnu::always_inline]] int stat_place(Stat s) const {
    const int dots = soft || label_smoothing > 0 ? 2 : 0;
    if (s >= Stat::best) return int(s) - 2 + dots - (s == Stat::count && !stats_best ? 3 : 0);
    return int(s);
  }
};

// CPU. Validates every index target before anything is written.
Status cross_entropy_forward_cpu(const CrossEntropyArgs& a, ParallelFor parallel_for);
// Writes grad (if not null) and grad_target (if not null) from saved, recomputing the softmax.
Status cross_entropy_backward_cpu(const CrossEntropyArgs& a, ParallelFor parallel_for);

}  // namespace fastloss
