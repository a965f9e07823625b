// Losses of the logit x or the length x of a label, of which several may apply: target t, 0 or 1 or between.
#pragma once
#include "../loss.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// sigmoid(x), sigmoid(-x), softplus(x), softplus(-x), from one exponential; none of them cancels or overflows.
template <class V>
struct Logistic {
  V sigma, rest, plus, minus;
};
template <class V>
constexpr Logistic<V> logistic_of(V x) {
  const lane_t<V> zero = lane_t<V>(0), one = lane_t<V>(1);
  const V e = exp_of(-abs_of(x)), l = log1p_of_unit(e), near = inverse_of(one + e), far = e * near;
  return {x < zero ? far : near, x < zero ? near : far, l + (x > zero ? x : V{}), l + (x < zero ? -x : V{})};
}

// alpha_t w^gamma ce, with ce = t softplus(-x) + (1 - t) softplus(x), w = 1 - p_t = t sigmoid(-x) + (1 - t) sigmoid(x),
// alpha_t = alpha t + (1 - alpha)(1 - t), or 1 where alpha is below 0; alpha = p[0], gamma = p[1]
struct SigmoidFocal : PlainLoss {
  static constexpr const char* name = "sigmoid_focal_loss";
  static constexpr int params = 2;
  static constexpr bool streams = true;
  template <class V>
  static constexpr Jet<V, 2> of(const V (&operand)[2], const ParamsOf<V>& p) {
    using T = lane_t<V>;
    const T one = T(1), alpha = p[0];
    const bool balanced = alpha >= T(0);
    const T base = balanced ? one - alpha : one, step = balanced ? alpha + alpha - one : T(0);
    const V t = operand[1], other = one - t;
    const Logistic<V> f = logistic_of(operand[0]);
    const V share = base + step * t, ce = sum_of_products(t, f.minus, other, f.plus);
    const V w = sum_of_products(t, f.rest, other, f.sigma);
    const Slope<V> focus = focus_of(w, p[1]);
    const V by_ce = share * focus.value, by_w = share * ce * focus.slope;
    return {by_ce * ce, by_ce * (other * f.sigma - t * f.rest) + by_w * ((other - t) * f.sigma * f.rest),
            step * focus.value * ce + by_ce * (f.minus - f.plus) + by_w * (f.rest - f.sigma)};
  }
};

// t sigmoid(-x)^a softplus(-x) - (1 - t) m^b log(1 - m), m = max(sigmoid(x) - clip, 0); a = p[0], b = p[1], clip =
// p[2]. Without a clip log(1 - m) is -softplus(x), which keeps its digits where m is nearly 1.
struct Asymmetric : PlainLoss {
  static constexpr const char* name = "asymmetric_loss";
  static constexpr int params = 3;
  template <class V>
  static constexpr Jet<V, 2> of(const V (&operand)[2], const ParamsOf<V>& p) {
    using T = lane_t<V>;
    const T zero = T(0), one = T(1), clip = p[2];
    const V t = operand[1], other = one - t;
    const Logistic<V> f = logistic_of(operand[0]);
    const Slope<V> hard = focus_of(f.rest, p[0]);
    V m = f.sigma, cost = f.plus, by_x = f.sigma;  // -log(1 - m), and its derivative by x
    V m_by_x = f.sigma * f.rest;
    if (clip > zero) {
      const V shifted = f.sigma - clip;
      m_by_x = shifted > zero ? m_by_x : V{};
      m = shifted > zero ? shifted : shifted - shifted;
      cost = -log1p_of(-m);
      by_x = m_by_x / (one - m);
    }
    const Slope<V> easy = focus_of(m, p[1]);
    return {sum_of_products(t * hard.value, f.minus, other * easy.value, cost),
            other * (easy.slope * m_by_x * cost + easy.value * by_x) -
                t * f.rest * (hard.slope * f.sigma * f.minus + hard.value),
            hard.value * f.minus - easy.value * cost};
  }
};

// t max(0, upper - x)^2 + down (1 - t) max(0, x - lower)^2; upper = p[0], lower = p[1], down = p[2]
struct CapsuleMargin : PlainLoss {
  static constexpr const char* name = "capsule_margin_loss";
  static constexpr int params = 3;
  template <class V>
  static constexpr Jet<V, 2> of(const V (&operand)[2], const ParamsOf<V>& p) {
    const lane_t<V> zero = lane_t<V>(0), one = lane_t<V>(1);
    const V x = operand[0], t = operand[1], below = p[0] - x, above = x - p[1];
    const V a = below < zero ? V{} : below, b = above < zero ? V{} : above;  // a nan stays
    const V near = t * a, far = p[2] * (one - t) * b;
    return {near * a + far * b, far + far - near - near, a * a - p[2] * b * b};
  }
};

template <>
struct LossesOf<LossGroup::multilabel> {
  using type = LossList<  //
      SigmoidFocal, Asymmetric, CapsuleMargin>;
};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
