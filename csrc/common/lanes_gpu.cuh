// What the formulas shared with the CPU (pointwise/losses, rowwise/row_maps.h) are written in, on the GPU, where a
// lane is a number; common/simd.h has the same for vectors. Include it before them.
#pragma once
#define FASTLOSS_ISA gpu
#include <math.h>

#include "primitives.cuh"

namespace fastloss {
namespace gpu {
template <class V>
using lane_t = V;
template <class V>
__host__ __device__ inline V exp_of(V x) {
  return exp(x);
}
template <class V>
__host__ __device__ inline V log_of(V x) {
  return log(x);
}
template <class V>
__host__ __device__ inline V log1p_of(V x) {
  return log1p(x);
}
template <class V>
__host__ __device__ inline V log1p_of_unit(V x) {
  return log1p(x);
}
template <class V>
__host__ __device__ inline V one_minus_exp(V x, V) {
  return -expm1(-x);
}
template <class V>
__host__ __device__ inline V full_exp_of(V x) {
  return exp(x);
}
template <class V>
__host__ __device__ inline V full_log_of(V x) {
  return log(x);
}
template <class V>
__host__ __device__ inline V full_log1p_of(V x) {
  return log1p(x);
}
template <class V>
__host__ __device__ inline V tanh_of(V x) {
  return tanh(x);
}
template <class V>
__host__ __device__ constexpr V rounded(V v) {  // kernels need not agree to the bit
  return v;
}
__device__ inline float inverse_of(float x) { return reciprocal_fast(x); }  // 1 ulp
__device__ inline double inverse_of(double x) { return 1 / x; }
}  // namespace gpu
}  // namespace fastloss
