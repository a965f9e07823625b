// Row maps: functions g of a row's nll between the nll and the sum, with g(0) = 0 and g' >= 0. Written once for the
// vectors of the CPU and the numbers of the GPU.
//
// Let q_c be what class c weighs in the row's nll: w_c ((1-e) [c = t] + e/C) for an index target, w_c p'_c for
// probabilities. With m = sum_c q_c and l = sum_c q_c (lse - z_c) the row's nll becomes m g(l / m), 0 where m is 0;
// without smoothing that is w_t g(nll_t). Its derivatives:
//
//   by z_c    the plain gradient times the slope g'(l / m)
//   by p_c    (1-e) w_c (slope (lse - z_c) + level),  level = g - (l / m) g'
//
// Nothing else of the row is read. Where a loss takes part of g as a constant, g' is the derivative of the rest alone.
//
// A new map is a number in RowMap, its name and parameters in kRowMaps, a function, and a case of mapped_nll.
#pragma once
#include "../common/types.h"

namespace fastloss {

enum class RowMap : int32_t {
  none,                       // l
  focal,                      // (1 - e^-l)^gamma l
  poly1,                      // l + epsilon (1 - e^-l)
  generalized_cross_entropy,  // (1 - e^-q l) / q
  token_scaled,               // e^-l l, the first factor a constant
  count                       // how many there are
};
constexpr int kRowMapCount = int(RowMap::count);
// In order of their numbers, name:parameter,parameter; two parameters at most.
constexpr const char* kRowMaps =
    "none "
    "focal:gamma "
    "poly1:epsilon "
    "generalized_cross_entropy:q "
    "token_scaled ";

}  // namespace fastloss

// The rest is for who computes. FASTLOSS_ISA names the namespace of lane_t, exp_of, one_minus_exp, log_of and tanh_of:
// an instruction set (common/simd.h) or the GPU (common/lanes_gpu.cuh).
#ifdef FASTLOSS_ISA
#include "../common/powers.h"
namespace fastloss {
namespace FASTLOSS_ISA {

template <class V>
struct MappedRow {
  V nll, slope, level;
};

// Focal loss (Lin et al., 2017): g(l) = u^gamma l with u = 1 - e^-l, gamma >= 0; g' = u^gamma + gamma u^(gamma - 1)
// e^-l l.
template <class V>
FASTLOSS_HD Slope<V> focal_map(V l, lane_t<V> gamma) {
  const V zero{};
  l = l < zero ? zero : l;  // rounding, and probabilities that are none
  const V rest = exp_of(-l);
  const Slope<V> focus = focus_of(one_minus_exp(l, rest), gamma);
  return {focus.value * l, focus.value + focus.slope * (rest > zero ? rest * l : rest - rest)};
}

// Poly-1 (Leng et al., 2022): g(l) = l + epsilon (1 - e^-l), epsilon >= -1; g' = 1 + epsilon e^-l, which is
// u + (1 + epsilon) e^-l.
template <class V>
FASTLOSS_HD Slope<V> poly1_map(V l, lane_t<V> epsilon) {
  const lane_t<V> one = lane_t<V>(1);
  const V rest = exp_of(-l), u = one_minus_exp(l, rest);
  return {l + epsilon * u, epsilon < lane_t<V>(0) ? u + (one + epsilon) * rest : one + epsilon * rest};
}

// Generalized cross entropy (Zhang & Sabuncu, 2018): g(l) = (1 - e^-q l) / q, 0 < q <= 1; g' = e^-q l.
template <class V>
FASTLOSS_HD Slope<V> generalized_cross_entropy_map(V l, lane_t<V> q) {
  const V rest = exp_of(-q * l);
  return {one_minus_exp(q * l, rest) / q, rest};
}

// Token-scaled cross entropy: p l with p = e^-l, which is taken as a constant.
template <class V>
FASTLOSS_HD Slope<V> token_scaled_map(V l) {
  const V p = exp_of(-l);
  return {p > V{} ? p * l : p - p, p};
}

// g(l) of the map, whose parameters are a and b.
template <class V>
FASTLOSS_HD Slope<V> mapped_nll(RowMap map, V l, lane_t<V> a, lane_t<V> b) {
  (void)b;  // no map has two yet
  switch (map) {
    case RowMap::focal: return focal_map(l, a);
    case RowMap::poly1: return poly1_map(l, a);
    case RowMap::generalized_cross_entropy: return generalized_cross_entropy_map(l, a);
    case RowMap::token_scaled: return token_scaled_map(l);
    case RowMap::none:
    case RowMap::count: break;
  }
  return {l, V{} + lane_t<V>(1)};
}

// What the map makes of a row with m = mass and l / m = mean.
template <class V>
FASTLOSS_HD MappedRow<V> mapped_row(RowMap map, V mass, V mean, lane_t<V> a, lane_t<V> b) {
  const V zero{};
  const Slope<V> g = mapped_nll(map, mean, a, b);
  // Where the mean is infinite, g is bounded and the slope 0, or g is l and the level 0.
  const V endless = g.slope == zero ? g.value : zero * g.slope;
  const V level = mean - mean == zero ? g.value - mean * g.slope : endless;
  return {mass == zero ? zero : mass * g.value, mass == zero ? zero : g.slope, mass == zero ? zero : level};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
#endif
