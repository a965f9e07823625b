// Negative log likelihoods of what a network says of a distribution, and distances of distributions.
#pragma once
#include "../loss.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// (log v + (x - t)^2 / v) / 2, v = max(s, eps); operands x, t, s, the variance; eps = p[0]; p[1] != 0 adds log(2 pi)
// / 2. The bound has no part in the derivatives, as in torch.
struct GaussianNll : PlainLoss {
  static constexpr const char* name = "gaussian_nll_loss";
  static constexpr int operands = 3, params = 2;
  static constexpr bool checks = true;
  static constexpr Domain domain(int k) { return k == 2 ? Domain::not_negative : Domain::any; }
  template <class V>
  static constexpr Jet<V, 3> of(const V (&operand)[3], const ParamsOf<V>& p) {
    const lane_t<V> half = lane_t<V>(0.5), zero = lane_t<V>(0);
    const lane_t<V> rest = p[1] != zero ? lane_t<V>(0.91893853320467274178) : zero;
    const V d = operand[0] - operand[1], s = operand[2], v = s < p[0] ? V{} + p[0] : s;
    const V inverse = inverse_of(v), z = d * inverse;
    const V value = half * (full_log_of(v) + d * z) + rest;
    return {s < zero ? V{} + lane_t<V>(NAN) : value, z, -z, half * (inverse - z * z)};
  }
};

// e^x - t x, or of x itself instead of its logarithm x - t log(x + eps), with p[0] = 0; eps = p[2]. p[1] != 0 adds
// Stirling's t log t - t + log(2 pi t) / 2 where t > 1. Its derivative by t is nan at t <= 0, as torch's.
struct PoissonNll : PlainLoss {
  static constexpr const char* name = "poisson_nll_loss";
  static constexpr int params = 3;
  template <class V>
  static constexpr Jet<V, 2> of(const V (&operand)[2], const ParamsOf<V>& p) {
    const lane_t<V> zero = lane_t<V>(0), one = lane_t<V>(1), half = lane_t<V>(0.5);
    const V x = operand[0], t = operand[1];
    V value{}, slope{}, by_t{};
    if (p[0] != zero) {
      const V e = full_exp_of(x);
      value = e - t * x, slope = e - t, by_t = -x;
    } else {
      const V y = x + p[2], l = full_log_of(y);
      value = x - t * l, slope = one - t / y, by_t = -l;
    }
    if (p[1] != zero) {
      const lane_t<V> log_root = lane_t<V>(0.91893853320467274178);  // log(2 pi) / 2
      const V l = full_log_of(t);
      value = value + (t > one ? (t * l - t) + (half * l + log_root) : V{});
      by_t = by_t + (t > one ? l + half / t : nan_unless(t > zero, V{}));
    }
    return {value, slope, by_t};
  }
};

// s t (log t - x), 0 log 0 being 0; with p[0] != 0 the target is log t: s e^t (t - x). s = p[1], for a mean over the
// batch. The derivative by t is nan at t = 0, as torch's.
struct KlDiv : PlainLoss {
  static constexpr const char* name = "kl_div";
  static constexpr int params = 2;
  template <class V>
  static constexpr Jet<V, 2> of(const V (&operand)[2], const ParamsOf<V>& p) {
    const lane_t<V> zero = lane_t<V>(0), share = p[1];
    const V x = operand[0], t = operand[1];
    if (p[0] != zero) {
      const V e = share * full_exp_of(t), value = e * (t - x);
      return {value, -e, value + e};
    }
    const V d = (t == zero ? V{} : full_log_of(t)) - x;
    return {share * (t * d), -(share * t), share * (d + t / t)};
  }
};

template <>
struct LossesOf<LossGroup::distributions> {
  using type = LossList<  //
      GaussianNll, PoissonNll, KlDiv>;
};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
