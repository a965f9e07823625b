// Powers and their slopes, for the losses of elements and the row maps alike. Included with FASTLOSS_ISA naming the
// namespace of lane_t, exp_of and log_of: an instruction set (simd.h) or the GPU (lanes_gpu.cuh).
#pragma once

namespace fastloss {
namespace FASTLOSS_ISA {

// f and f'.
template <class V>
struct Slope {
  V value, slope;
};

// What few calls need, out of line on the CPU: its code would keep that of the others from being inlined in their loop.
#ifdef __CUDACC__
#define FASTLOSS_RARE
#else
#define FASTLOSS_RARE __attribute__((noinline))
#endif

// a^p for a >= 0: 0 at 0, whatever p is. Its relative error is that of a float's rounding |p log a| times.
template <class V>
FASTLOSS_RARE constexpr V power_of(V a, lane_t<V> p) {
  using T = lane_t<V>;
  const T most = T(sizeof(T) == 8 ? 709 : 88);  // of exp_of
  const V z = p * log_of(a);
  return a == T(0) ? V{} : z > most ? V{} + T(__builtin_inf()) : exp_of(z);
}

// w^gamma for w in [0, 1], and gamma w^(gamma - 1), 0 where w is 0 and gamma below 1; the usual gammas without a power.
template <class V>
constexpr Slope<V> focus_of(V w, lane_t<V> gamma) {
  using T = lane_t<V>;
  const V one = V{} + T(1);
  if (gamma == T(0)) return {one, V{}};
  if (gamma == T(1)) return {w, one};
  if (gamma == T(2)) return {w * w, w + w};
  if (gamma == T(4)) return {w * w * (w * w), T(4) * w * (w * w)};
  const V power = power_of(w, gamma);
  return {power, w > T(0) ? gamma * power / w : V{}};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
