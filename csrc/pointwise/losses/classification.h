// Losses of a score or a probability x of a binary target t, and of two scores' order.
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
    const V e = exp_of(-abs_of(x)), l = log1p_of_unit(e), near = inverse_of(one + e), far = e * near;
    const V plus = l + (x > zero ? x : x - x), minus = l + (x < zero ? -x : V{});  // softplus of x, of -x
    const V sigma = x < zero ? far : near, rest = x < zero ? near : far;           // sigmoid of x, of -x
    const V wt = w * t;
    return {wt * minus + (one - t) * plus, (one - t) * sigma - wt * rest, (one - p[0]) * (w * minus - plus), t * minus};
  }
};

// -t max(log x, -100) - (1 - t) max(log(1 - x), -100); operands x, t, probabilities. The bounds have no part in the
// derivatives, as in torch: (x - t) / max(x (1 - x), 1e-12) and log(1 - x) - log x.
struct BinaryCrossEntropy : PlainLoss {
  static constexpr const char* name = "binary_cross_entropy";
  static constexpr bool checks = true;
  static constexpr Domain domain(int) { return Domain::unit; }
  template <class V>
  static constexpr Jet<V, 2> of(const V (&operand)[2], const ParamsOf<V>&) {
    const lane_t<V> one = lane_t<V>(1), least = lane_t<V>(-100), smallest = lane_t<V>(1e-12);
    const V x = operand[0], t = operand[1], rest = one - x, square = x * rest;
    const V l = full_log_of(x), r = full_log1p_of(-x);
    const V value = (t - one) * (r < least ? V{} + least : r) - t * (l < least ? V{} + least : l);
    const V slope = (x - t) * inverse_of(square > smallest ? square : V{} + smallest);
    return {nan_unless(t * (one - t) >= lane_t<V>(0), value), slope, r - l};
  }
};

// log(1 + e^(-t x)) = max(u, 0) + log1p(e^-|u|) with u = -t x: finite, whatever x is
struct SoftMargin : PlainLoss {
  static constexpr const char* name = "soft_margin_loss";
  template <class V>
  static constexpr Jet<V, 2> of(const V (&operand)[2], const ParamsOf<V>&) {
    const lane_t<V> zero = lane_t<V>(0), one = lane_t<V>(1);
    const V x = operand[0], t = operand[1], u = -(t * x);
    const V e = exp_of(-abs_of(u)), near = inverse_of(one + e);
    const V sigma = u < zero ? e * near : near;
    return {log1p_of_unit(e) + (u > zero ? u : V{}), -(t * sigma), -(x * sigma)};
  }
};

// x where t = 1, max(0, m - x) where t = -1, the sum of both where it is neither; m = p[0]
struct HingeEmbedding : PlainLoss {
  static constexpr const char* name = "hinge_embedding_loss";
  static constexpr int params = 1;
  template <class V>
  static constexpr Jet<V, 2> of(const V (&operand)[2], const ParamsOf<V>& p) {
    const lane_t<V> zero = lane_t<V>(0), one = lane_t<V>(1);
    const V x = operand[0], t = operand[1], z = p[0] - x, ones = V{} + one;
    const V far = t != one ? (z < zero ? V{} : z) : V{}, far_slope = t != one ? (z >= zero ? -ones : V{}) : V{};
    return {far + (t != -one ? x : V{}), far_slope + (t != -one ? ones : V{}), V{}};
  }
};

// max(0, m - t (x - y)); operands x, y, t; m = p[0]. At 0 it has a slope, as in torch.
struct MarginRanking : PlainLoss {
  static constexpr const char* name = "margin_ranking_loss";
  static constexpr int operands = 3, params = 1;
  template <class V>
  static constexpr Jet<V, 3> of(const V (&operand)[3], const ParamsOf<V>& p) {
    const lane_t<V> zero = lane_t<V>(0), one = lane_t<V>(1);
    const V d = operand[0] - operand[1], t = operand[2], z = p[0] - t * d;
    const V counts = z >= zero ? V{} + one : V{}, slope = t * counts;
    return {z < zero ? V{} : z, -slope, slope, -(d * counts)};
  }
};

template <>
struct LossesOf<LossGroup::classification> {
  using type = LossList<  //
      BinaryCrossEntropyWithLogits, BinaryCrossEntropy, SoftMargin, HingeEmbedding, MarginRanking>;
};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
