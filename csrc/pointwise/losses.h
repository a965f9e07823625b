// The pointwise losses: terms of an element's operands, with their first derivatives, and what comes after the sums of
// the terms; written once for the CPU kernels and the CUDA kernels. V is a scalar or a vector of elements with the same
// operators. What a caller does not use of a jet, the compiler does not compute.
//
// A new loss is a struct here and its name in `Losses`; CONTRIBUTING.md goes through the steps.
//
// Included with FASTLOSS_ISA naming the namespace of lane_t, exp_of, log1p_of, tanh_of and inverse_of: an
// instruction set (common/simd.h) or the GPU (common/lanes_gpu.cuh).
#pragma once
#include "pointwise.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// The numbers that a loss takes, as its lanes are.
template <class T>
struct Params {
  T at[kPointwiseParams];
  constexpr T operator[](int i) const { return at[i]; }
};
template <class T>
constexpr Params<T> params_of(const PointwiseArgs& a) {
  return {{T(a.params[0]), T(a.params[1]), T(a.params[2]), T(a.params[3])}};
}
template <class V>
using ParamsOf = Params<lane_t<V>>;

// Most losses are functions of the residual d = x - t alone: value, f'(d).
template <class V>
struct Slope {
  V value, slope;
};
// The others: the terms, and the derivative of each with respect to each operand.
template <class V, int kOperands, int kSums = 1>
struct Jet {
  V value[kSums], slope[kSums][kOperands];
};
// Of a loss with a formula after its sums S: the loss, and its derivative by each S times `share`.
template <int kSums>
struct Finished {
  double value, factor[kSums];
};

template <class V>
constexpr V abs_of(V d) {
  return d < lane_t<V>(0) ? -d : d;
}
// -1, 0 or 1; 0 at nan, as torch.sign's derivative of |d|.
template <class V>
constexpr V sign_of(V d) {
  const V one = V{} + lane_t<V>(1);
  return d > lane_t<V>(0) ? one : d < lane_t<V>(0) ? -one : V{};
}

// What a loss may say of itself. `residual`: a function of x - t, which returns a Slope. `finishes`: it has a function
// `finish`. `wide`, with a residual: its values are taken in double, so that squares neither overflow nor vanish.
struct PlainLoss {
  static constexpr int operands = 2, sums = 1, params = 0;
  static constexpr bool residual = false, finishes = false, wide = false;
};
struct ResidualLoss : PlainLoss {
  static constexpr bool residual = true;
};

// |d|
struct L1 : ResidualLoss {
  static constexpr const char* name = "l1_loss";
  template <class V>
  static constexpr Slope<V> of(V d, const ParamsOf<V>&) {
    return {abs_of(d), sign_of(d)};
  }
};

// d^2
struct Mse : ResidualLoss {
  static constexpr const char* name = "mse_loss";
  template <class V>
  static constexpr Slope<V> of(V d, const ParamsOf<V>&) {
    return {d * d, d + d};
  }
};

// sqrt(S + p[0]), S the sum or mean of d^2; without a gradient where it is 0
struct Rmse : Mse {
  static constexpr const char* name = "rmse_loss";
  static constexpr int params = 1;
  static constexpr bool finishes = true, wide = true;
  template <class T>
  static constexpr Finished<1> finish(const T (&s)[1], T share, const Params<T>& p) {
    const T root = sqrt(s[0] + p[0]);
    return {root, {root == 0 || share == 0 ? 0 : share * 0.5 / root}};
  }
};

// With beta = p[0]: d^2 / 2 beta for |d| < beta, |d| - beta / 2 beyond
struct SmoothL1 : ResidualLoss {
  static constexpr const char* name = "smooth_l1_loss";
  static constexpr int params = 1;
  template <class V>
  static constexpr Slope<V> of(V d, const ParamsOf<V>& p) {
    const lane_t<V> half = lane_t<V>(0.5), beta = p[0];
    const V a = abs_of(d);
    return {a < beta ? half * d * d / beta : a - half * beta, a >= beta ? sign_of(d) : d / beta};
  }
};

// With delta = p[0]: d^2 / 2 for |d| <= delta, delta (|d| - delta / 2) beyond
struct Huber : ResidualLoss {
  static constexpr const char* name = "huber_loss";
  static constexpr int params = 1;
  template <class V>
  static constexpr Slope<V> of(V d, const ParamsOf<V>& p) {
    const lane_t<V> half = lane_t<V>(0.5), delta = p[0];
    const V a = abs_of(d);
    return {a <= delta ? d * d * half : delta * (a - half * delta), a > delta ? delta * sign_of(d) : d};
  }
};

// log cosh d = |d| + log1p(exp(-2 |d|)) - log 2. Near 0, with s = tanh d, log1p(s^2 / (1 - s^2)) / 2 keeps its digits.
struct LogCosh : ResidualLoss {
  static constexpr const char* name = "log_cosh_loss";
  template <class V>
  static constexpr Slope<V> of(V d, const ParamsOf<V>&) {
    const lane_t<V> one = lane_t<V>(1), half = lane_t<V>(0.5), log2 = lane_t<V>(0.69314718055994530942);
    const V a = abs_of(d), s = tanh_of(d), rest = one - s * s;
    const V l = log1p_of(a < one ? s * s / rest : exp_of(-(a + a)));
    return {a < one ? half * l : l + (a - log2), s};
  }
};

// |x - t| / m, m = max(|t|, eps), or max((|x| + |t|) / 2, eps) if symmetric; eps = p[0], symmetric = p[1], 0 or 1
struct RelativeL1 : PlainLoss {
  static constexpr const char* name = "relative_l1_loss";
  static constexpr int params = 2;
  template <class V>
  static constexpr Jet<V, 2> of(const V (&operand)[2], const ParamsOf<V>& p) {
    const lane_t<V> half = lane_t<V>(0.5), eps = p[0];
    const bool symmetric = p[1] != lane_t<V>(0);
    const V x = operand[0], t = operand[1];
    const V d = x - t, s = sign_of(d);
    const V scale = symmetric ? (abs_of(x) + abs_of(t)) * half : abs_of(t);
    const V m = scale > eps ? scale : V{} + eps, inverse = inverse_of(m);
    const V mx = symmetric ? (scale > eps ? sign_of(x) * half : V{}) : V{};
    const V mt = scale > eps ? (symmetric ? sign_of(t) * half : sign_of(t)) : V{};
    const V f = abs_of(d) * inverse;  // df = (s (dx - dt) - f dm) / m
    return {f, (s - f * mx) * inverse, (-s - f * mt) * inverse};
  }
};

// w t' softplus(-x) + (1 - t') softplus(x), t' = t (1 - e) + e / 2; operands x, t, w (pos_weight); e = p[0], the label
// smoothing. softplus(x) = max(x, 0) + log1p(exp(-|x|)) rounds once, whatever x is. At x = -inf torch's formula gives
// nan, and so does this one: x > 0 ? x : x - x is max(x, 0) but there.
struct BinaryCrossEntropyWithLogits : PlainLoss {
  static constexpr const char* name = "binary_cross_entropy_with_logits";
  static constexpr int operands = 3, params = 1;
  template <class V>
  static constexpr Jet<V, 3> of(const V (&operand)[3], const ParamsOf<V>& p) {
    const lane_t<V> zero = lane_t<V>(0), one = lane_t<V>(1), half = lane_t<V>(0.5);
    const V x = operand[0], w = operand[2], t = operand[1] * (one - p[0]) + half * p[0];
    const V e = exp_of(-abs_of(x)), l = log1p_of(e), near = inverse_of(one + e), far = e * near;
    const V plus = l + (x > zero ? x : x - x), minus = l + (x < zero ? -x : V{});  // softplus of x, of -x
    const V sigma = x < zero ? far : near, rest = x < zero ? near : far;           // sigmoid of x, of -x
    const V wt = w * t;
    return {wt * minus + (one - t) * plus, (one - t) * sigma - wt * rest, (one - p[0]) * (w * minus - plus), t * minus};
  }
};

// 1 - S_xt / max(sqrt(S_xx S_tt), eps) of the sums of x t, x^2 and t^2; eps = p[0]
struct CosineDistance : PlainLoss {
  static constexpr const char* name = "cosine_distance_loss";
  static constexpr int sums = 3, params = 1;
  static constexpr bool finishes = true;
  template <class V>
  static constexpr Jet<V, 2, 3> of(const V (&operand)[2], const ParamsOf<V>&) {
    const V x = operand[0], t = operand[1];
    return {{x * t, x * x, t * t}, {{t, x}, {x + x, V{}}, {V{}, t + t}}};
  }
  template <class T>
  static constexpr Finished<3> finish(const T (&s)[3], T share, const Params<T>& p) {
    const T norms = sqrt(s[1]) * sqrt(s[2]);
    if (norms <= p[0]) return {1 - s[0] / p[0], {-share / p[0], 0, 0}};
    const T cosine = s[0] / norms;
    return {1 - cosine, {-share / norms, share * 0.5 * cosine / s[1], share * 0.5 * cosine / s[2]}};
  }
};

template <class... L>
struct LossList {};
using Losses = LossList<  // the registry; a loss's number is its place here
    L1, Mse, Rmse, SmoothL1, Huber, LogCosh, RelativeL1, BinaryCrossEntropyWithLogits, CosineDistance>;

template <class... L>
const PointwiseLoss* list_of(LossList<L...>) {
  static constexpr PointwiseLoss all[] = {{L::name, L::operands, L::sums, L::params, L::finishes}..., {}};
  return all;
}

// f(Loss{}) for number `id` of the list.
template <class F, class First, class... Rest>
void with_loss(LossList<First, Rest...>, int id, const F& f) {
  if (id == 0) return f(First{});
  if constexpr (sizeof...(Rest) > 0) with_loss(LossList<Rest...>{}, id - 1, f);
}

// The jet of any loss.
template <class Loss, class V>
constexpr Jet<V, Loss::operands, Loss::sums> jet(const V (&x)[Loss::operands], const ParamsOf<V>& p) {
  if constexpr (Loss::residual) {
    const Slope<V> r = Loss::of(x[0] - x[1], p);
    return {r.value, r.slope, -r.slope};
  } else {
    return Loss::of(x, p);
  }
}

// The loss of a row and its factors, from the sums of its terms and the count of the elements that the mask lets pass
// (their weights, if weight_denominator says so).
template <class Loss>
FASTLOSS_HD Finished<Loss::sums> row_result(const PointwiseArgs& a, const double (&sums)[Loss::sums],
                                            double denominator) {
  double reduced[Loss::sums], divisor = 1, share = 1;
  if (a.reduction == Reduction::mean) {
    divisor = a.counts_all() ? double(a.cols) : denominator;
    if (a.weight_denominator != 0) divisor *= a.weight_denominator;
    share = a.mask.data && divisor == 0 ? 0 : 1 / divisor;
  }
  for (int j = 0; j < Loss::sums; ++j) reduced[j] = sums[j] / divisor;
  if constexpr (Loss::finishes)
    return Loss::finish(reduced, share, params_of<double>(a));
  else
    return {reduced[0], {share}};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
