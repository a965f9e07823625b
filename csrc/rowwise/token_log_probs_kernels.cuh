// Gradient of log-probabilities and entropies on the GPU: see token_log_probs.h. The statistics of the rows are known,
// so every logit is read once and its gradient written once, and no thread waits for another.
//
// A row, or a slice of a long one, is shared by a thread where adjacent rows are adjacent in memory; by a warp where
// adjacent classes are and the row is short; by a block where it is long. So the threads of a warp read next to each
// other: 16 bytes each where logits and gradient are aligned alike, whatever the length of the rows.
#pragma once
#include <math.h>

#include "../common/convert.cuh"
#include "token_log_probs.h"

namespace fastloss {

constexpr int kTokenThreads = 256;  // of a block

struct TokenLogProbsParams {
  TokenLogProbsArgs a;
  int64_t rows;
  int64_t slices, slice;  // of a row, and the classes of one; slices 1: all
};

template <class A>
struct TokenTransform {
  A logit_scale, softcap, inv_softcap;  // softcap 0: none

  __device__ __forceinline__ explicit TokenTransform(const TokenLogProbsArgs& a)
      : logit_scale(A(a.logit_scale)), softcap(A(a.softcap)), inv_softcap(A(a.softcap > 0 ? 1 / a.softcap : 0)) {}
  __device__ __forceinline__ A operator()(A x) const {
    x *= logit_scale;
    return softcap > A(0) ? softcap * tanh(x * inv_softcap) : x;
  }
  // dz/dx from z
  __device__ __forceinline__ A slope(A z) const {
    const A u = softcap > A(0) ? z * inv_softcap : A(0);  // a logit of -inf has slope logit_scale
    return logit_scale * (A(1) - u * u);
  }
};

__device__ __forceinline__ float token_exp(float x) { return exp2_fast(x * 1.44269504088896341f); }
__device__ __forceinline__ double token_exp(double x) { return exp(x); }

// What the gradient of a row is made of; false where it is 0 whatever the logits are.
template <class T>
__device__ __forceinline__ bool token_row_of(const TokenLogProbsParams& p, const TokenTransform<accum_t<T>>& transform,
                                             int64_t row, const T* x, TokenRow<accum_t<T>>* r) {
  using A = accum_t<T>;
  const TokenLogProbsArgs& a = p.a;
  const int64_t given = load_index(a.index, a.index_type, row);
  const bool bad = given != a.ignore_index && (given < 0 || given >= a.classes);
  const bool counts = given != a.ignore_index && !bad;
  const A u = counts && a.grad_log_prob ? static_cast<const A*>(a.grad_log_prob)[row] : A(0);
  const A v = a.grad_entropy && !bad ? static_cast<const A*>(a.grad_entropy)[row] : A(0);
  if (u == A(0) && v == A(0)) return false;
  const A ref = static_cast<const A*>(a.saved)[row], others = static_cast<const A*>(a.saved)[p.rows + row];
  const A z_t = counts ? transform(to_accum(x[given * a.logits_strides.cls])) : A(-INFINITY);
  const A d_t = z_t - ref, e_t = token_exp(d_t);
  const A entropy = a.entropy ? static_cast<const A*>(a.entropy)[row] : A(0);
  *r = token_row<A>(counts ? given : -1, ref, others, d_t, e_t, log(others + e_t), entropy, u, v);
  r->at_index *= transform.slope(z_t);
  return true;
}

template <class A>
__device__ __forceinline__ A token_gradient(const TokenRow<A>& r, const TokenTransform<A>& transform, A x, int64_t c) {
  const A z = transform(x), d = z - r.ref, e = token_exp(d);
  const A g = e == A(0) ? r.constant - r.constant : e * (r.constant + r.by_distance * d) * transform.slope(z);
  return c == r.index ? r.at_index : g;
}

template <class T, int kThreads, bool kVectors>
__global__ void __launch_bounds__(kTokenThreads, sizeof(T) == 8 ? 2 : 4)
    token_log_probs_gradient_kernel(const TokenLogProbsParams p) {
  using A = accum_t<T>;
  constexpr int kLanes = kLanes16<T>;
  const TokenLogProbsArgs& a = p.a;
  const TokenTransform<A> transform(a);
  const int64_t items = p.rows * p.slices, step = int64_t(gridDim.x) * (blockDim.x / kThreads);
  const int thread = threadIdx.x % kThreads;
  for (int64_t item = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kThreads; item < items; item += step) {
    const int64_t row = item / p.slices, begin = item % p.slices * p.slice, rest = a.classes - begin;
    const int64_t end = begin + (rest > p.slice ? p.slice : rest);
    const int64_t outer = row / a.inner, inner = row % a.inner;
    const T* x = static_cast<const T*>(a.logits) + outer * a.logits_strides.outer + inner * a.logits_strides.inner;
    T* grad = static_cast<T*>(a.grad) + outer * a.grad_strides.outer + inner * a.grad_strides.inner;
    TokenRow<A> r{};
    const bool any = token_row_of<T>(p, transform, row, x, &r);
    auto one = [&](int64_t c) {
      const A g = any ? token_gradient<A>(r, transform, to_accum(x[c * a.logits_strides.cls]), c) : A(0);
      grad[c * a.grad_strides.cls] = from_accum<T>(g);
    };
    if constexpr (kVectors) {
      // To the next 16 bytes, whole vectors, and what is left: the same for logits and gradient.
      const int64_t to_vector =
          static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(x + begin) % 16) % 16 / sizeof(T));
      const int64_t first = begin + to_vector < end ? begin + to_vector : end;
      const int64_t last = first + (end - first) / kLanes * kLanes;
      for (int64_t c = begin + thread; c < first; c += kThreads) one(c);
      for (int64_t c = first + int64_t(thread) * kLanes; c < last; c += int64_t(kThreads) * kLanes) {
        A v[kLanes] = {};
        if (any) {
          unpack<T>(load16_stream(x + c), v);
#pragma unroll
          for (int i = 0; i < kLanes; ++i) v[i] = token_gradient<A>(r, transform, v[i], c + i);
        }
        store16_stream(grad + c, pack<T>(v));
      }
      for (int64_t c = last + thread; c < end; c += kThreads) one(c);
    } else {
      for (int64_t c = begin + thread; c < end; c += kThreads) one(c);
    }
  }
}

}  // namespace fastloss
