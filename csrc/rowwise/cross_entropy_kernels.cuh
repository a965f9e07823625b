// Cross entropy on the GPU: the kernels. What is computed stands in cross_entropy.h, the row's mathematics in
// cross_entropy_math.h, who is launched when in cross_entropy_policy.h.
//
//   cross_entropy_totals_kernel   D, Dn, counted rows, sum of class weights: partial sums, O(rows + classes)
//   cross_entropy_row_kernel      class stride 1. The threads of a row hold it in registers as 16-byte vectors:
//       warp rows   1 to 32 lanes per row, several rows per warp       up to 4 KiB per row
//       block rows  one block per row                                  up to 64 KiB
//       cluster     2 to 16 blocks per row, statistics through         up to 1 MiB, sm_90 and later
//                   distributed shared memory
//       streaming   blocks (or clusters) walk along the row online and walk back for the gradient, so that the L2
//                   serves what was read last                          any length
//   cross_entropy_tile_kernel     class stride 1, no gaps between rows, up to 192 classes: 32, 16, 8 or 4 rows at a
//   time
//                                 through the shared memory of a warp
//   cross_entropy_column_kernel   (N, C, d1, ...), up to 24 classes: a thread has 4 bytes of every class in registers
//   cross_entropy_plane_kernel    everything else ((N, C, d1, ...), any strides): 32 lanes along the inner axis, the
//                                 warps of a block share the classes; in registers up to 160 classes,
//                                 else re-read
//
// Bytes moved: forward 1 read; value and gradient 1 read + 1 write (streaming: 2 reads); backward 1 read + 1 write.
//
// Rows that start or end between two 16-byte boundaries: the aligned part (the body) is read as vectors, and the fewer
// than 16 bytes at either end, at most 14 elements, one per thread (the edge). So odd C costs one more load per thread.
#pragma once
#include <math.h>

#include "../common/convert.cuh"
#include "../common/errors_cuda.cuh"
#include "cross_entropy.h"
#include "cross_entropy_math.h"
#include "cross_entropy_policy.h"

namespace fastloss {

template <class A>
struct CrossEntropyParams {
  // as in CrossEntropyArgs, after the axes have been merged
  const void* logits;
  void* grad;
  const void* target;
  void* grad_target;
  const A* weight;
  const A* sample_weight;
  const void* grad_output;
  void* loss;
  A* saved;
  A* lse;
  int64_t* argmax;
  float* accuracy;
  Strides logits_strides, grad_strides, target_strides, grad_target_strides;
  int64_t outer, classes, inner, rows;
  int64_t ignore_index;
  RowConstants<A> k;  // weight_sum is set on the device when there are class weights
  DType loss_type, prob_type;
  IndexType index_type;
  Reduction reduction;
  Pass pass;
  bool soft, smooth, transform, zero_times_inf, all_ignored_zero, grad_output_per_row;
  bool in_place;   // backward: grad is the logits
  bool want_q;     // every class has a weight in the loss: soft or smooth
  bool want_best;  // argmax or accuracy
  // of the launch
  double* totals;     // [4][kMaxTotals]: partial sums of D, Dn, counted rows, class weights; null: not needed
  int totals_count;   // of them
  double* partials;   // [3][grid]: sums of s nll, s z_loss lse^2, correct rows; null: no scalar result
  unsigned* counter;  // blocks that have written their partials
  BadTargetRecord* record;
  int lanes;                       // warp rows, tiles: threads per row
  int parts;                       // block rows: blocks per row
  int64_t slice;                   // vectors per part
  int groups;                      // plane: warps per block
  int64_t outer_step, inner_step;  // plane: the grid, in units of outer steps and inner tiles
  // plane: first class of the last chunk that a block holds at once, or negative; streaming: the same of its vectors
  int64_t last_base;
  // 0, which the compiler cannot know: what is combined with it is computed again for the gradient rather than kept in
  // registers beside the row.
  unsigned zero;
};

// ------------------------------------------------------------------------------------------------ row mathematics

__device__ __forceinline__ float exp_of(float x) { return exp2_fast(x * 1.44269504088896341f); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
// 1 / x to 1 ulp; inf for 0 and float subnormals
__device__ __forceinline__ float reciprocal_of(float x) { return reciprocal_fast(x); }
__device__ __forceinline__ double reciprocal_of(double x) { return 1 / x; }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_of(double x) { return log1p(x); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }

// What the exponents of a row with this maximum are relative to: never -inf, so that (-inf) - (-inf) does not arise.
template <class A>
__device__ __forceinline__ A reference(A max) {
  return max == A(-INFINITY) ? A(0) : max;
}

template <class A>
__device__ __forceinline__ A transform(const RowConstants<A>& k, A x) {
  x *= k.logit_scale;
  return k.softcap > A(0) ? k.softcap * tanh_of(x * k.inv_softcap) : x;
}
// dz/dx from z
template <class A>
__device__ __forceinline__ A transform_slope(const RowConstants<A>& k, A z) {
  A u = z * k.inv_softcap;  // 0 without a cap
  return k.logit_scale * (A(1) - u * u);
}

// Statistics of a part of a row, without the target's own exponential; sums are relative to reference(max).
template <class A>
struct PartStats {
  A max, others, dot, mass;
};
template <class A>
__device__ __forceinline__ PartStats<A> empty_stats() {
  return {A(-INFINITY), A(0), A(0), A(0)};
}

// Statistics so far, restated for the larger maximum `max`.
template <class A>
__device__ __forceinline__ void rebase(PartStats<A>& s, A max, bool dots) {
  const A ref = reference(max);
  s.others *= exp_of(s.max - ref);
  if (dots) s.dot += s.mass * (reference(s.max) - ref);
  s.max = max;
}

// Over the lanes of a group; every lane gets the result.
template <class A>
__device__ __forceinline__ void reduce_stats(PartStats<A>& s, int width, bool dots) {
  rebase(s, group_max(s.max, width), dots);
  s.others = group_sum(s.others, width);
  if (dots) {
    s.dot = group_sum(s.dot, width);
    s.mass = group_sum(s.mass, width);
  }
}

// The first largest element; a nan is larger than any number.
template <class A>
struct Best {
  A value;
  int64_t at;
};
template <class A>
__device__ __forceinline__ Best<A> no_best() {
  return {A(-INFINITY), INT64_MAX};
}
template <class A>
__device__ __forceinline__ void take_better(Best<A>& a, A value, int64_t at) {
  const bool nan_a = a.value != a.value, nan_b = value != value;
  const bool greater = nan_b ? !nan_a : value > a.value;
  const bool equal = nan_b ? nan_a : value == a.value;
  if (greater || (equal && at < a.at)) a = {value, at};
}
template <class A>
__device__ __forceinline__ void reduce_best(Best<A>& b, int width) {
  for (int o = width >> 1; o > 0; o >>= 1) {
    A value = __shfl_xor_sync(kFullMask, b.value, o);
    int64_t at = __shfl_xor_sync(kFullMask, b.at, o);
    take_better(b, value, at);
  }
}

// q of N elements (see RowStats): classes c, c + class_step, ..., probabilities at prob_at, prob_at + prob_stride, ...
// With `search` they take part in the search for the largest probability, of a row (M = 1) or of N rows.
template <int N, int M, class A>
__device__ __forceinline__ void load_q(const CrossEntropyParams<A>& p, int64_t c, int class_step, int64_t prob_at,
                                       int64_t prob_stride, A (&q)[N], bool search, Best<A> (&best)[M]) {
  if (p.weight && class_step == 1) {
    load_run_of(p.weight + c, int64_t(1), q);
  } else {
    const A w = p.weight ? p.weight[c] : A(1);
#pragma unroll
    for (int i = 0; i < N; ++i) q[i] = w;
  }
  if (!p.soft) return;
  A prob[N];
  load_run(p.target, p.prob_type, prob_at, prob_stride, prob);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (search) take_better(best[M == 1 ? 0 : i], prob[i], c + i * class_step);
    q[i] *= prob[i] * (A(1) - p.k.smoothing) + p.k.smooth_share;
  }
}

template <class A>
__device__ __forceinline__ A product(A q, A d, bool zero_times_inf) {
  return zero_times_inf && q == A(0) ? A(0) : q * d;
}

// ------------------------------------------------------------------------------------------- what a row comes with

template <bool kGeneral>
struct RowTarget {
  std::conditional_t<kGeneral, int64_t, int> index;  // the class, where it may be used as an index; else -1
  bool counts;                                       // takes part in the loss
  bool bad;                                          // neither a class nor ignore_index
};
// In two steps, so that the loads of the row itself can go out before anything waits for the target.
template <bool kGeneral, class A>
__device__ __forceinline__ int64_t load_target_value(const CrossEntropyParams<A>& p, int64_t row) {
  return kGeneral && p.soft ? 0 : load_index(p.target, p.index_type, row);
}
template <bool kGeneral, class A>
__device__ __forceinline__ RowTarget<kGeneral> classify_target(const CrossEntropyParams<A>& p, int64_t t) {
  if (kGeneral && p.soft) return {-1, true, false};
  const bool ignored = t == p.ignore_index, is_class = t >= 0 && t < p.classes;
  RowTarget<kGeneral> target{-1, !ignored && is_class, !ignored && !is_class};
  if (target.counts) target.index = decltype(target.index)(t);
  return target;
}

// The classes of N adjacent rows, -1 where there is none to use.
template <bool kGeneral, int N, class A, class index_t>
__device__ __forceinline__ void load_targets(const CrossEntropyParams<A>& p, int64_t row, bool valid,
                                             index_t (&target)[N]) {
  int64_t t[N];
#pragma unroll
  for (int i = 0; i < N; ++i) t[i] = -1;
  if (valid && !(kGeneral && p.soft)) load_indices(p.target, p.index_type, row, t);
#pragma unroll
  for (int i = 0; i < N; ++i) target[i] = t[i] != p.ignore_index && t[i] >= 0 && t[i] < p.classes ? index_t(t[i]) : -1;
}

// D, Dn, the number of counted rows, the sum of the class weights.
enum class Total { weight, count, counted, class_weights };
// One of them, by a warp: every lane gets it.
template <class A>
__device__ __forceinline__ double load_total(const CrossEntropyParams<A>& p, Total which) {
  const double* partial = p.totals + int(which) * kMaxTotals;
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kMaxTotals / kWarp; ++i) {
    const int at = threadIdx.x % kWarp + i * kWarp;
    if (at < p.totals_count) sum += partial[at];
  }
  return group_sum(sum, kWarp);
}

// What the totals make of a call; by whole warps.
template <class A>
struct Call {
  A per_d, per_dn;  // 1 / D, 1 / Dn for mean, else 1
  A weight_sum;     // W
};
template <bool kGeneral, class A>
__device__ __forceinline__ Call<A> load_call(const CrossEntropyParams<A>& p, Pass pass) {
  Call<A> c{A(1), A(1), p.k.weight_sum};
  if (kGeneral && p.smooth && p.weight) c.weight_sum = A(load_total(p, Total::class_weights));
  if (p.reduction == Reduction::mean && pass == Pass::forward_grad) {
    c.per_d = reciprocal_of(A(load_total(p, Total::weight)));
    if (p.k.z_loss != A(0)) c.per_dn = reciprocal_of(A(load_total(p, Total::count)));
  }
  if (p.reduction == Reduction::mean && pass == Pass::backward) {
    const A* d = p.saved + (p.soft ? 3 : 2) * p.rows;
    c.per_d = reciprocal_of(d[0]);
    c.per_dn = reciprocal_of(d[1]);
  }
  return c;
}

struct LossSums {
  double nll, z, correct;
};

template <class A>
struct RowResult {
  A ref, log_sum;  // lse = ref + log_sum
  A u;             // weight of nll in what is differentiated
  // d loss / d z_c = softmax_scale exp(z_c - ref) - q_scale q_c; at the target at_target - q_scale q_t
  A softmax_scale, q_scale, at_target;
};

// All that is O(1) per row. `leader` writes and counts; the other threads of the row only want the coefficients.
template <bool kGeneral, class A>
__device__ __forceinline__ RowResult<A> finish_row(const CrossEntropyParams<A>& p, const Call<A>& call, Pass pass,
                                                   int64_t row, const RowTarget<kGeneral>& target, PartStats<A> s,
                                                   A z_target, Best<A> best, Best<A> best_prob, bool leader,
                                                   LossSums* sums) {
  RowConstants<A> k = p.k;
  k.weight_sum = call.weight_sum;
  if constexpr (!kGeneral) k.smoothing = k.smooth_share = A(0);
  const bool soft = kGeneral && p.soft;
  RowResult<A> r;
  if (pass == Pass::backward) {
    r.ref = p.saved[row];
    s.others = p.saved[p.rows + row];
    if (soft) s.mass = p.saved[2 * p.rows + row];
  } else {
    if (target.index >= 0) rebase(s, max_of(s.max, z_target), kGeneral && p.want_q);
    r.ref = reference(s.max);
    if (s.max == A(-INFINITY)) s.others += A(NAN);  // a row of nothing but -inf has no softmax
  }
  const A d_target = z_target - r.ref;
  const A e_target = target.index >= 0 ? exp_of(d_target) : A(0);
  const A sum = s.others + e_target, per_sum = reciprocal_of(sum);
  r.log_sum = log_of(sum);
  const A lse = r.ref + r.log_sum;
  const A w_t = p.weight && target.index >= 0 ? p.weight[target.index] : A(1);
  const A sample = p.sample_weight ? p.sample_weight[row] : A(1);

  RowGrad<A> grad{A(0), A(0), A(0)};
  r.u = A(0);
  if (target.counts && pass != Pass::forward) {
    A g = sample;
    if (pass == Pass::backward) g *= load_as<A>(p.grad_output, p.loss_type, p.grad_output_per_row ? row : 0);
    r.u = g * call.per_d;
    const A uz = k.z_loss != A(0) ? g * call.per_dn : A(0);
    grad = soft ? soft_row_grad(k, lse, s.mass, r.u, uz) : index_row_grad(k, lse, w_t, r.u, uz);
  }
  r.softmax_scale = (grad.target_scale + grad.rest_scale) * per_sum;  // nan in a nan row, whatever the scale
  r.q_scale = grad.q_scale;
  r.at_target = (grad.rest_scale * e_target - grad.target_scale * s.others) * per_sum;
  if (kGeneral && p.classes == 1 && k.z_loss == A(0)) {  // 0, without what rounding leaves of a difference; or nan
    r.softmax_scale *= A(0);
    r.q_scale *= A(0);
    r.at_target *= A(0);
  }
  if (pass == Pass::backward || !leader) return r;

  double nll = 0, z = 0;
  if (target.counts) {
    A n;
    if (soft) {
      n = soft_row_nll(r.log_sum, s.dot, s.mass);
    } else {
      const A ratio = s.others < e_target ? log1p_of(s.others * reciprocal_of(e_target)) : A(0);
      A nll_t = target_nll(s.others, e_target, r.log_sum, d_target, ratio);
      if (p.zero_times_inf && w_t == A(0)) nll_t = A(0);
      n = index_row_nll(k, nll_t, r.log_sum, s.dot, w_t);
    }
    nll = double(sample * n);
    if (k.z_loss != A(0)) z = double(sample * (k.z_loss * lse * lse));
  } else if (target.bad) {
    nll = double(NAN);
    record_bad_target(p.record, row, load_index(p.target, p.index_type, row));
  }
  sums->nll += nll;
  sums->z += z;
  if (p.reduction == Reduction::none && p.loss) store_as(p.loss, p.loss_type, row, A(nll + z));
  if (p.saved) {
    p.saved[row] = r.ref;
    p.saved[p.rows + row] = s.others;
    if (soft) p.saved[2 * p.rows + row] = s.mass;
  }
  if (p.lse) {  // comes with the statistics, so `best` knows of a nan; rows of -inf and with +inf have no finite sum
    const bool infinite = s.max - s.max != A(0) && best.value == best.value;
    p.lse[row] = infinite ? s.max : lse;
  }
  if (kGeneral && p.want_best) {
    if (p.argmax) p.argmax[row] = p.classes > 0 ? best.at : 0;
    if (target.counts && best.at == (soft ? best_prob.at : target.index)) sums->correct += 1;
  }
  return r;
}

// Sum of the blocks' partials in a fixed order, by the threads of a block: several loads in flight.
__device__ __forceinline__ double sum_partials(const double* partials, unsigned count) {
  constexpr int kN = 8;
  double sum = 0;
  for (unsigned i = threadIdx.x; i < count; i += kN * blockDim.x) {
    double v[kN];
#pragma unroll
    for (int j = 0; j < kN; ++j) v[j] = i + j * blockDim.x < count ? partials[i + j * blockDim.x] : 0;
#pragma unroll
    for (int j = 0; j < kN; ++j) sum += v[j];
  }
  return sum;
}

// The end of a forward kernel: partial sums of this block, one of `blocks` that come here; the last one to come adds
// them up in order and writes the scalars. Nothing has used the scratch before.
template <class A>
__device__ __forceinline__ void finish_loss(const CrossEntropyParams<A>& p, LossSums sums, unsigned block,
                                            unsigned blocks, double* scratch) {
  if (p.saved && block == 0) {
    const double weight = load_total(p, Total::weight), count = load_total(p, Total::count);
    if (threadIdx.x == 0) {
      A* d = p.saved + (p.soft ? 3 : 2) * p.rows;
      d[0] = A(weight);
      d[1] = A(count);
    }
  }
  if (!p.partials) return;
  const bool with_z = p.k.z_loss != A(0);
  sums.nll = block_sum(sums.nll, scratch);
  if (with_z) sums.z = block_sum(sums.z, scratch + kWarp);
  if (p.accuracy) sums.correct = block_sum(sums.correct, scratch + 2 * kWarp);
  unsigned* ticket = reinterpret_cast<unsigned*>(scratch + 3 * kWarp);
  if (threadIdx.x == 0) {
    p.partials[block] = sums.nll;
    if (with_z) p.partials[blocks + block] = sums.z;
    if (p.accuracy) p.partials[2 * blocks + block] = sums.correct;
    memory_fence();  // the partials before the ticket
    *ticket = atomicAdd(p.counter, 1u);
    if (*ticket == blocks - 1)
      memory_fence();  // the ticket before the partials of the others; the barrier passes it on
  }
  block_barrier();
  if (*ticket != blocks - 1) return;
  sums = {sum_partials(p.partials, blocks), 0, 0};
  if (with_z) sums.z = sum_partials(p.partials + blocks, blocks);
  if (p.accuracy) sums.correct = sum_partials(p.partials + 2 * blocks, blocks);
  // The ticket's barrier lies between the two uses of the scratch.
  sums.nll = block_sum(sums.nll, scratch);
  if (with_z) sums.z = block_sum(sums.z, scratch + kWarp);
  if (p.accuracy) sums.correct = block_sum(sums.correct, scratch + 2 * kWarp);
  if (threadIdx.x >= kWarp) return;
  const double weight = load_total(p, Total::weight), counted = load_total(p, Total::counted);
  const double count = with_z ? load_total(p, Total::count) : 0;
  if (threadIdx.x != 0) return;
  const bool nothing = p.all_ignored_zero && counted == 0;
  if (p.loss && p.reduction != Reduction::none) {
    double loss = sums.nll;
    if (p.reduction == Reduction::mean) {
      // No counted row but a bad one among them: nan, not 0.
      loss = nothing ? loss * 0 : weight == 0 ? double(NAN) : loss / weight;
      if (with_z) loss += nothing ? 0 : sums.z / count;
    } else {
      loss += sums.z;
    }
    store_as(p.loss, p.loss_type, 0, loss);
  }
  if (p.accuracy) *p.accuracy = nothing ? 0.f : float(sums.correct / counted);
}

// Where row (o, i) of a tensor starts. Only the general kernels know rows on two axes.
template <bool kGeneral>
__device__ __forceinline__ int64_t row_offset(const Strides& s, int64_t o, int64_t i) {
  return kGeneral ? o * s.outer + i * s.inner : o * s.outer;
}

// --------------------------------------------------------------------------------------------------- the totals

// One partial sum of D, Dn, counted rows and class weights per block, over a fixed share of the rows and classes.
// Also empties the counter of the kernel that follows.
template <class A>
__global__ void __launch_bounds__(256, 1) cross_entropy_totals_kernel(const CrossEntropyParams<A> p) {
  constexpr int kN = 8;  // rows per thread in flight
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const bool weighted = p.weight && !p.soft, sampled = p.sample_weight, classes = p.weight && p.smooth;
  double weight = 0, count = 0, counted = 0, class_weights = 0;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
  if (p.pass != Pass::backward) {
    for (int64_t base = first; base < p.rows; base += kN * step) {
      int64_t t[kN];
      if (!p.soft && p.index_type == IndexType::i64) {  // the usual one by itself, so that the loads go out together
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const int64_t row = base + j * step;
          t[j] = row < p.rows ? static_cast<const int64_t*>(p.target)[row] : p.ignore_index;
        }
      } else {
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const int64_t row = base + j * step;
          t[j] = row < p.rows ? load_target_value<true>(p, row) : p.ignore_index;
        }
      }
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int64_t row = base + j * step;
        const RowTarget<true> target = classify_target<true>(p, t[j]);
        if (row >= p.rows || !target.counts) continue;
        const double s = sampled ? double(p.sample_weight[row]) : 1.0;
        if (sampled) count += s;
        if (weighted) weight += s * double(p.weight[target.index]);
        counted += 1;
      }
    }
  }
  if (classes)
    for (int64_t c = first; c < p.classes; c += step) class_weights += double(p.weight[c]);
  counted = block_sum(counted, scratch);
  count = sampled ? block_sum(count, scratch + kWarp) : counted;
  weight = weighted ? block_sum(weight, scratch + 2 * kWarp) : count;
  if (classes) class_weights = block_sum(class_weights, scratch + 3 * kWarp);
  if (threadIdx.x == 0) {
    double* d = p.totals + blockIdx.x;
    d[int(Total::weight) * kMaxTotals] = weight;
    d[int(Total::count) * kMaxTotals] = count;
    d[int(Total::counted) * kMaxTotals] = counted;
    d[int(Total::class_weights) * kMaxTotals] = class_weights;
    if (blockIdx.x == 0 && p.counter) *p.counter = 0;
  }
}

// ------------------------------------------------------------------------------------------- rows, class stride 1

// See CrossEntropyParams::zero.
__device__ __forceinline__ Vec16 recompute(const Vec16& v, unsigned zero) {
  return {{v.word[0] ^ zero, v.word[1] ^ zero, v.word[2] ^ zero, v.word[3] ^ zero}};
}
// The second unpacking of a vector whose maximum was taken before: without an instruction for packed maxima that took
// an unpacking of its own, not to be kept either (added, so that the compiler tells it from the one above).
template <class T, class V>
__device__ __forceinline__ void unpack_again(V v, unsigned zero, accum_t<T> (&out)[sizeof(V) / sizeof(T)]) {
  if constexpr (sizeof(T) == 2 && !kPairwiseMax) {
#pragma unroll
    for (int i = 0; i < int(sizeof(V) / 4); ++i) v.word[i] += zero;
  }
  unpack<T>(v, out);
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
  double scratch[3 * kWarp + 1];
  LossSums sums[kWarpRowThreads];  // of every thread that leads a row
};

// Statistics of `kN` vectors of a row: tile[j] is vector first + j * step, those from `count` on hold -inf. The
// target's exponential stays out of the sum. kKeep: exp(x - maximum of this thread) replaces x, 0 at the target.
template <class T, bool kGeneral, bool kKeep, int kN, class A, class index_t>
__device__ __forceinline__ void add_tile(const CrossEntropyParams<A>& p, PartStats<A>& s, Vec16 (&tile)[kN],
                                         index_t first, int step, index_t count, index_t column, int64_t prob_at,
                                         index_t target, bool dots, Best<A>& best, Best<A> (&best_prob)[1]) {
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
        for (int i = 0; i < kL; ++i) z[i] = transform(p.k, z[i]);
      }
      if (p.want_best) {
#pragma unroll
        for (int i = 0; i < kL; ++i) take_better(best, z[i], column + (first + j * step) * kL + i);
      }
#pragma unroll
      for (int i = 0; i < kL; ++i) max = max_of(max, z[i]);
    }
  }
  rebase(s, max, dots);
  const A ref = reference(max);
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    A z[kL], e[kL];
    unpack_again<T>(tile[j], p.zero, z);
    if constexpr (kGeneral) {
      if (first + j * step >= count) continue;
      if (p.transform) {
#pragma unroll
        for (int i = 0; i < kL; ++i) z[i] = transform(p.k, z[i]);
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
    if (dots) {
      const int64_t c = column + (first + j * step) * kL;
      A q[kL];
      load_q(p, c, 1, prob_at + c * p.target_strides.cls, p.target_strides.cls, q, p.want_best, best_prob);
#pragma unroll
      for (int i = 0; i < kL; ++i) {
        s.dot += product(q[i], z[i], p.zero_times_inf);
        s.mass += q[i];
      }
    }
    if constexpr (kKeep) tile[j] = pack<T>(e);
  }
}

// The same for one element, column c.
template <bool kGeneral, class A>
__device__ __forceinline__ void add_element(const CrossEntropyParams<A>& p, PartStats<A>& s, A x, int64_t c,
                                            int64_t prob_at, bool is_target, bool dots, Best<A>& best,
                                            Best<A> (&best_prob)[1]) {
  if constexpr (kGeneral) {
    if (p.transform) x = transform(p.k, x);
    if (p.want_best) take_better(best, x, c);
  }
  rebase(s, max_of(s.max, x), dots);
  const A d = x - reference(s.max);
  if (!is_target) s.others += exp_of(d);
  if (dots) {
    A q[1];
    load_q(p, c, 1, prob_at + c * p.target_strides.cls, p.target_strides.cls, q, p.want_best, best_prob);
    s.dot += product(q[0], d, p.zero_times_inf);
    s.mass += q[0];
  }
}

// d loss / d x of N elements; arguments as in load_q. is_target[i]: row i's target is this class. Also writes the
// gradient of a probability target, at out_at, out_at + out_stride, ...
template <bool kGeneral, int N, class A>
__device__ __forceinline__ void gradient(const CrossEntropyParams<A>& p, const RowResult<A>* r, int row_step,
                                         const A (&x)[N], int64_t c, int class_step, int64_t prob_at,
                                         int64_t prob_stride, int64_t out_at, int64_t out_stride, bool want_q,
                                         const bool (&is_target)[N], A (&g)[N]) {
  A z[N], slope[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    z[i] = x[i];
    slope[i] = A(1);
    if constexpr (kGeneral) {
      if (p.transform) {
        z[i] = transform(p.k, x[i]);
        slope[i] = transform_slope(p.k, z[i]);
      }
    }
    const RowResult<A>& row = r[i * row_step];
    z[i] -= row.ref;
    g[i] = is_target[i] ? row.at_target : exp_of(z[i]) * row.softmax_scale;
  }
  if (want_q) {
    A q[N];
    Best<A> none[1];
    load_q(p, c, class_step, prob_at, prob_stride, q, false, none);
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] -= r[i * row_step].q_scale * q[i];
  }
  if constexpr (kGeneral) {
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] *= slope[i];
    if (p.pass == Pass::backward && p.grad_target) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const RowResult<A>& row = r[i * row_step];
        const A w = p.weight ? p.weight[c + i * class_step] : A(1);
        store_as(p.grad_target, p.prob_type, out_at + i * out_stride,
                 row.u * (A(1) - p.k.smoothing) * w * (row.log_sum - z[i]));
      }
    }
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
  const Call<A> call = load_call<kGeneral>(p, pass);

  const int parts = kWarpRows ? 1 : p.parts;
  const int part = parts > 1 ? int(blockIdx.x % unsigned(parts)) : 0;
  const int width = kWarpRows ? p.lanes : int(blockDim.x);
  const int thread = kWarpRows ? int(threadIdx.x & unsigned(width - 1)) : int(threadIdx.x);
  const int lane = threadIdx.x % kWarp;
  const int in_warp = kWarpRows ? lane / width : 0;  // which of the warp's rows
  const bool leader_thread = part == 0 && thread == 0;
  const bool dots = kGeneral && p.want_q && pass != Pass::backward;
  int64_t first_row = blockIdx.x / unsigned(parts), row_step = gridDim.x / unsigned(parts);
  if constexpr (kWarpRows) {
    first_row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x - lane) / width;
    row_step = int64_t(gridDim.x) * blockDim.x / width;
  }
  LossSums& sums = shared.sums[kWarpRows ? threadIdx.x : 0];  // in shared memory: registers are dear
  if (kWarpRows || threadIdx.x == 0) sums = {0, 0, 0};
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
    A z_target = A(0), own_max = A(0);
    if (active && target.index >= 0) z_target = to_accum(x[target.index]);
    if (kGeneral && p.transform) z_target = transform(p.k, z_target);
    if (pass != Pass::backward) {
      const index_t t = index_t(target.index);
      if (edge) add_element<kGeneral>(p, s, edge_x, edge_column, prob_at, edge_column == t, dots, best, best_prob);
      if constexpr (kResident) {
        add_tile<T, kGeneral, kKeep>(p, s, tile, index_t(thread), width, count, column, prob_at, t, dots, best,
                                     best_prob);
      } else {
#pragma unroll 1
        for (index_t base = thread; base < count; base += kN * width) {
          load_tile(base);
          add_tile<T, kGeneral, false>(p, s, tile, base, width, count, column, prob_at, t, dots, best, best_prob);
        }
      }
      own_max = s.max;

      const bool want_best = kGeneral && p.want_best;
      reduce_stats(s, kWarpRows ? width : kWarp, dots);
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
        reduce_stats(s, kWarp, dots);
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
          reduce_stats(s, kWarp, dots);
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
    const RowResult<A> r = finish_row<kGeneral>(p, call, pass, row, target, s, z_target, best, best_prob[0],
                                                active && leader_thread, &sums);
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
      if (kGeneral && p.transform) g *= transform_slope(p.k, z_target);
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
    finish_loss(p, kWarpRows || threadIdx.x == 0 ? sums : LossSums{0, 0, 0}, block, gridDim.x / unsigned(parts),
                shared.scratch);
  }
}

// ------------------------------------------------------------------------------ tiles of short rows without gaps

constexpr int kTileScratchBytes = 8 * (3 * kWarp + 2);  // of shared memory, before the warps' tiles

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
  const Call<A> call = load_call<false>(p, kPass);
  const int lanes = p.lanes, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int thread = lane & (lanes - 1), place = lane / lanes, tile_rows = kWarp / lanes, classes = int(p.classes);
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  T* tile = reinterpret_cast<T*>(shared_memory() + kTileScratchBytes) + warp * tile_rows * classes;
  T* own = tile + place * classes;
  LossSums sums{0, 0, 0};

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
    const RowResult<A> r = finish_row<false>(p, call, kPass, row, target, s, z_target, no_best<A>(), no_best<A>(),
                                             active && thread == 0, &sums);
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
  finish_loss(p, sums, blockIdx.x, gridDim.x, scratch);
}

// ---------------------------------------------------------------------- columns, few classes with the class axis far

// A thread takes 4 bytes of every class: one row of the inner axis, or two adjacent ones of a 16-bit type. A warp reads
// whole 128-byte lines, a row is in one thread's registers, nothing is shared and nothing waits. One read, one write.
template <class T, Pass kPass, int kN>
__global__ void __launch_bounds__(kColumnThreads, column_blocks(sizeof(T)))
    cross_entropy_column_kernel(const CrossEntropyParams<accum_t<T>> p) {
  using A = accum_t<T>;
  constexpr int kV = 4 / int(sizeof(T));
  const Call<A> call = load_call<false>(p, kPass);
  const int classes = int(p.classes);
  const unsigned across = unsigned(p.inner / kV), items = unsigned(p.rows / kV);  // the policy sees that they fit
  LossSums sums{0, 0, 0};

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
    RowResult<A> r[kV];
#pragma unroll
    for (int v = 0; v < kV; ++v)
      r[v] = finish_row<false>(p, call, kPass, row + v, target[v], s[v], z_target[v], no_best<A>(), no_best<A>(),
                               /*leader=*/true, &sums);
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
  finish_loss(p, sums, blockIdx.x, gridDim.x, reinterpret_cast<double*>(shared_memory()));
}

// -------------------------------------------------------------------------------- planes, classes at any stride

// Shared memory of a plane block: positions = rows that it works on at a time.
template <class A>
struct PlaneShared {
  double* scratch;   // [3 * 32 + 1]
  int64_t* best_at;  // [2][groups][positions], where wanted
  A* best;           // the same
  A* result;         // [6][positions], the fields of RowResult
  A* stats;          // [2 or 4][groups][positions]: max, others, dot, mass

  static __host__ __device__ int bytes(int groups, int positions, bool dots, bool want_best) {
    const int each = groups * positions;
    int n = 8 * (3 * kWarp + 2) + int(sizeof(A)) * (6 * positions + (dots ? 4 : 2) * each);
    if (want_best) n += 2 * each * (8 + int(sizeof(A)));
    return n;
  }
  __device__ __forceinline__ PlaneShared(int groups, int positions, bool want_best) {
    const int each = want_best ? 2 * groups * positions : 0;
    scratch = reinterpret_cast<double*>(shared_memory());
    best_at = reinterpret_cast<int64_t*>(scratch + 3 * kWarp + 2);
    best = reinterpret_cast<A*>(best_at + each);
    result = best + each;
    stats = result + 6 * positions;
  }
};

template <class T, bool kGeneral, Pass kPass, bool kWide>
__global__ void __launch_bounds__(kMaxPlaneGroups* kWarp, kGeneral ? 1 : 2)
    cross_entropy_plane_kernel(const CrossEntropyParams<accum_t<T>> p) {
  using A = accum_t<T>;
  constexpr int kV = kWide ? 8 / int(sizeof(T)) : 1;  // rows per lane
  constexpr int kN = kPlaneClasses;
  constexpr int kPositions = kWarp * kV;
  using Slot = std::conditional_t<kWide, Vec8, T>;
  using index_t = std::conditional_t<kGeneral, int64_t, int>;
  const Pass pass = kPass == Pass::any ? p.pass : kPass;
  const bool dots = kGeneral && p.want_q && pass != Pass::backward;
  const bool want_best = kGeneral && p.want_best && pass != Pass::backward;
  const int groups = p.groups, group = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const PlaneShared<A> shared(groups, kPositions, want_best);
  const Call<A> call = load_call<kGeneral>(p, pass);
  const index_t classes = index_t(p.classes);
  const index_t chunk = kN * groups;
  const bool resident = classes <= chunk;
  // Planes are (o, which tile of the inner axis); stepping over the grid without a 64-bit division.
  const int64_t inner_tiles = (p.inner + kPositions - 1) / kPositions;
  int64_t o = blockIdx.x < inner_tiles ? 0 : blockIdx.x / unsigned(inner_tiles);
  int64_t inner_tile = blockIdx.x - o * inner_tiles;
  LossSums sums{0, 0, 0};

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
    auto transform_all = [&](A(&z)[kV]) {
      if (kGeneral && p.transform) {
#pragma unroll
        for (int v = 0; v < kV; ++v) z[v] = transform(p.k, z[v]);
      }
    };
    if (resident) load_tile(0);
    index_t target[kV];
    load_targets<kGeneral>(p, o * p.inner + i, valid, target);

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
            transform_all(z);
#pragma unroll
            for (int v = 0; v < kV; ++v) {
              max[v] = max_of(max[v], z[v]);
              if (want_best) take_better(best[v], z[v], int64_t(c));
            }
          }
        }
#pragma unroll
        for (int v = 0; v < kV; ++v) rebase(s[v], max[v], dots);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          const index_t c = base + group + j * groups;
          if (kGeneral && !(valid && c < classes)) continue;
          A z[kV];
          if constexpr (kWide)
            unpack_again<T>(tile[j], p.zero, z);
          else
            values_of(tile[j], z);
          transform_all(z);
#pragma unroll
          for (int v = 0; v < kV; ++v) {
            z[v] -= reference(max[v]);
            const A e = exp_of(z[v]);
            s[v].others += c == target[v] ? A(0) : e;
          }
          if (dots) {
            A q[kV];
            load_q(p, c, 0, prob_at + c * p.target_strides.cls, p.target_strides.inner, q, want_best, best_prob);
#pragma unroll
            for (int v = 0; v < kV; ++v) {
              s[v].dot += product(q[v], z[v], p.zero_times_inf);
              s[v].mass += q[v];
            }
          }
        }
      }
      const int at = group * kPositions + lane * kV, each = groups * kPositions;
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        shared.stats[at + v] = s[v].max;
        shared.stats[each + at + v] = s[v].others;
        if (dots) {
          shared.stats[2 * each + at + v] = s[v].dot;
          shared.stats[3 * each + at + v] = s[v].mass;
        }
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
      if (kGeneral && p.transform) z_target = transform(p.k, z_target);
      if (pass != Pass::backward) {
        const int each = groups * kPositions;
        for (int g = 0; g < groups; ++g) s.max = max_of(s.max, shared.stats[g * kPositions + position]);
        for (int g = 0; g < groups; ++g) {
          const int at = g * kPositions + position;
          PartStats<A> part{shared.stats[at], shared.stats[each + at], A(0), A(0)};
          if (dots) part.dot = shared.stats[2 * each + at], part.mass = shared.stats[3 * each + at];
          rebase(part, s.max, dots);
          s.others += part.others;
          s.dot += part.dot;
          s.mass += part.mass;
          if (want_best) {
            take_better(best, shared.best[at], shared.best_at[at]);
            take_better(best_prob, shared.best[each + at], shared.best_at[each + at]);
          }
        }
      }
      const RowResult<A> r =
          finish_row<kGeneral>(p, call, pass, row, target, s, z_target, best, best_prob, /*leader=*/true, &sums);
      if (pass != Pass::forward) {
        A* d = shared.result + position;
        d[0 * kPositions] = r.ref;
        d[1 * kPositions] = r.log_sum;
        d[2 * kPositions] = r.u;
        d[3 * kPositions] = r.softmax_scale;
        d[4 * kPositions] = r.q_scale;
        d[5 * kPositions] = r.at_target;
      }
    }
    block_barrier();  // the results are there; the statistics have been read, and so have the picked logits

    // ---- gradient
    if constexpr (kPass != Pass::forward) {
      if (pass == Pass::forward || !valid) continue;
      RowResult<A> r[kV];
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        const A* d = shared.result + lane * kV + v;
        r[v] = {d[0 * kPositions], d[1 * kPositions], d[2 * kPositions],
                d[3 * kPositions], d[4 * kPositions], d[5 * kPositions]};
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
  finish_loss(p, sums, blockIdx.x, gridDim.x, shared.scratch);
}

}  // namespace fastloss
