// Cross entropy on the GPU, class stride 1. The threads of a row hold it in registers as 16-byte vectors:
//   warp rows   1 to 32 lanes per row, several rows per warp           up to 4 KiB per row
//   block rows  one block per row                                      up to 64 KiB
//   cluster     2 to 16 blocks per row, statistics through             up to 1 MiB, sm_90 and later
//               distributed shared memory
//   streaming   blocks (or clusters) walk along the row online and     any length
//               walk back for the gradient, so that the L2 serves
//               what was read last
// One read, one write; value and gradient of streaming rows two reads.
//
// Rows that start or end between two 16-byte boundaries: the aligned part (the body) is read as vectors, and the fewer
// than 16 bytes at either end, at most 14 elements, one per thread (the edge). So odd C costs one more load per thread.
#pragma once
#include "cross_entropy_kernel_parts.cuh"

namespace fastloss {

// Over the lanes of a group; every lane gets the result.
template <class A>
__device__ __forceinline__ void reduce_stats(PartStats<A>& s, int width, Wanted wanted) {
  rebase(s, group_max(s.max, width), wanted);
  s.others = group_sum(s.others, width);
  if (wanted.exp_dot) s.exp_dot = group_sum(s.exp_dot, width);
  if (wanted.dots) {
    s.dot = group_sum(s.dot, width);
    s.mass = group_sum(s.mass, width);
  }
}

template <class A>
__device__ __forceinline__ void reduce_best(Best<A>& b, int width) {
  for (int o = width >> 1; o > 0; o >>= 1) {
    A value = __shfl_xor_sync(kFullMask, b.value, o);
    int64_t at = __shfl_xor_sync(kFullMask, b.at, o);
    take_better(b, value, at);
  }
}

// Where row (o, i) of a tensor starts. Only the general kernels know rows on two axes.
template <bool kGeneral>
__device__ __forceinline__ int64_t row_offset(const Strides& s, int64_t o, int64_t i) {
  return kGeneral ? o * s.outer + i * s.inner : o * s.outer;
}

// How a row lies on the 16-byte grid.
struct RowSpan {
  int head, tail;  // elements before and after the body
  int64_t body;    // whole vectors
};
template <class T>
__device__ __forceinline__ RowSpan row_span(const T* x, int64_t classes) {
  constexpr int kL = kLanes16<T>;
  int64_t head = (-(reinterpret_cast<uintptr_t>(x) / sizeof(T))) & (kL - 1);
  if (head > classes) head = classes;
  const int64_t body = (classes - head) / kL;
  return {int(head), int(classes - head - body * kL), body};
}

template <class A>
struct RowShared {
  PartStats<A> warp[2][kWarp];
  PartStats<A> part[2];
  Best<A> best[2][kWarp], best_prob[2][kWarp];
  Best<A> part_best[2], part_best_prob[2];
  double scratch[kLossScratch];
  LossSums sums[kWarpRowThreads];  // of every thread that leads a row
};

// Statistics of `kN` vectors of a row: tile[j] is vector first + j * step, those from `count` on hold -inf. The
// target's exponential stays out of the sum. kKeep: exp(x - maximum of this thread) replaces x, 0 at the target.
template <class T, bool kGeneral, bool kKeep, int kN, class A, class index_t>
__device__ __forceinline__ void add_tile(const CrossEntropyParams<A>& p, PartStats<A>& s, Vec16 (&tile)[kN],
                                         index_t first, int step, index_t count, index_t column, int64_t prob_at,
                                         index_t target, Wanted wanted, Best<A>& best, Best<A> (&best_prob)[1]) {
  constexpr int kL = kLanes16<T>;
  A max = s.max;
  const index_t target_vector = target < column ? -1 : (target - column) / kL;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    if constexpr (!kGeneral) {
      if (first + j * step == target_vector) set_element<T>(tile[j], int((target - column) % kL), A(-INFINITY));
      max = max_of(max, max_of_vector<T>(tile[j]));
    } else {
      if (first + j * step >= count) continue;
      A z[kL];
      unpack<T>(tile[j], z);
      if (p.transform) {
#pragma unroll
        for (int i = 0; i < kL; ++i) z[i] = class_logit(p, z[i], column + (first + j * step) * kL + i == target);
      }
      if (p.want_best) {
#pragma unroll
        for (int i = 0; i < kL; ++i) take_better(best, z[i], column + (first + j * step) * kL + i);
      }
#pragma unroll
      for (int i = 0; i < kL; ++i) max = max_of(max, z[i]);
    }
  }
  rebase(s, max, wanted);
  const A ref = reference(max);
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    A z[kL], e[kL];
    unpack_again<T>(tile[j], p.zero, z);
    if constexpr (kGeneral) {
      if (first + j * step >= count) continue;
      if (p.transform) {
#pragma unroll
        for (int i = 0; i < kL; ++i) z[i] = class_logit(p, z[i], column + (first + j * step) * kL + i == target);
      }
    }
    A sum = A(0);
#pragma unroll
    for (int i = 0; i < kL; ++i) {
      z[i] -= ref;
      e[i] = exp_of(z[i]);
      if (kGeneral && column + (first + j * step) * kL + i == target) e[i] = A(0);
    }
#pragma unroll
    for (int i = 0; i < kL; i += 2) sum += e[i] + e[i + 1];
    s.others += sum;
    if (wanted.exp_dot) {
#pragma unroll
      for (int i = 0; i < kL; ++i) s.exp_dot += e[i] != A(0) ? e[i] * z[i] : A(0);
    }
    if (wanted.dots) {
      const int64_t c = column + (first + j * step) * kL;
      A q[kL];
      load_q(p, c, 1, prob_at + c * p.target_strides.cls, p.target_strides.cls, q, p.want_best, best_prob);
#pragma unroll
      for (int i = 0; i < kL; ++i) add_dot(p, s, q[i], z[i], c + i == target);
    }
    if constexpr (kKeep) tile[j] = pack<T>(e);
  }
}

// The same for one element, column c.
template <bool kGeneral, class A>
__device__ __forceinline__ void add_element(const CrossEntropyParams<A>& p, PartStats<A>& s, A x, int64_t c,
                                            int64_t prob_at, bool is_target, Wanted wanted, Best<A>& best,
                                            Best<A> (&best_prob)[1]) {
  if constexpr (kGeneral) {
    if (p.transform) x = class_logit(p, x, is_target);
    if (p.want_best) take_better(best, x, c);
  }
  rebase(s, max_of(s.max, x), wanted);
  const A d = x - reference(s.max);
  if (!is_target) {
    const A e = exp_of(d);
    s.others += e;
    if (wanted.exp_dot && e != A(0)) s.exp_dot += e * d;
  }
  if (wanted.dots) {
    A q[1];
    load_q(p, c, 1, prob_at + c * p.target_strides.cls, p.target_strides.cls, q, p.want_best, best_prob);
    add_dot(p, s, q[0], d, is_target);
  }
}

// Bounds the registers so that a row's vectors stay in them and enough rows are in flight.
constexpr int row_blocks_per_multiprocessor(bool general, bool warp_rows, bool resident, int vectors,
                                            size_t accum_bytes) {
  if (accum_bytes == 8 || (general && !resident)) return 1;
  const int blocks = general || vectors > 8 ? 2 : vectors == 8 || !resident ? 3 : 4;  // of 256 threads
  if (warp_rows) return warp_row_blocks(general, vectors);
  return kPairwiseMax ? blocks : blocks - 1;
}

template <class T, bool kGeneral, Pass kPass, bool kWarpRows, bool kResident, int kN>
__global__ void __launch_bounds__(kWarpRows ? kWarpRowThreads : kMaxRowThreads,
                                  row_blocks_per_multiprocessor(kGeneral, kWarpRows,
                                                                kResident || kPass == Pass::forward, kN,
                                                                sizeof(accum_t<T>)))
    cross_entropy_row_kernel(const CrossEntropyParams<accum_t<T>> p) {
  using A = accum_t<T>;
  constexpr int kL = kLanes16<T>;
  // With float logits the exponentials stay in the registers of the logits; 16 bits would not hold them.
  constexpr bool kKeep = kPass == Pass::forward_grad && std::is_same_v<T, float> && !kGeneral && kResident;
  using index_t = std::conditional_t<kGeneral || !kResident, int64_t, int>;  // vectors of a part, columns
  const Pass pass = kPass == Pass::any ? p.pass : kPass;
  auto& shared = *reinterpret_cast<RowShared<A>*>(shared_memory());
  const CallTotals<A> call = load_call<kGeneral>(p, pass);

  const int parts = kWarpRows ? 1 : p.parts;
  const int part = parts > 1 ? int(blockIdx.x % unsigned(parts)) : 0;
  const int width = kWarpRows ? p.lanes : int(blockDim.x);
  const int thread = kWarpRows ? int(threadIdx.x & unsigned(width - 1)) : int(threadIdx.x);
  const int lane = threadIdx.x % kWarp;
  const int in_warp = kWarpRows ? lane / width : 0;  // which of the warp's rows
  const bool leader_thread = part == 0 && thread == 0;
  const Wanted wanted{kGeneral && p.want_q && pass != Pass::backward, kGeneral && p.want_entropy};
  int64_t first_row = blockIdx.x / unsigned(parts), row_step = gridDim.x / unsigned(parts);
  if constexpr (kWarpRows) {
    first_row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x - lane) / width;
    row_step = int64_t(gridDim.x) * blockDim.x / width;
  }
  LossSums& sums = shared.sums[kWarpRows ? threadIdx.x : 0];  // in shared memory: registers are dear
  if (kWarpRows || threadIdx.x == 0) sums = {};
  // Two sets of partials, so that one barrier per row, of the block and of the cluster, is enough: who writes a set
  // anew has passed the barrier of the row between, to which the others came after they had read it.
  int flip = 0;

  // Rows on two axes are stepped along without a 64-bit division: the grid, unlike the rows, counts in 32 bits.
  int64_t inner_at = 0, outer_at = 0, inner_step = 0, outer_step = 0;
  if (kGeneral && p.inner > 1) {
    inner_at = first_row + in_warp;
    inner_step = row_step;
    if (p.inner <= UINT32_MAX) {
      const unsigned inner = unsigned(p.inner);
      outer_at = unsigned(inner_at) / inner;
      inner_at = unsigned(inner_at) % inner;
      outer_step = unsigned(inner_step) / inner;
      inner_step = unsigned(inner_step) % inner;
    }
  }
  auto step_axes = [&] {
    if (!kGeneral || p.inner == 1) return;
    outer_at += outer_step;
    inner_at += inner_step;
    if (inner_at >= p.inner) inner_at -= p.inner, ++outer_at;
  };

  for (int64_t base_row = first_row; base_row < p.rows; base_row += row_step, flip ^= 1, step_axes()) {
    const bool active = base_row + in_warp < p.rows;
    const int64_t row = active ? base_row + in_warp : 0;
    const int64_t o = !kGeneral || p.inner == 1 ? row : active ? outer_at : 0, i = active ? inner_at : 0;
    // Most rows are asked for before anything waits for their target; the longest leave no register to hold it.
    RowTarget<kGeneral> target{};
    const int64_t target_value = load_target_value<kGeneral>(p, row);
    if constexpr (kN > 8) target = classify_target<kGeneral>(p, target_value);
    const T* x = static_cast<const T*>(p.logits) + row_offset<kGeneral>(p.logits_strides, o, i);
    const int64_t prob_at = kGeneral ? row_offset<kGeneral>(p.target_strides, o, i) : 0;
    const RowSpan span = row_span(x, p.classes);
    const int64_t first = part * p.slice;  // of this part's vectors
    const int64_t left = span.body - first;
    const index_t count = !active || left < 0 ? 0 : index_t(left < p.slice ? left : p.slice);
    const index_t column = index_t(span.head + first * kL);
    const bool edge = active && part == 0 && thread < span.head + span.tail;
    const index_t edge_column = thread < span.head ? thread : index_t(p.classes) - span.tail + (thread - span.head);

    // 0, but neither the same in every turn of the loop nor the same for the gradient: see CrossEntropyParams::zero.
    const unsigned zero = p.zero & unsigned(base_row), gradient_zero = zero << 1;
    Vec16 tile[kN];
    auto load_tile = [&](index_t base) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const index_t v = base + j * width;
        if constexpr (kResident || kPass == Pass::forward)  // not to be read again
          tile[j] = v < count ? load16_stream(x + column + v * kL) : minus_infinity<T>();
        else
          tile[j] = v < count ? load16(x + column + v * kL) : minus_infinity<T>();
      }
    };
    if constexpr (kResident) load_tile(thread ^ zero);
    A edge_x = A(0);
    if (edge) edge_x = to_accum(x[edge_column]);
    if constexpr (kN <= 8) target = classify_target<kGeneral>(p, target_value);

    // ---- statistics
    PartStats<A> s = empty_stats<A>();
    Best<A> best = no_best<A>(), best_prob[1] = {no_best<A>()};
    A z_target = A(0), target_slope = A(1), own_max = A(0);
    if (active && target.index >= 0) z_target = to_accum(x[target.index]);
    if (kGeneral && p.transform) target_slope = transform_target(p, z_target);
    if (pass != Pass::backward) {
      const index_t t = index_t(target.index);
      if (edge) add_element<kGeneral>(p, s, edge_x, edge_column, prob_at, edge_column == t, wanted, best, best_prob);
      if constexpr (kResident) {
        add_tile<T, kGeneral, kKeep>(p, s, tile, index_t(thread), width, count, column, prob_at, t, wanted, best,
                                     best_prob);
      } else {
#pragma unroll 1
        for (index_t base = thread; base < count; base += kN * width) {
          load_tile(base);
          add_tile<T, kGeneral, false>(p, s, tile, base, width, count, column, prob_at, t, wanted, best, best_prob);
        }
      }
      own_max = s.max;

      const bool want_best = kGeneral && p.want_best;
      reduce_stats(s, kWarpRows ? width : kWarp, wanted);
      if (want_best) {
        reduce_best(best, kWarpRows ? width : kWarp);
        reduce_best(best_prob[0], kWarpRows ? width : kWarp);
      }
      if constexpr (kWarpRows) {
        warp_barrier();  // the picked logit has been read before the gradient may overwrite it
      } else {
        const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
        if (lane == 0) {
          shared.warp[flip][warp] = s;
          if (want_best) shared.best[flip][warp] = best, shared.best_prob[flip][warp] = best_prob[0];
        }
        block_barrier();
        s = lane < warps ? shared.warp[flip][lane] : empty_stats<A>();
        reduce_stats(s, kWarp, wanted);
        if (want_best) {
          best = lane < warps ? shared.best[flip][lane] : no_best<A>();
          best_prob[0] = lane < warps ? shared.best_prob[flip][lane] : no_best<A>();
          reduce_best(best, kWarp);
          reduce_best(best_prob[0], kWarp);
        }
        if (parts > 1) {  // a cluster
          if (threadIdx.x == 0) {
            shared.part[flip] = s;
            if (want_best) shared.part_best[flip] = best, shared.part_best_prob[flip] = best_prob[0];
          }
          cluster_arrive();
          cluster_wait();
          s = lane < parts ? *cluster_map(&shared.part[flip], lane) : empty_stats<A>();
          reduce_stats(s, kWarp, wanted);
          if (want_best) {
            best = lane < parts ? *cluster_map(&shared.part_best[flip], lane) : no_best<A>();
            best_prob[0] = lane < parts ? *cluster_map(&shared.part_best_prob[flip], lane) : no_best<A>();
            reduce_best(best, kWarp);
            reduce_best(best_prob[0], kWarp);
          }
        }
      }
    }
    if (pass == Pass::backward && p.in_place) {  // all have read the picked logit before anyone overwrites it
      if constexpr (kWarpRows) {
        warp_barrier();
      } else if (parts > 1) {
        cluster_arrive();
        cluster_wait();
      } else {
        block_barrier();
      }
    }
    const RowCoefficients<A> r = coefficients_of_row<kGeneral>(p, call, pass, row, target, s, z_target, best,
                                                               best_prob[0], active && leader_thread, &sums);
    if (pass == Pass::forward) continue;

    // ---- gradient
    T* grad = static_cast<T*>(p.grad) + row_offset<kGeneral>(p.grad_strides, o, i);
    const int64_t grad_stride = kGeneral ? p.grad_strides.cls : 1;
    const bool whole_vectors = !kGeneral || (grad_stride == 1 && aligned16(grad + span.head));
    const int64_t out_at = kGeneral ? row_offset<kGeneral>(p.grad_target_strides, o, i) : 0;
    // The picked class is owned by the thread that writes its vector: that thread writes the element once more.
    const index_t target_vector = (index_t(target.index) - column) / kL;
    const bool in_body = target.index >= column && target_vector < count;
    const bool owner =
        target.index >= 0 && ((edge && edge_column == target.index) ||
                              (in_body && unsigned(target_vector) % unsigned(width) == unsigned(thread)));
    // exp(x - own_max) of this thread, restated for the row; 0 when this thread saw nothing but -inf.
    const A kept_scale = kKeep ? r.softmax_scale * exp_of(own_max - r.ref) : A(0);

    auto store_tile = [&](index_t base) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const index_t v = base + j * width;
        if (v >= count) continue;
        const index_t c = column + v * kL;
        A values[kL], g[kL];
        const bool none[kL] = {};
        unpack<T>(kKeep ? tile[j] : recompute(tile[j], gradient_zero), values);
        if constexpr (kKeep) {
#pragma unroll
          for (int i = 0; i < kL; ++i) g[i] = values[i] * kept_scale;
        } else {
          gradient<kGeneral>(p, &r, 0, values, c, 1, prob_at + c * p.target_strides.cls, p.target_strides.cls,
                             out_at + c * p.grad_target_strides.cls, p.grad_target_strides.cls, kGeneral && p.want_q,
                             none, g);
        }
        if (kGeneral && !p.grad) continue;
        if (whole_vectors) {
          store16_stream(grad + c, pack<T>(g));
        } else {
#pragma unroll
          for (int i = 0; i < kL; ++i) grad[(c + i) * grad_stride] = from_accum<T>(g[i]);
        }
      }
    };
    if constexpr (kResident) {
      store_tile(thread ^ gradient_zero);
    } else if (count > thread) {  // backwards: what was read last is still in the L2
      const index_t chunk = index_t(kN) * width;
#pragma unroll 1
      for (index_t base = p.last_base + thread; base >= 0; base -= chunk) {
        load_tile(base);
        store_tile(base);
      }
    }
    if (edge) {
      A value[1] = {edge_x}, g[1];
      const bool none[1] = {};
      gradient<kGeneral>(p, &r, 0, value, edge_column, 1, prob_at + edge_column * p.target_strides.cls, int64_t(0),
                         out_at + edge_column * p.grad_target_strides.cls, int64_t(0), kGeneral && p.want_q, none, g);
      if (!kGeneral || p.grad) grad[edge_column * grad_stride] = from_accum<T>(g[0]);
    }
    if (owner && (!kGeneral || p.grad)) {
      A g = r.at_target;
      if (kGeneral && p.want_q) g -= r.q_scale * (p.weight ? p.weight[target.index] : A(1));
      if (kGeneral) g *= target_slope;
      grad[target.index * grad_stride] = from_accum<T>(g);
    }
  }
  if (pass == Pass::backward) return;
  if (!kWarpRows && parts > 1) {  // no block leaves before all have read its statistics
    cluster_arrive();
    cluster_wait();
  }
  if (part == 0) {
    const unsigned block = (blockIdx.x ^ p.zero) / unsigned(parts);
    finish_loss<kGeneral>(p, kWarpRows || threadIdx.x == 0 ? sums : LossSums{}, block, gridDim.x / unsigned(parts),
                          shared.scratch);
  }
}

}  // namespace fastloss
