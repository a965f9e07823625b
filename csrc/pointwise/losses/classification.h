// Losses of a score or a probability x of a binary target t.
#pragma once
#include "../loss.h"

namespace fastloss {
namespace FASTLOSS_ISA {

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

template <>
struct LossesOf<LossGroup::classification> {
  using type = LossList<  //
      BinaryCrossEntropyWithLogits>;
};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
