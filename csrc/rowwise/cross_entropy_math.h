// The mathematics of one row of cross entropy, written once for the CPU and the CUDA kernels.
// Notation as in cross_entropy.h. V is a scalar (float, double) or a vector of rows with the same operators.
#pragma once
#include <math.h>

#include "../common/types.h"

namespace fastloss {

// Constants of a call, in the accumulation type.
template <class T>
struct RowConstants {
  T smoothing;     // e
  T smooth_share;  // e / C
  T weight_sum;    // W = sum_c w_c (C without class weights); only used when e > 0
  T z_loss;
  T logit_scale;
  T softcap;  // 0: none
  T inv_softcap;
};

// What becomes of the target's logit x = cos t before the transform, with an angle m in [0, pi / 2] (ArcFace: Deng et
// al., 2019) and a cosine d (CosFace: Wang et al., 2018):
//
//   cos(t + m) - d          where x > cos(pi - m); cos(t + m) = x cos m - sin t sin m
//   x - m sin(pi - m) - d   elsewhere, where t + m is beyond pi
//
// The derivative by x, cos m + x sin m / sin t, is infinite at x = 1. There sin t counts as kLeastSine. Beyond 1, where
// rounding may bring a cosine, sin t is 0, and so is its derivative.
template <class T>
struct Margin {
  bool any;
  T cos_m, sin_m, edge, beyond, cosine;  // edge: cos(pi - m), beyond: m sin(pi - m)

  [[gnu::always_inline]] static Margin of(double angle, double cosine) {
    const double c = cos(angle), s = sin(angle);
    return {angle != 0 || cosine != 0, T(c), T(s), T(-c), T(angle * s), T(cosine)};
  }
};
constexpr double kLeastSine = 1e-3;  // as in fastloss/formulas.py

template <class T>
FASTLOSS_HD T sine_of_cosine(T x) {
  const T square = (T(1) - x) * (T(1) + x);
  return square > T(0) ? T(sqrt(square)) : T(0);
}
template <class T>
FASTLOSS_HD T with_margin(const Margin<T>& m, T x) {
  return (x > m.edge ? x * m.cos_m - sine_of_cosine(x) * m.sin_m : x - m.beyond) - m.cosine;
}
// Its derivative by x.
template <class T>
FASTLOSS_HD T margin_slope(const Margin<T>& m, T x) {
  if (!(x > m.edge)) return T(1);
  if (x > T(1)) return m.cos_m;
  const T sine = sine_of_cosine(x), least = T(kLeastSine);
  return m.cos_m + m.sin_m * x / (sine > least ? sine : least);
}

// The statistics of a row, all relative to a reference point `ref` (its maximum, or 0 while every logit seen is -inf)
// so that nothing cancels at logits of +-1e4.
//
// The target's own exponential is kept out of the sum: with others = sum_{c != t} exp(z_c - ref) and
// e_t = exp(z_t - ref), 1 - p_t = others / (others + e_t) and -log p_t = log1p(others / e_t) keep all their digits for
// a row that is nearly certain, where p_t - 1 and log(sum) have none left. Without a target (probabilities, ignored
// rows) others is the whole sum and e_t is 0.
template <class V>
struct RowStats {
  V ref;
  V others;
  V dot;   // sum_c q_c (z_c - ref), q_c = w_c (smoothing) or w_c p'_c (probability target)
  V mass;  // sum_c q_c (probability target; for smoothing it is weight_sum)
};

// d loss / d z_c = (target_scale + rest_scale) softmax_c - q_scale q_c                       for c != t
//                  rest_scale softmax_t - q_scale q_t - target_scale others / sum            for c == t
template <class V>
struct RowGrad {
  V target_scale, rest_scale, q_scale;
};

// The target's own gradient but for q_t. Where its weight is infinite torch takes p_t w - w, which is nan.
template <class V>
FASTLOSS_HD V target_grad(RowGrad<V> g, V others, V e_t, V per_sum) {
  return (g.rest_scale * e_t - g.target_scale * others) * (per_sum + (g.target_scale - g.target_scale));
}

// sum_c q_c (lse - z_c) >= 0 for q >= 0, from mass = sum_c q_c. The difference has no value where class weights are
// infinite; then the mass decides, unless the row has no softmax.
template <class M, class V>
FASTLOSS_HD V spread_nll(M mass, V log_sum, V dot) {
  const V plain = mass * log_sum - dot, infinite = mass + (log_sum - log_sum);
  return mass - mass == M{} ? plain : infinite;
}

// -log p_t, from log_sum = log(others + e_t) and target_minus_ref = z_t - ref. `log1p_ratio` is log1p(others / e_t).
template <class V>
FASTLOSS_HD V target_nll(V others, V e_t, V log_sum, V target_minus_ref, V log1p_ratio) {
  return others < e_t ? log1p_ratio : log_sum - target_minus_ref;
}

// The two parts of the nll of an index target: the target's and, with smoothing, that of all classes. Their sums over
// the rows are divided by D one by one, as torch does: where D is 0 either may be infinite.
template <class T, class V>
FASTLOSS_HD V index_row_nll(const RowConstants<T>& k, V nll_t, V w_t) {
  return (T(1) - k.smoothing) * w_t * nll_t;
}
template <class T, class V>
FASTLOSS_HD V smooth_row_nll(const RowConstants<T>& k, V log_sum, V dot) {
  return k.smooth_share * spread_nll(k.weight_sum, log_sum, dot);
}
// Sums over rows, in doubles, so that many can be added without loss: s nll of the targets, s nll of
// smoothing, s z_loss lse^2, right predictions.
struct LossSums {
  double nll = 0, smooth = 0, z = 0, correct = 0;
};
// L, from the sums over all rows; see cross_entropy.h.
FASTLOSS_HD double reduced_loss(const LossSums& s, bool mean, bool with_smooth, bool with_z, double d, double dn) {
  double loss = mean ? s.nll / d : s.nll;
  if (with_smooth) loss += mean ? s.smooth / d : s.smooth;
  if (with_z) loss += mean ? s.z / dn : s.z;
  return loss;
}

// u: what nll weighs in the result (grad_output * s / D), uz: what lse^2 does (grad_output * s / Dn).
template <class T, class V>
FASTLOSS_HD RowGrad<V> index_row_grad(const RowConstants<T>& k, V lse, V w_t, V u, V uz) {
  const V q_scale = u * k.smooth_share;
  // Without smoothing the weights of other classes, which may be infinite, have no part in it.
  const V smooth_scale = k.smoothing > T(0) ? q_scale * k.weight_sum : V{};
  return {u * ((T(1) - k.smoothing) * w_t), smooth_scale + uz * (T(2) * k.z_loss * lse), q_scale};
}
template <class T, class V>
FASTLOSS_HD RowGrad<V> soft_row_grad(const RowConstants<T>& k, V lse, V mass, V u, V uz) {
  return {V{}, u * mass + uz * (T(2) * k.z_loss * lse), u};
}

}  // namespace fastloss
