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

template <>
struct LossesOf<LossGroup::vectors> {
  using type = LossList<  //
      CosineDistance>;
};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
