// Log-probabilities of tokens and entropies of rows: the gradient by the logits. The values are those of cross entropy
// (minus the loss of reduction `none`, and its entropies), which leaves here what its backward would take.
//
// Logits are seen as x[outer, classes, inner], rows as in cross_entropy.h. With z = transform(x), p = softmax(z),
// H = -sum_c p_c log p_c, index t, and the incoming gradients u of log p_t and v of H:
//
//   dL/dz_c = u ([c = t] - p_c) - v p_c (log p_c + H)
//
// A row whose index is ignore_index has u = 0: its log-probability is 0, whatever its logits. A row with u = v = 0 has
// gradient 0, and its logits are not read.
//
// Fewest bytes: 1 read and 1 write of the logits. Everything else is O(rows).
#pragma once
#include "../common/types.h"

namespace fastloss {

struct TokenLogProbsArgs {
  // ---- problem
  int64_t outer = 0, classes = 0, inner = 1;
  const void* logits = nullptr;  // [outer, classes, inner]
  DType logits_type = DType::f32;
  Strides logits_strides;
  const void* index = nullptr;  // [rows] contiguous of index_type
  IndexType index_type = IndexType::i64;
  int64_t ignore_index = -100;
  double softcap = 0;  // 0: none
  double logit_scale = 1;

  // ---- what cross_entropy_forward has left, accum_of(logits_type)
  const void* saved = nullptr;    // [2, rows]: ref and others, see SavedFields
  const void* entropy = nullptr;  // [rows]; null without grad_entropy

  // ---- incoming gradients, [rows] accum_of(logits_type); null: 0
  const void* grad_log_prob = nullptr;
  const void* grad_entropy = nullptr;

  // ---- result
  void* grad = nullptr;  // logits_type; not the logits themselves
  Strides grad_strides;
};

// What the gradient of a row is made of. With d_c = z_c - ref and e_c = exp(d_c):
//   dL/dz_c = e_c (constant + by_distance d_c) for c != index, at_index for c = index
// Where e_c is 0, d_c may be infinite, and it is constant - constant: 0, or nan in a row that has no softmax.
template <class T>
struct TokenRow {
  T ref, constant, by_distance, at_index;
  int64_t index;  // -1: none
};

// From the row's statistics; u and v as above. others / sum is 1 - p_t with all its digits, see cross_entropy_math.h.
template <class T>
FASTLOSS_HD TokenRow<T> token_row(int64_t index, T ref, T others, T d_t, T e_t, T log_sum, T entropy, T u, T v) {
  const T per_sum = T(1) / (others + e_t), shift = entropy - log_sum;
  const T spread = e_t == T(0) ? T(0) : e_t * (v * (d_t + shift));
  return {ref, -(u + v * shift) * per_sum, -v * per_sum, (u * others - spread) * per_sum, index};
}

// CPU. Indices have been checked by forward.
Status token_log_probs_backward_cpu(const TokenLogProbsArgs& a, ParallelFor parallel_for);

}  // namespace fastloss
