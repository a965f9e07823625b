// Cross entropy on the GPU: columns, for few classes with the class axis far.
#pragma once
#include "cross_entropy_kernel_parts.cuh"

namespace fastloss {

// A thread takes 4 bytes of every class: one row of the inner axis, or two adjacent ones of a 16-bit type. A warp reads
// whole 128-byte lines, a row is in one thread's registers, nothing is shared and nothing waits. One read, one write.
template <class T, Pass kPass, int kN>
__global__ void __launch_bounds__(kColumnThreads, column_blocks(sizeof(T)))
    cross_entropy_column_kernel(const CrossEntropyParams<accum_t<T>> p) {
  using A = accum_t<T>;
  constexpr int kV = 4 / int(sizeof(T));
  const CallTotals<A> call = load_call<false>(p, kPass);
  const int classes = int(p.classes);
  const unsigned across = unsigned(p.inner / kV), items = unsigned(p.rows / kV);  // the policy sees that they fit
  LossSums sums{};

  for (unsigned item = blockIdx.x * blockDim.x + threadIdx.x; item < items; item += gridDim.x * blockDim.x) {
    const unsigned o = item / across, i = (item - o * across) * kV;
    const int64_t row = int64_t(item) * kV;
    const T* x = static_cast<const T*>(p.logits) + o * p.logits_strides.outer + i;
    A z[kN][kV];
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      if (c < classes) {
        load_word(x + c * p.logits_strides.cls, z[c]);
      } else {
#pragma unroll
        for (int v = 0; v < kV; ++v) z[c][v] = A(-INFINITY);
      }
    }
    int64_t target_value[kV];
    load_indices(p.target, p.index_type, row, target_value);
    RowTarget<false> target[kV];
    PartStats<A> s[kV];
    A z_target[kV];
#pragma unroll
    for (int v = 0; v < kV; ++v) {
      target[v] = classify_target<false>(p, target_value[v]);
      s[v] = empty_stats<A>();
      z_target[v] = A(0);
    }
    if constexpr (kPass == Pass::backward) {
#pragma unroll
      for (int v = 0; v < kV; ++v)  // read again: a choice among registers would become an array in memory
        if (target[v].index >= 0) z_target[v] = to_accum(x[target[v].index * p.logits_strides.cls + v]);
    } else {
#pragma unroll
      for (int c = 0; c < kN; ++c) {
#pragma unroll
        for (int v = 0; v < kV; ++v) s[v].max = max_of(s[v].max, z[c][v]);
      }
#pragma unroll
      for (int c = 0; c < kN; ++c) {
#pragma unroll
        for (int v = 0; v < kV; ++v) {
          const bool picked = c == target[v].index;
          z_target[v] = picked ? z[c][v] : z_target[v];
          z[c][v] = exp_of(z[c][v] - reference(s[v].max));
          s[v].others += picked ? A(0) : z[c][v];
        }
      }
    }
    RowCoefficients<A> r[kV];
#pragma unroll
    for (int v = 0; v < kV; ++v)
      r[v] = coefficients_of_row<false>(p, call, kPass, row + v, target[v], s[v], z_target[v], no_best<A>(),
                                        no_best<A>(), /*leader=*/true, &sums);
    if constexpr (kPass != Pass::forward) {
      T* grad = static_cast<T*>(p.grad) + o * p.grad_strides.outer + i;
#pragma unroll
      for (int c = 0; c < kN; ++c) {
        A g[kV];
#pragma unroll
        for (int v = 0; v < kV; ++v) {
          const A e = kPass == Pass::backward ? exp_of(z[c][v] - r[v].ref) : z[c][v];
          g[v] = c == (target[v].index ^ int(p.zero)) ? r[v].at_target : e * r[v].softmax_scale;
        }
        if (c < classes) store_word(grad + c * p.grad_strides.cls, g);
      }
    }
  }
  if (kPass == Pass::backward) return;
  finish_loss<false>(p, sums, blockIdx.x, gridDim.x, reinterpret_cast<double*>(shared_memory()));
}

}  // namespace fastloss
