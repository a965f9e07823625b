// The pointwise losses: f(x, t) of one prediction and one target, with its first and second derivatives, written once
// for the CPU kernels, the CUDA kernels and double backward. V is a scalar or a vector of elements with the same
// operators; `p` is the loss's one parameter. What a caller does not use of a jet, the compiler does not compute.
//
// A new loss is a struct here and its name in `Losses`; CONTRIBUTING.md goes through the steps.
//
// Included with FASTLOSS_ISA naming the namespace of lane_t, exp_of, log1p_of, tanh_of and inverse_of: an
// instruction set (common/simd.h) or the GPU (pointwise_kernels.cuh).
#pragma once
#include "../common/types.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// Most losses are functions of the residual d = x - t alone: value, f'(d), f''(d).
template <class V>
struct ResidualJet {
  V value, slope, curvature;
};
// The others: value, df/dx, df/dt, d2f/dx2, d2f/dxdt, d2f/dt2.
template <class V>
struct Jet {
  V value, x, t, xx, xt, tt;
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

// What a loss may override: `root` takes the square root of the mean plus `p` at the end of a reduction; `wide` takes
// the value of a residual in double, so that squares neither overflow nor vanish.
struct PlainLoss {
  static constexpr bool root = false, wide = false;
};

// |d|
struct L1 : PlainLoss {
  static constexpr const char* name = "l1_loss";
  template <class V>
  static constexpr ResidualJet<V> of(V d, lane_t<V>) {
    return {abs_of(d), sign_of(d), V{}};
  }
};

// d^2
struct Mse : PlainLoss {
  static constexpr const char* name = "mse_loss";
  template <class V>
  static constexpr ResidualJet<V> of(V d, lane_t<V>) {
    return {d * d, d + d, V{} + lane_t<V>(2)};
  }
};

// The same, summed where squares of float32 neither overflow nor vanish.
struct WideMse : Mse {
  static constexpr const char* name = "wide_mse_loss";
  static constexpr bool wide = true;
};

// sqrt(mean of d^2 + p). Its derivatives here are those of the square; the root's factor comes at the end.
struct Rmse : WideMse {
  static constexpr const char* name = "rmse_loss";
  static constexpr bool root = true;
};

// d^2 / 2p for |d| < p, |d| - p/2 beyond
struct SmoothL1 : PlainLoss {
  static constexpr const char* name = "smooth_l1_loss";
  template <class V>
  static constexpr ResidualJet<V> of(V d, lane_t<V> p) {
    const lane_t<V> half = lane_t<V>(0.5);
    const V a = abs_of(d);
    return {a < p ? half * d * d / p : a - half * p, a >= p ? sign_of(d) : d / p, a < p ? V{} + lane_t<V>(1) / p : V{}};
  }
};

// d^2 / 2 for |d| <= p, p (|d| - p/2) beyond
struct Huber : PlainLoss {
  static constexpr const char* name = "huber_loss";
  template <class V>
  static constexpr ResidualJet<V> of(V d, lane_t<V> p) {
    const lane_t<V> half = lane_t<V>(0.5);
    const V a = abs_of(d);
    return {a <= p ? d * d * half : p * (a - half * p), a > p ? p * sign_of(d) : d, a <= p ? V{} + lane_t<V>(1) : V{}};
  }
};

// log cosh d = |d| + log1p(exp(-2 |d|)) - log 2. Near 0, with s = tanh d, log1p(s^2 / (1 - s^2)) / 2 keeps its digits.
struct LogCosh : PlainLoss {
  static constexpr const char* name = "log_cosh_loss";
  template <class V>
  static constexpr ResidualJet<V> of(V d, lane_t<V>) {
    const lane_t<V> one = lane_t<V>(1), half = lane_t<V>(0.5), log2 = lane_t<V>(0.69314718055994530942);
    const V a = abs_of(d), s = tanh_of(d), rest = one - s * s;
    const V l = log1p_of(a < one ? s * s / rest : exp_of(-(a + a)));
    return {a < one ? half * l : l + (a - log2), s, rest};
  }
};

// |x - t| / m, m = max(|t|, p), or max((|x| + |t|) / 2, p) where symmetric
template <bool kSymmetric>
struct RelativeL1 : PlainLoss {
  static constexpr const char* name = kSymmetric ? "symmetric_relative_l1_loss" : "relative_l1_loss";
  template <class V>
  static constexpr Jet<V> of(V x, V t, lane_t<V> p) {
    const lane_t<V> half = lane_t<V>(0.5), two = lane_t<V>(2);
    const V d = x - t, s = sign_of(d);
    const V scale = kSymmetric ? (abs_of(x) + abs_of(t)) * half : abs_of(t);
    const V m = scale > p ? scale : V{} + p, inverse = inverse_of(m);
    const V mx = kSymmetric ? (scale > p ? sign_of(x) * half : V{}) : V{};
    const V mt = scale > p ? (kSymmetric ? sign_of(t) * half : sign_of(t)) : V{};
    const V f = abs_of(d) * inverse;  // df = (s (dx - dt) - f dm) / m
    const V fx = (s - f * mx) * inverse, ft = (-s - f * mt) * inverse;
    return {f, fx, ft, -two * fx * mx * inverse, -(fx * mt + ft * mx) * inverse, -two * ft * mt * inverse};
  }
};

template <class... L>
struct LossList {};
using Losses = LossList<  // the registry; a loss's number is its place here
    L1, Mse, WideMse, Rmse, SmoothL1, Huber, LogCosh, RelativeL1<false>, RelativeL1<true>>;

template <class... L>
const char* const* names_of(LossList<L...>) {
  static constexpr const char* names[] = {L::name..., nullptr};
  return names;
}

// The full jet of any loss.
template <class V>
constexpr Jet<V> full_jet(const ResidualJet<V>& r) {
  return {r.value, r.slope, -r.slope, r.curvature, -r.curvature, r.curvature};
}
template <class Loss, class V>
constexpr auto jet_of(V x, V t, lane_t<V> p, int) -> decltype(full_jet(Loss::of(x - t, p))) {
  return full_jet(Loss::of(x - t, p));
}
template <class Loss, class V>
constexpr Jet<V> jet_of(V x, V t, lane_t<V> p, ...) {
  return Loss::of(x, t, p);
}
template <class Loss, class V>
constexpr Jet<V> jet(V x, V t, lane_t<V> p) {
  return jet_of<Loss, V>(x, t, p, 0);
}

// f(Loss{}) for number `id` of the list.
template <class F, class First, class... Rest>
void with_loss(LossList<First, Rest...>, int id, const F& f) {
  if (id == 0) return f(First{});
  if constexpr (sizeof...(Rest) > 0) with_loss(LossList<Rest...>{}, id - 1, f);
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
