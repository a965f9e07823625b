// Cross entropy on the GPU: planes, for classes at any stride.
#pragma once
#include "cross_entropy_kernel_parts.cuh"

namespace fastloss {

// The classes of N adjacent rows, -1 where there is none to use.
template <bool kGeneral, int N, class A, class index_t>
__device__ __forceinline__ void load_targets(const CrossEntropyParams<A>& p, int64_t row, bool valid,
                                             index_t (&target)[N]) {
  int64_t t[N];
#pragma unroll
  for (int i = 0; i < N; ++i) t[i] = -1;
  if (valid && !(kGeneral && p.soft)) load_indices(p.target, p.index_type, row, t);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int64_t local = t[i] - p.class_offset;
    target[i] = t[i] != p.ignore_index && t[i] >= 0 && local >= 0 && local < p.classes ? index_t(local) : -1;
  }
}

// Shared memory of a plane block: positions = rows that it works on at a time.
template <class A>
struct PlaneShared {
  double* scratch;   // [kLossScratch]
  int64_t* best_at;  // [2][groups][positions], where wanted
  A* best;           // the same
  A* result;         // [kRowCoefficients][positions], the fields of RowCoefficients
  A* stats;          // [2 or 5][groups][positions]: max, others, dot, mass, exp_dot

  static __host__ __device__ int bytes(int groups, int positions, bool sums, bool want_best) {
    const int each = groups * positions;
    int n = 8 * kLossScratch + int(sizeof(A)) * (kRowCoefficients * positions + (sums ? 5 : 2) * each);
    if (want_best) n += 2 * each * (8 + int(sizeof(A)));
    return n;
  }
  __device__ __forceinline__ PlaneShared(int groups, int positions, bool want_best) {
    const int each = want_best ? 2 * groups * positions : 0;
    scratch = reinterpret_cast<double*>(shared_memory());
    best_at = reinterpret_cast<int64_t*>(scratch + kLossScratch);
    best = reinterpret_cast<A*>(best_at + each);
    result = best + each;
    stats = result + kRowCoefficients * positions;
  }
};

// Of 256 threads; more registers would leave room for one. From sm_100 on two of them would spill.
constexpr int plane_blocks_per_multiprocessor(bool general, bool wide, size_t element_bytes) {
  return general && (wide || element_bytes == 8 || kWideParts > 1) ? 1 : 2;
}

template <class T, bool kGeneral, Pass kPass, bool kWide>
__global__ void __launch_bounds__(kMaxPlaneGroups* kWarp, plane_blocks_per_multiprocessor(kGeneral, kWide, sizeof(T)))
    cross_entropy_plane_kernel(const CrossEntropyParams<accum_t<T>> p) {
  using A = accum_t<T>;
  constexpr int kV = kWide ? 8 / int(sizeof(T)) : 1;  // rows per lane
  constexpr int kN = kPlaneClasses;
  constexpr int kPositions = kWarp * kV;
  using Slot = std::conditional_t<kWide, Vec8, T>;
  using index_t = std::conditional_t<kGeneral, int64_t, int>;
  const Pass pass = kPass == Pass::any ? p.pass : kPass;
  const Wanted wanted{kGeneral && p.want_q && pass != Pass::backward, kGeneral && p.want_entropy};
  const bool want_best = kGeneral && p.want_best && pass != Pass::backward;
  const int groups = p.groups, group = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const PlaneShared<A> shared(groups, kPositions, want_best);
  const CallTotals<A> call = load_call<kGeneral>(p, pass);
  const index_t classes = index_t(p.classes);
  const index_t chunk = kN * groups;
  const bool resident = classes <= chunk;
  // Planes are (o, which tile of the inner axis); stepping over the grid without a 64-bit division.
  const int64_t inner_tiles = (p.inner + kPositions - 1) / kPositions;
  int64_t o = blockIdx.x < inner_tiles ? 0 : blockIdx.x / unsigned(inner_tiles);
  int64_t inner_tile = blockIdx.x - o * inner_tiles;
  LossSums sums{};

  for (; o < p.outer; o += p.outer_step, inner_tile += p.inner_step) {
    if (inner_tile >= inner_tiles) {
      inner_tile -= inner_tiles;
      if (++o >= p.outer) break;
    }
    const int64_t i0 = inner_tile * kPositions, i = i0 + lane * kV;
    const bool valid = i < p.inner;  // wide: the inner axis is a multiple of kV
    const T* x = static_cast<const T*>(p.logits) + o * p.logits_strides.outer + i * p.logits_strides.inner;
    const int64_t prob_at = kGeneral ? o * p.target_strides.outer + i * p.target_strides.inner : 0;

    Slot tile[kN];
    auto load_tile = [&](index_t base) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const index_t c = base + group + j * groups;
        if constexpr (kWide)
          tile[j] = valid && c < classes ? load8_stream(x + c * p.logits_strides.cls) : minus_infinity<T, Vec8>();
        else
          tile[j] = valid && c < classes ? x[c * p.logits_strides.cls] : from_accum<T>(A(-INFINITY));
      }
    };
    auto values_of = [&](const Slot& slot, A(&z)[kV]) {
      if constexpr (kWide) {
        unpack<T>(slot, z);
      } else {
        z[0] = to_accum(slot);
      }
    };
    if (resident) load_tile(0);
    index_t target[kV];
    load_targets<kGeneral>(p, o * p.inner + i, valid, target);
    auto transform_all = [&](A(&z)[kV], index_t c) {
      if (kGeneral && p.transform) {
#pragma unroll
        for (int v = 0; v < kV; ++v) z[v] = class_logit(p, z[v], c == target[v]);
      }
    };

    // ---- statistics of this warp's classes, then of all
    if (pass != Pass::backward) {
      PartStats<A> s[kV];
      Best<A> best[kV], best_prob[kV];
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        s[v] = empty_stats<A>();
        best[v] = best_prob[v] = no_best<A>();
      }
      for (index_t base = 0; base < classes; base += chunk) {
        if (!resident) load_tile(base);
        A max[kV];
#pragma unroll
        for (int v = 0; v < kV; ++v) max[v] = s[v].max;
        if constexpr (!kGeneral && kWide) {
          Vec8 m = tile[0];
#pragma unroll
          for (int j = 1; j < kN; ++j) m = max_of_vectors<T>(m, tile[j]);
          A z[kV];
          unpack<T>(m, z);
#pragma unroll
          for (int v = 0; v < kV; ++v) max[v] = max_of(max[v], z[v]);
        } else {
#pragma unroll
          for (int j = 0; j < kN; ++j) {
            const index_t c = base + group + j * groups;
            if (kGeneral && !(valid && c < classes)) continue;
            A z[kV];
            values_of(tile[j], z);
            transform_all(z, c);
#pragma unroll
            for (int v = 0; v < kV; ++v) {
              max[v] = max_of(max[v], z[v]);
              if (want_best) take_better(best[v], z[v], int64_t(c));
            }
          }
        }
#pragma unroll
        for (int v = 0; v < kV; ++v) rebase(s[v], max[v], wanted);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const index_t c = base + group + j * groups;
          if (kGeneral && !(valid && c < classes)) continue;
          A z[kV];
          if constexpr (kWide)
            unpack_again<T>(tile[j], p.zero, z);
          else
            values_of(tile[j], z);
          transform_all(z, c);
#pragma unroll
          for (int v = 0; v < kV; ++v) {
            z[v] -= reference(max[v]);
            const A e = c == target[v] ? A(0) : exp_of(z[v]);
            s[v].others += e;
            if (wanted.exp_dot && e != A(0)) s[v].exp_dot += e * z[v];
          }
          if (wanted.dots) {
            A q[kV];
            load_q(p, c, 0, prob_at + c * p.target_strides.cls, p.target_strides.inner, q, want_best, best_prob);
#pragma unroll
            for (int v = 0; v < kV; ++v) add_dot(p, s[v], q[v], z[v], c == target[v]);
          }
        }
      }
      const int at = group * kPositions + lane * kV, each = groups * kPositions;
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        shared.stats[at + v] = s[v].max;
        shared.stats[each + at + v] = s[v].others;
        if (wanted.dots) {
          shared.stats[2 * each + at + v] = s[v].dot;
          shared.stats[3 * each + at + v] = s[v].mass;
        }
        if (wanted.exp_dot) shared.stats[4 * each + at + v] = s[v].exp_dot;
        if (want_best) {
          shared.best[at + v] = best[v].value;
          shared.best_at[at + v] = best[v].at;
          shared.best[each + at + v] = best_prob[v].value;
          shared.best_at[each + at + v] = best_prob[v].at;
        }
      }
    }
    block_barrier();  // the statistics are there; the previous plane's results have been read

    for (int position = threadIdx.x; position < kPositions; position += blockDim.x) {
      if (i0 + position >= p.inner) break;
      const int64_t row = o * p.inner + i0 + position;
      const RowTarget<kGeneral> target = classify_target<kGeneral>(p, load_target_value<kGeneral>(p, row));
      PartStats<A> s = empty_stats<A>();
      Best<A> best = no_best<A>(), best_prob = no_best<A>();
      A z_target = A(0);
      if (target.index >= 0)
        z_target = to_accum(
            static_cast<const T*>(p.logits)[o * p.logits_strides.outer + (i0 + position) * p.logits_strides.inner +
                                            target.index * p.logits_strides.cls]);
      if (kGeneral && p.transform) transform_target(p, z_target);
      if (pass != Pass::backward) {
        const int each = groups * kPositions;
        for (int g = 0; g < groups; ++g) s.max = max_of(s.max, shared.stats[g * kPositions + position]);
        for (int g = 0; g < groups; ++g) {
          const int at = g * kPositions + position;
          PartStats<A> part{shared.stats[at], shared.stats[each + at], A(0), A(0), A(0)};
          if (wanted.dots) part.dot = shared.stats[2 * each + at], part.mass = shared.stats[3 * each + at];
          if (wanted.exp_dot) part.exp_dot = shared.stats[4 * each + at];
          rebase(part, s.max, wanted);
          s.others += part.others;
          s.dot += part.dot;
          s.mass += part.mass;
          s.exp_dot += part.exp_dot;
          if (want_best) {
            take_better(best, shared.best[at], shared.best_at[at]);
            take_better(best_prob, shared.best[each + at], shared.best_at[each + at]);
          }
        }
      }
      const RowCoefficients<A> r = coefficients_of_row<kGeneral>(p, call, pass, row, target, s, z_target, best,
                                                                 best_prob, /*leader=*/true, &sums);
      if (pass != Pass::forward) {
        A* d = shared.result + position;
        d[0 * kPositions] = r.ref;
        d[1 * kPositions] = r.log_sum;
        d[2 * kPositions] = r.u;
        d[3 * kPositions] = r.softmax_scale;
        d[4 * kPositions] = r.q_scale;
        d[5 * kPositions] = r.at_target;
        if constexpr (kGeneral) d[6 * kPositions] = r.level;
      }
    }
    block_barrier();  // the results are there; the statistics have been read, and so have the picked logits

    // ---- gradient
    if constexpr (kPass != Pass::forward) {
      if (pass == Pass::forward || !valid) continue;
      RowCoefficients<A> r[kV];
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        const A* d = shared.result + lane * kV + v;
        r[v] = {d[0 * kPositions],
                d[1 * kPositions],
                d[2 * kPositions],
                d[3 * kPositions],
                d[4 * kPositions],
                d[5 * kPositions],
                kGeneral ? d[6 * kPositions] : A(0)};
      }
      T* grad = static_cast<T*>(p.grad) + o * p.grad_strides.outer + i * p.grad_strides.inner;
      const int64_t out_at = kGeneral ? o * p.grad_target_strides.outer + i * p.grad_target_strides.inner : 0;
      for (index_t base = index_t(p.last_base); base >= 0; base -= chunk) {  // what was read last first
        if (!resident) load_tile(base);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const index_t c = base + group + j * groups;
          if (c >= classes) continue;
          A values[kV], g[kV];
          bool is_target[kV];
#pragma unroll
          for (int v = 0; v < kV; ++v) is_target[v] = c == target[v];
          values_of(tile[j], values);
          gradient<kGeneral>(p, r, 1, values, c, 0, prob_at + c * p.target_strides.cls, p.target_strides.inner,
                             out_at + c * p.grad_target_strides.cls, p.grad_target_strides.inner, kGeneral && p.want_q,
                             is_target, g);
          if (kGeneral && !p.grad) continue;
          if constexpr (kWide)
            store8_stream(grad + c * p.grad_strides.cls, pack<T>(g));
          else
            grad[c * p.grad_strides.cls] = from_accum<T>(g[0]);
        }
      }
    }
  }
  if (pass == Pass::backward) return;
  finish_loss<kGeneral>(p, sums, blockIdx.x, gridDim.x, shared.scratch);
}

}  // namespace fastloss
