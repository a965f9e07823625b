// Logarithms and the exponential of any number, with their infinities and nan, where those of simd.h ask for a range.
#pragma once
#include "simd.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// r, a logarithm of x where it has one: -inf at 0, nan below.
template <class V>
inline V logarithm_of(V x, V r) {
  using T = lane_t<V>;
  return x < T(0) ? V{} + T(NAN) : x == T(0) ? V{} - T(INFINITY) : r;
}
template <class V>
inline V full_log_of(V x) {
  if constexpr (sizeof(lane_t<V>) == 8) {
    return log_of(x);  // the library's
  } else {
    const auto tiny = x < 1.17549435e-38f;  // without a leading 1
    const V r = log_of(tiny ? x * 16777216.0f : x);
    return logarithm_of(x, tiny ? r - 16.6355323f : r);
  }
}
template <class V>
inline V full_log1p_of(V u) {
  const V w = lane_t<V>(1) + u;
  return logarithm_of(w, log1p_from(u, w));
}
template <class V>
inline V full_exp_of(V x) {
  using T = lane_t<V>;
  constexpr T most = sizeof(T) == 8 ? T(700) : T(80), step = T(32), e_step = T(78962960182680.695161);
  const auto large = x > most;
  const V rest = x - step < most ? x - step : V{} + most;  // e^rest e^step is inf from there on
  const V e = exp_of(large ? rest : x);
  return large ? e * e_step : e;
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
