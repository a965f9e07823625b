// Divergences of two softmaxes: the mathematics of a class and of a row, once for the vectors of the CPU and the
// numbers of the GPU. See divergence.h. FASTLOSS_ISA names the namespace of lane_t, exp_of and log1p_of: an instruction
// set (common/simd.h) or the GPU (common/lanes_gpu.cuh).
//
// Sums of p log(p / q) cancel: their terms are of the first order in d = log(p / q), the result is of the second. What
// is summed here is p (e^-d - 1 + d) instead, the same in all since the sums of p and of q are 1, and no term of it is
// negative. Where d is small it comes from a series, with all its digits, and so does q - p = p (e^-d - 1): logits
// which nearly agree have a divergence with all its digits as well, and logits which agree one of exactly 0.
#pragma once
#include "divergence.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// What all rows of a call share.
template <class T>
struct PairCall {
  T inv_temperature, beta;
  bool js;
};
template <class T>
FASTLOSS_HD PairCall<T> pair_call(const DivergenceArgs& a) {
  return {T(1 / a.temperature), T(a.beta), a.kind == Divergence::js};
}

// What the terms of a row are made of.
template <class V>
struct PairRow {
  V max_p, max_q;          // largest logits
  V log_sum_p, log_sum_q;  // of exp((x - max) / T)
  V log_ratio;             // their difference, with the digits that these have not
};
// From sums that are at least 1. A row without a softmax (all logits -inf, a sum of 0) is nan.
template <class V>
FASTLOSS_HD PairRow<V> pair_row(V max_p, V sum_p, V max_q, V sum_q) {
  const V none = V{} + lane_t<V>(__builtin_nan(""));
  sum_p = sum_p == V{} ? none : sum_p;
  sum_q = sum_q == V{} ? none : sum_q;
  const lane_t<V> one = lane_t<V>(1);
  return {max_p, max_q, log1p_of(sum_p - one), log1p_of(sum_q - one), log1p_of((sum_p - sum_q) / sum_q)};
}

// (e^-d - 1 + d) / d^2 for |d| <= 1/2.
template <class V>
FASTLOSS_HD V decay_series(V d) {
  using T = lane_t<V>;
  if constexpr (sizeof(T) == 4) {
    const V high = (T(0.0013981997) - T(0.000198756199) * d) * d - T(0.00833345205);
    return ((high * d + T(0.0416657962)) * d - T(0.166666657)) * d + T(0.5);
  } else {
    V sum = V{} + T(1);  // 1/2 (1 - d/3 (1 - d/4 (1 - ...)))
    for (int k = 17; k > 2; --k) sum = T(1) - d * (T(1) / T(k)) * sum;
    return sum * T(0.5);
  }
}
// ((1 + s) log(1 + s) - s) / s^2 for -0.25 <= s <= 0.285.
template <class V>
FASTLOSS_HD V mixture_series(V s) {
  using T = lane_t<V>;
  if constexpr (sizeof(T) == 4) {
    const V high = (T(0.0194395855) - T(0.01382712) * s) * s - T(0.0238937568);
    const V middle = (high * s + T(0.0332649238)) * s - T(0.0499967746);
    return ((middle * s + T(0.083334282)) * s - T(0.166666687)) * s + T(0.5);
  } else {
    V sum{};
    for (int k = 28; k >= 0; --k) sum = T(1) / T((k + 1) * (k + 2)) - s * sum;
    return sum;
  }
}

// What a class adds. With P and Q the sums of by_p and by_q over the row, the gradients are by_p - p P and by_q - q Q.
template <class V>
struct PairTerms {
  V value, p, q, by_p, by_q;
  V excess;  // q - p, whose sum is 0 but for what is rounded in log_ratio
};

// Of the logits and the probabilities of a class.
template <class V>
FASTLOSS_HD PairTerms<V> pair_terms(V x_p, V x_q, V p, V q, const PairRow<V>& r, const PairCall<lane_t<V>>& k) {
  using T = lane_t<V>;
  const V d = ((x_p - x_q) - (r.max_p - r.max_q)) * k.inv_temperature - r.log_ratio;  // infinite, or nan, for -inf
  const V size = d < V{} ? -d : d, gap = d * d * decay_series(d), loss = gap - d;     // e^-d - 1 + d, e^-d - 1
  const auto close = size < V{} + T(0.5);
  const V excess = close ? p * loss : q - p;
  if (!k.js) {
    const V by_p = p == V{} ? V{} : p * d;
    return {close ? p * gap : by_p + excess, p, q, by_p, excess, excess};
  }
  // m = (1 + s) larger
  const auto more = d >= V{};
  const V larger = more ? p : q, rest = more ? V{} + (T(1) - k.beta) : V{} + k.beta;
  const V s = rest * ((more ? excess : -excess) / larger);
  const V log_larger = -log1p_of(s), log_smaller = log_larger - size;  // log(larger / m), log(smaller / m)
  const V by_p = p == V{} ? V{} : k.beta * p * (more ? log_larger : log_smaller);
  const V by_q = q == V{} ? V{} : (T(1) - k.beta) * q * (more ? log_smaller : log_larger);
  // Of p, if d is small: m = (1 + t) p
  const V t = (T(1) - k.beta) * loss;
  const V near = -p * ((T(1) - k.beta) * (gap + loss * d) + t * t * mixture_series(t));
  return {size < V{} + T(0.25) ? near : by_p + by_q, p, q, by_p, by_q, excess};
}

template <class V>
FASTLOSS_HD PairTerms<V> pair_terms(V x_p, V x_q, const PairRow<V>& r, const PairCall<lane_t<V>>& k) {
  const V p = exp_of((x_p - r.max_p) * k.inv_temperature - r.log_sum_p);
  const V q = exp_of((x_q - r.max_q) * k.inv_temperature - r.log_sum_q);
  return pair_terms(x_p, x_q, p, q, r, k);
}

// x - log(1 + x), about x^2 / 2.
FASTLOSS_HD double log1p_gap(double x) {
  return x > -1e-3 && x < 1e-3 ? x * x * (0.5 - x * (1.0 / 3 - x * (0.25 - 0.2 * x))) : x - ::log1p(x);
}
// The divergence of a row from the sums over its classes. log_ratio was rounded, and q does not quite add up to 1: what
// that adds to the sum of values is of the second order, as the divergence is itself.
template <class T>
FASTLOSS_HD double row_divergence(double value, double excess, const PairCall<T>& k) {
  const double curvature = k.js ? double(k.beta) * (1 - double(k.beta)) : 1.0;
  const double exact = value - curvature * log1p_gap(excess);
  return exact < 0 ? 0.0 : exact;
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
