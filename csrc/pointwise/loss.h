// What a pointwise loss is: terms of an element's operands, with their first derivatives, and what comes after the sums
// of the terms; written once for the CPU kernels and the CUDA kernels. V is a scalar or a vector of elements with the
// same operators. What a caller does not use of a jet, the compiler does not compute.
//
// The losses are in losses/, a file for each group. A new loss is a struct there and its name in the group's list;
// CONTRIBUTING.md goes through the steps.
//
// Included with FASTLOSS_ISA naming the namespace of lane_t, exp_of, log_of, log1p_of, log1p_of_unit, tanh_of,
// inverse_of, rounded and, for any number, full_exp_of, full_log_of and full_log1p_of: an instruction set
// (common/full_range.h) or the GPU (common/lanes_gpu.cuh).
#pragma once
#include "../common/powers.h"
#include "pointwise.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// The numbers that a loss takes, as its lanes are.
template <class T>
struct Params {
  T at[kPointwiseParams];
  constexpr T operator[](int i) const { return at[i]; }
};
template <class T>
constexpr Params<T> params_of(const PointwiseArgs& a) {
  return {{T(a.params[0]), T(a.params[1]), T(a.params[2]), T(a.params[3])}};
}
template <class V>
using ParamsOf = Params<lane_t<V>>;

// Most losses are functions of the residual d = x - t alone, and give a Slope (common/powers.h). The others: the terms,
// and the derivative of each with respect to each operand.
template <class V, int kOperands, int kSums = 1>
struct Jet {
  V value[kSums], slope[kSums][kOperands];
};
// Of a loss with a formula after its sums S: the loss, and its derivative by each S times `share`.
template <int kSums>
struct Finished {
  double value, factor[kSums];
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
template <class V>
constexpr V sqrt_of(V x) {
  if constexpr (sizeof(V) == sizeof(lane_t<V>)) {
    return sqrt(x);
  } else {  // the compiler makes one instruction of it
    for (size_t i = 0; i < sizeof(V) / sizeof(lane_t<V>); ++i)
      if constexpr (sizeof(lane_t<V>) == 8)
        x[i] = __builtin_sqrt(x[i]);
      else
        x[i] = __builtin_sqrtf(x[i]);
    return x;
  }
}
// a b + c d of rounded products: the compiler may fuse one of them with the sum, and would choose another, or none,
// where the gradient is wanted too and has use for them.
template <class V>
constexpr V sum_of_products(V a, V b, V c, V d) {
  return rounded(a * b) + rounded(c * d);
}
// |d|^p, p > 0. Its slope at 0 is 0, as torch's.
template <class V>
constexpr Slope<V> power_of_abs(V d, lane_t<V> p) {
  using T = lane_t<V>;
  if (p == T(2)) return {d * d, d + d};
  const V a = abs_of(d);
  if (p == T(1)) return {a, sign_of(d)};
  const V root = power_of(a, p - T(1));
  return {root * a, p * root * sign_of(d)};
}

// What a loss may say of itself. `residual`: a function of x - t, which returns a Slope. `finishes`: it has a function
// `finish`. `wide`, with a residual: its values are taken in double, so that squares neither overflow nor vanish.
// `streams`: it is compiled for the streaming CUDA kernels too, which its largest calls gain from. `checks`: operands
// have a `domain`; outside of it the value is nan, which is where a search for what is there begins.
struct PlainLoss {
  static constexpr int operands = 2, sums = 1, params = 0;
  static constexpr bool residual = false, finishes = false, wide = false, streams = false, checks = false;
  static constexpr Domain domain(int) { return Domain::any; }
};
struct ResidualLoss : PlainLoss {
  static constexpr bool residual = true, streams = true;
};

// x, or nan where the condition does not hold.
template <class C, class V>
constexpr V nan_unless(C holds, V x) {
  return holds ? x : V{} + lane_t<V>(NAN);
}
template <class T>
constexpr bool is_in(Domain domain, T x) {
  if (domain == Domain::unit) return x >= T(0) && x <= T(1);
  return domain == Domain::any || !(x < T(0));
}

template <class... L>
struct LossList {};
// Of a group: its losses, as `type`. A loss's number in its group is its place there.
template <LossGroup kGroup>
struct LossesOf;

// f(Loss{}) for number `id` of the list.
template <class F, class First, class... Rest>
void with_loss(LossList<First, Rest...>, int id, const F& f) {
  if (id == 0) return f(First{});
  if constexpr (sizeof...(Rest) > 0) with_loss(LossList<Rest...>{}, id - 1, f);
}

// The jet of any loss.
template <class Loss, class V>
constexpr Jet<V, Loss::operands, Loss::sums> jet(const V (&x)[Loss::operands], const ParamsOf<V>& p) {
  if constexpr (Loss::residual) {
    const Slope<V> r = Loss::of(x[0] - x[1], p);
    return {r.value, r.slope, -r.slope};
  } else {
    return Loss::of(x, p);
  }
}

// The loss of a row and its factors, from the sums of its terms and the count of the elements that the mask lets pass
// (their weights, if weight_denominator says so).
template <class Loss>
FASTLOSS_HD Finished<Loss::sums> row_result(const PointwiseArgs& a, const double (&sums)[Loss::sums],
                                            double denominator) {
  double reduced[Loss::sums], divisor = 1, share = 1;
  if (a.reduction == Reduction::mean) {
    divisor = a.counts_all() ? double(a.cols) : denominator;
    if (a.weight_denominator != 0) divisor *= a.weight_denominator;
    share = a.mask.data && divisor == 0 ? 0 : 1 / divisor;
  }
  for (int j = 0; j < Loss::sums; ++j) reduced[j] = sums[j] / divisor;
  if constexpr (Loss::finishes)
    return Loss::finish(reduced, share, params_of<double>(a));
  else
    return {reduced[0], {share}};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
