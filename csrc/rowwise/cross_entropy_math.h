// The mathematics of one row of cross entropy, written once for the CPU and the CUDA kernels.
// Notation as in cross_entropy.h. V is a scalar (float, double) or a vector of rows with the same operators.
#pragma once
#include "../common/types.h"

namespace fastloss {

// Constants of a call, in the accumulation type.
template <class T>
struct RowConstants {
  T smoothing;       // e
  T smooth_share;    // e / C
  T weight_sum;      // W = sum_c w_c (C without class weights); only used when e > 0
  T z_loss;
  T logit_scale;
  T softcap;         // 0: none
  T inv_softcap;
};

// The statistics of a row, all relative to a reference point `ref` (its running maximum, or 0 while every
// logit seen is -inf) so that nothing cancels at logits of +-1e4.
template <class V>
struct RowStats {
  V max;        // largest z; -inf for an empty or fully masked row
  V sum_exp;    // sum_c exp(z_c - ref)
  V dot;        // sum_c q_c (z_c - ref), q_c = w_c (smoothing) or w_c p'_c (probability target)
  V mass;       // sum_c q_c so far (probability target; for smoothing it is weight_sum)
};

// d loss / d z_c = softmax_scale * softmax_c - q_scale * q_c - [c == t] * target_scale
template <class V>
struct RowGrad {
  V softmax_scale, q_scale, target_scale;
};

// u: weight of nll in the result (grad_output * s / D), uz: weight of lse^2 (grad_output * s / Dn).
template <class T, class V>
FASTLOSS_HD V index_row_nll(const RowConstants<T>& k, V log_sum, V target_minus_ref, V dot, V w_t) {
  V nll = (T(1) - k.smoothing) * w_t * (log_sum - target_minus_ref);
  return k.smoothing > T(0) ? nll + k.smooth_share * (k.weight_sum * log_sum - dot) : nll;
}
template <class T, class V>
FASTLOSS_HD RowGrad<V> index_row_grad(const RowConstants<T>& k, V lse, V w_t, V u, V uz) {
  V target_scale = u * ((T(1) - k.smoothing) * w_t);
  V q_scale = u * k.smooth_share;
  return {target_scale + q_scale * k.weight_sum + uz * (T(2) * k.z_loss * lse), q_scale, target_scale};
}

template <class V>
FASTLOSS_HD V soft_row_nll(V log_sum, V dot, V mass) {
  return mass * log_sum - dot;
}
template <class T, class V>
FASTLOSS_HD RowGrad<V> soft_row_grad(const RowConstants<T>& k, V lse, V mass, V u, V uz) {
  return {u * mass + uz * (T(2) * k.z_loss * lse), u, V{} /* no picked class */};
}

}  // namespace fastloss
