// Losses of the directions and distances of vectors: a formula after sums over each row.
#pragma once
#include "../loss.h"

namespace fastloss {
namespace FASTLOSS_ISA {

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

// 1 - C where the target t is 1, max(0, C - margin) where it is -1, 0 for any other, as torch.cosine_embedding_loss.
// C = S_xy / sqrt((S_xx + e) (S_yy + e)), e = 1e-12, of the sums of x y, x^2 and y^2; operands x, y, t, of which a row
// has one t; the fourth sum is above 0, below 0 or 0 as t is 1, -1 or another. margin = p[0]
struct CosineEmbedding : PlainLoss {
  static constexpr const char* name = "cosine_embedding_loss";
  static constexpr int operands = 3, sums = 4, params = 1;
  static constexpr bool finishes = true;
  template <class V>
  static constexpr Jet<V, 3, 4> of(const V (&operand)[3], const ParamsOf<V>&) {
    const lane_t<V> one = lane_t<V>(1);
    const V x = operand[0], y = operand[1], t = operand[2], zero{};
    const V side = t == one ? zero + one : t == -one ? zero - one : zero;
    return {{x * y, x * x, y * y, side}, {{y, x, zero}, {x + x, zero, zero}, {zero, y + y, zero}, {zero, zero, zero}}};
  }
  template <class T>
  static constexpr Finished<4> finish(const T (&s)[4], T share, const Params<T>& p) {
    const T x_square = s[1] + T(1e-12), y_square = s[2] + T(1e-12), norms = sqrt(x_square) * sqrt(y_square);
    const T cosine = s[0] / norms, beyond = cosine - p[0];
    if (s[3] == 0 || (s[3] < 0 && beyond < 0)) return {};
    const T value = s[3] > 0 ? 1 - cosine : beyond, slope = s[3] > 0 ? -share : share;
    const T by_square = -slope * T(0.5) * cosine;
    return {value, {slope / norms, by_square / x_square, by_square / y_square, 0}};
  }
};

// max(0, margin + D_ap - D_an) of the distances of an anchor a from a positive p and a negative n, as
// torch.triplet_margin_loss; with swap D_an is min(D_an, D_pn). D_xy = (sum |x - y + eps|^q)^(1/q). Operands a, p, n;
// q = p[0], above 0 and finite, margin = p[1], eps = p[2], swap = p[3], 0 or 1
struct TripletMargin : PlainLoss {
  static constexpr const char* name = "triplet_margin_loss";
  static constexpr int operands = 3, sums = 3, params = 4;
  static constexpr bool finishes = true;
  template <class V>
  static constexpr Jet<V, 3, 3> of(const V (&operand)[3], const ParamsOf<V>& p) {
    const V zero{};
    const Slope<V> near = power_of_abs(operand[0] - operand[1] + p[2], p[0]);
    const Slope<V> far = power_of_abs(operand[0] - operand[2] + p[2], p[0]);
    Slope<V> other = {zero, zero};
    if (p[3] != lane_t<V>(0)) other = power_of_abs(operand[1] - operand[2] + p[2], p[0]);
    return {{near.value, far.value, other.value},
            {{near.slope, -near.slope, zero}, {far.slope, zero, -far.slope}, {zero, other.slope, -other.slope}}};
  }
  template <class T>
  static constexpr Finished<3> finish(const T (&s)[3], T share, const Params<T>& p) {
    const auto distance = [&](T sum) { return p[0] == 2 ? sqrt(sum) : p[0] == 1 ? sum : pow(sum, 1 / p[0]); };
    const auto slope = [&](T d, T sum) { return d == 0 ? T(0) : d / (p[0] * sum); };  // of a distance, by its sum
    const T ap = distance(s[0]), an = distance(s[1]), pn = p[3] != 0 ? distance(s[2]) : T(0);
    // How much of the far distance is pn: half where it is the same as an, as in torch's minimum.
    const T part = p[3] == 0 || an < pn ? T(0) : an == pn ? T(0.5) : T(1);
    const T hinge = p[1] + ap - (part > 0 ? pn : an);
    if (hinge < 0) return {};
    return {hinge,
            {share * slope(ap, s[0]), (part - 1) * share * slope(an, s[1]),
             part > 0 ? -part * share * slope(pn, s[2]) : 0}};
  }
};

template <>
struct LossesOf<LossGroup::vectors> {
  using type = LossList<  //
      CosineDistance, CosineEmbedding, TripletMargin>;
};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
