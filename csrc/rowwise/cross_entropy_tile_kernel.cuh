// Cross entropy on the GPU, class stride 1: tiles of short rows without gaps between them.
#pragma once
#include "cross_entropy_kernel_parts.cuh"

namespace fastloss {

constexpr int kTileScratchBytes = 8 * kLossScratch;  // of shared memory, before the warps' tiles

// A warp takes 32 / lanes rows at a time. Their memory is one piece: it comes into shared memory as 16-byte vectors,
// whatever the number of classes, `lanes` threads take a row from there into registers, and the gradient leaves the
// same way. One read, one write.
template <class T, Pass kPass>
__global__ void __launch_bounds__(kWarpRowThreads, kTileBlocks)
    cross_entropy_tile_kernel(const CrossEntropyParams<accum_t<T>> p) {
  using A = accum_t<T>;
  constexpr int kL = kLanes16<T>;
  constexpr int kN = kTileClasses;
  constexpr int kVectors = 4;  // loads of a thread in flight
  constexpr int kStep = 4;     // classes between two looks at whether there are more
  const CallTotals<A> call = load_call<false>(p, kPass);
  const int lanes = p.lanes, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int thread = lane & (lanes - 1), place = lane / lanes, tile_rows = kWarp / lanes, classes = int(p.classes);
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  T* tile = reinterpret_cast<T*>(shared_memory() + kTileScratchBytes) + warp * tile_rows * classes;
  T* own = tile + place * classes;
  LossSums sums{};

  const int64_t step = int64_t(gridDim.x) * warps * tile_rows;
  for (int64_t first = (int64_t(blockIdx.x) * warps + warp) * tile_rows; first < p.rows; first += step) {
    const int rows = int(p.rows - first < tile_rows ? p.rows - first : tile_rows);
    const int elements = rows * classes, vectors = elements / kL;
    const bool active = place < rows;
    const int64_t row = active ? first + place : first;
    const int64_t target_value = load_target_value<false>(p, row);
    const T* x = static_cast<const T*>(p.logits) + first * classes;
    for (int v = lane; v < vectors; v += kVectors * kWarp) {
      Vec16 held[kVectors];
#pragma unroll
      for (int j = 0; j < kVectors; ++j)
        if (v + j * kWarp < vectors) held[j] = load16_stream(x + (v + j * kWarp) * kL);
#pragma unroll
      for (int j = 0; j < kVectors; ++j)
        if (v + j * kWarp < vectors) store16(tile + (v + j * kWarp) * kL, held[j]);
    }
    if (vectors * kL + lane < elements) tile[vectors * kL + lane] = x[vectors * kL + lane];  // the very last bytes
    const RowTarget<false> target = classify_target<false>(p, target_value);
    warp_barrier();  // the tile is there

    const A z_target = active && target.index >= 0 ? to_accum(own[target.index]) : A(0);
    const bool owner = active && target.index >= 0 && (target.index & (lanes - 1)) == thread;
    PartStats<A> s = empty_stats<A>();
    A z[kN];
    if constexpr (kPass != Pass::backward) {
      warp_barrier();  // the picked logit has been read by all before it leaves the sum
      if (owner) own[target.index] = from_accum<T>(A(-INFINITY));
    }
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      if (k % kStep == 0 && k * lanes >= classes) break;  // spares the rest
      const int c = thread + k * lanes;
      z[k] = active && c < classes ? to_accum(own[c]) : A(-INFINITY);
      s.max = max_of(s.max, z[k]);
    }
    if constexpr (kPass != Pass::backward) {
      s.max = group_max(s.max, lanes);
      if (target.index >= 0) s.max = max_of(s.max, z_target);
      const A ref = reference(s.max);
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        if (k % kStep == 0 && k * lanes >= classes) break;  // where z ends
        z[k] = exp_of(z[k] - ref);
        s.others += z[k];
      }
      s.others = group_sum(s.others, lanes);
    }
    const RowCoefficients<A> r = coefficients_of_row<false>(p, call, kPass, row, target, s, z_target, no_best<A>(),
                                                            no_best<A>(), active && thread == 0, &sums);
    if constexpr (kPass != Pass::forward) {
      if constexpr (kPass == Pass::backward) warp_barrier();  // the picked logit has been read by all
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        if (k % kStep == 0 && k * lanes >= classes) break;  // spares the rest
        const int c = thread + k * lanes;
        const A e = kPass == Pass::backward ? exp_of(z[k] - r.ref) : z[k];
        if (active && c < classes) own[c] = from_accum<T>(e * r.softmax_scale);
      }
      if (owner) own[target.index] = from_accum<T>(r.at_target);
      warp_barrier();  // the gradient is there
      T* grad = static_cast<T*>(p.grad) + first * classes;
      for (int v = lane; v < vectors; v += kWarp) store16_stream(grad + v * kL, load16(tile + v * kL));
      if (vectors * kL + lane < elements) grad[vectors * kL + lane] = tile[vectors * kL + lane];
    }
    warp_barrier();  // the tile may be overwritten
  }
  if (kPass == Pass::backward) return;
  finish_loss<false>(p, sums, blockIdx.x, gridDim.x, scratch);
}

}  // namespace fastloss
