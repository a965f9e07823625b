// out[i] = grad[i] * scale. 1 read + 1 write, or nothing when scale is 1 and out is grad.
#pragma once
#include "convert.cuh"

namespace fastloss {

struct ScaleGradParams {
  const void* grad;  // [count]
  void* out;         // [count]
  int64_t count;
  const void* scale;  // [1]
  DType scale_type;
};

constexpr int kScaleThreads = 256, kScaleVectors = 4;

template <class T>
__global__ void __launch_bounds__(kScaleThreads) scale_grad_kernel(const ScaleGradParams p) {
  using A = accum_t<T>;
  constexpr int kL = kLanes16<T>;
  const A scale = load_as<A>(p.scale, p.scale_type, 0);
  if (scale == A(1) && p.out == p.grad) return;
  const bool finite = scale - scale == A(0);  // an infinite or nan scale leaves the zeros of ignored rows alone
  const T* grad = static_cast<const T*>(p.grad);
  T* out = static_cast<T*>(p.out);
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  const int64_t vectors = aligned16(grad) && aligned16(out) ? p.count / kL : 0;
  for (int64_t base = thread; base < vectors; base += kScaleVectors * threads) {
    Vec16 tile[kScaleVectors];  // several loads in flight
#pragma unroll
    for (int j = 0; j < kScaleVectors; ++j)
      if (base + j * threads < vectors) tile[j] = load16_stream(grad + (base + j * threads) * kL);
#pragma unroll
    for (int j = 0; j < kScaleVectors; ++j) {
      if (base + j * threads >= vectors) continue;
      A v[kL];
      unpack<T>(tile[j], v);
#pragma unroll
      for (int i = 0; i < kL; ++i) v[i] = finite || v[i] != A(0) ? v[i] * scale : v[i];
      store16_stream(out + (base + j * threads) * kL, pack<T>(v));
    }
  }
  for (int64_t i = vectors * kL + thread; i < p.count; i += threads) {
    const A v = to_accum(grad[i]);
    out[i] = from_accum<T>(finite || v != A(0) ? v * scale : v);
  }
}

}  // namespace fastloss
