// Losses of a prediction x of a number t.
#pragma once
#include "../loss.h"

namespace fastloss {
namespace FASTLOSS_ISA {

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

// sqrt(d^2 + eps^2), eps = p[0]
struct Charbonnier : ResidualLoss {
  static constexpr const char* name = "charbonnier_loss";
  static constexpr int params = 1;
  template <class V>
  static constexpr Slope<V> of(V d, const ParamsOf<V>& p) {
    const V root = sqrt_of(d * d + p[0] * p[0]);
    return {root, d / root};
  }
};

// Pinball loss of the quantile q = p[0]: -q d where d < 0, (1 - q) d elsewhere; without a gradient at 0
struct Quantile : ResidualLoss {
  static constexpr const char* name = "quantile_loss";
  static constexpr int params = 1;
  static constexpr bool streams = false;
  template <class V>
  static constexpr Slope<V> of(V d, const ParamsOf<V>& p) {
    const lane_t<V> zero = lane_t<V>(0), below = -p[0], above = lane_t<V>(1) - p[0];
    return {d < zero ? below * d : above * d, d < zero ? V{} + below : d > zero ? V{} + above : V{}};
  }
};

// The same of a quantile for each element; operands x, t, q
struct Quantiles : PlainLoss {
  static constexpr const char* name = "quantiles_loss";
  static constexpr int operands = 3;
  template <class V>
  static constexpr Jet<V, 3> of(const V (&operand)[3], const ParamsOf<V>&) {
    const lane_t<V> zero = lane_t<V>(0), one = lane_t<V>(1);
    const V d = operand[0] - operand[1], q = operand[2];
    const V slope = d < zero ? -q : d > zero ? one - q : V{};
    return {d < zero ? -q * d : (one - q) * d, slope, -slope, -d};
  }
};

// sqrt of the sum or mean of (log1p x - log1p t)^2; without a gradient where it is 0; nan where x or t is -1 or less
struct Rmsle : PlainLoss {
  static constexpr const char* name = "rmsle_loss";
  static constexpr bool finishes = true;
  template <class V>
  static constexpr Jet<V, 2> of(const V (&operand)[2], const ParamsOf<V>&) {
    const lane_t<V> one = lane_t<V>(1);
    const V x = operand[0], t = operand[1], none = V{} + lane_t<V>(__builtin_nan(""));
    const V d = (x > -one ? log1p_of(x) : none) - (t > -one ? log1p_of(t) : none);
    return {d * d, (d + d) / (one + x), -(d + d) / (one + t)};
  }
  template <class T>
  static constexpr Finished<1> finish(const T (&s)[1], T share, const Params<T>&) {
    const T root = sqrt(s[0]);
    return {root, {root == 0 || share == 0 ? 0 : share * T(0.5) / root}};
  }
};

template <>
struct LossesOf<LossGroup::regression> {
  using type = LossList<  //
      L1, Mse, Rmse, SmoothL1, Huber, LogCosh, RelativeL1, Charbonnier, Quantile, Quantiles, Rmsle>;
};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
