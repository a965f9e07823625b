// What the CUDA kernels of cross entropy share: parameters, the statistics of a row and how parts of them are combined,
// targets, all that is O(1) per row (coefficients_of_row), the gradient of elements, and the sum over all rows
// (finish_loss).
#pragma once
#include "../common/convert.cuh"
#include "../common/errors_cuda.cuh"
#include "../common/lanes_gpu.cuh"
#include "cross_entropy.h"
#include "cross_entropy_math.h"
#include "cross_entropy_policy.h"
#include "row_maps.h"

namespace fastloss {

template <class A>
struct CrossEntropyParams {
  // as in CrossEntropyArgs, after the axes have been merged
  const void* logits;
  void* grad;
  const void* target;
  void* grad_target;
  const A* weight;  // of a shard: from its first class on
  const A* sample_weight;
  const double* normalizer;
  const void* grad_output;
  void* loss;
  A* saved;
  A* lse;
  A* entropy;
  A* stats;
  int64_t* argmax;
  float* accuracy;
  Strides logits_strides, grad_strides, target_strides, grad_target_strides;
  int64_t outer, classes, inner, rows;
  int64_t ignore_index;
  int64_t class_offset, all_classes;
  SavedFields fields;
  int best_at;  // stats: the number of Stat::best
  RowMap row_map;
  A map_params[2];
  Margin<A> margin;
  RowConstants<A> k;  // weight_sum is set on the device when there are class weights
  DType loss_type, prob_type;
  IndexType index_type;
  Reduction reduction;
  Pass pass;
  bool soft, smooth, transform, zero_times_inf, all_ignored_zero, grad_output_per_row;
  bool in_place;      // backward: grad is the logits
  bool want_q;        // every class has a weight in the loss: soft or smooth
  bool want_best;     // argmax or accuracy, or the like of a shard
  bool want_entropy;  // or exp_dot of a shard
  // of the launch
  double* totals;     // [4][kMaxTotals]: partial sums of D, Dn, counted rows, class weights; null: not needed
  int totals_count;   // of them
  double* partials;   // [4][grid]: LossSums of every block; null: no scalar result
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
  const A u = k.softcap > A(0) ? z * k.inv_softcap : A(0);  // without a cap z may be infinite
  return k.logit_scale * (A(1) - u * u);
}
// z of a class from its logit, for the statistics. The target's own with a margin is left out, as -inf:
// coefficients_of_row knows it.
template <class A>
__device__ __forceinline__ A class_logit(const CrossEntropyParams<A>& p, A x, bool is_target) {
  return p.margin.any && is_target ? A(-INFINITY) : transform(p.k, x);
}
// Makes z of the target's logit x, with its margin. Returns dz/dx.
template <class A>
__device__ __forceinline__ A transform_target(const CrossEntropyParams<A>& p, A& x) {
  A slope = A(1);
  if (p.margin.any) {
    slope = margin_slope(p.margin, x);
    x = with_margin(p.margin, x);
  }
  x = transform(p.k, x);
  return slope * transform_slope(p.k, x);
}

// Statistics of a part of a row, without the target's own exponential; sums are relative to reference(max).
template <class A>
struct PartStats {
  A max, others, dot, mass;
  A exp_dot;  // see Stat
};
template <class A>
__device__ __forceinline__ PartStats<A> empty_stats() {
  return {A(-INFINITY), A(0), A(0), A(0), A(0)};
}

// Which of them are wanted beside max and others.
struct Wanted {
  bool dots, exp_dot;
};

// Statistics so far, restated for the larger maximum `max`.
template <class A>
__device__ __forceinline__ void rebase(PartStats<A>& s, A max, Wanted wanted) {
  const A ref = reference(max);
  const A factor = exp_of(s.max - ref);
  if (wanted.exp_dot) s.exp_dot = factor * (s.exp_dot + (reference(s.max) - ref) * s.others);
  s.others *= factor;
  if (wanted.dots) s.dot += s.mass * (reference(s.max) - ref);
  s.max = max;
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
// Adds a class to dot and mass, but the target with a margin, see class_logit.
template <class A>
__device__ __forceinline__ void add_dot(const CrossEntropyParams<A>& p, PartStats<A>& s, A q, A d, bool is_target) {
  if (p.margin.any && is_target) return;
  s.dot += product(q, d, p.zero_times_inf);
  s.mass += q;
}

// ------------------------------------------------------------------------------------------- what a row comes with

template <bool kGeneral>
struct RowTarget {
  std::conditional_t<kGeneral, int64_t, int> index;  // the class, if it is one of the logits'; else -1
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
  const bool ignored = t == p.ignore_index, is_class = t >= 0 && t < p.all_classes;
  RowTarget<kGeneral> target{-1, !ignored && is_class, !ignored && !is_class};
  t -= p.class_offset;
  if (target.counts && t >= 0 && t < p.classes) target.index = decltype(target.index)(t);
  return target;
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

// 1 / D. With smoothing a row whose D is 0 has infinite coefficients of both signs.
template <bool kGeneral, class A>
__device__ __forceinline__ A per_denominator(const CrossEntropyParams<A>& p, A d) {
  return kGeneral && p.smooth && d == A(0) ? A(NAN) : reciprocal_of(d);
}

// What the totals make of a call; by whole warps.
template <class A>
struct CallTotals {
  A per_d, per_dn;  // 1 / D, 1 / Dn for mean, else 1
  A weight_sum;     // W
};
template <bool kGeneral, class A>
__device__ __forceinline__ CallTotals<A> load_call(const CrossEntropyParams<A>& p, Pass pass) {
  CallTotals<A> c{A(1), A(1), p.k.weight_sum};
  if (kGeneral && p.smooth && p.weight) c.weight_sum = A(load_total(p, Total::class_weights));
  if (p.reduction == Reduction::mean && pass == Pass::forward_grad) {
    c.per_d = per_denominator<kGeneral>(p, A(load_total(p, Total::weight)));
    if (p.k.z_loss != A(0)) c.per_dn = reciprocal_of(A(load_total(p, Total::count)));
  }
  if (p.reduction == Reduction::mean && pass == Pass::backward) {
    const A* d = p.saved + p.fields.count * p.rows;
    c.per_d = per_denominator<kGeneral>(p, d[0]);
    c.per_dn = reciprocal_of(d[1]);
  }
  return c;
}

template <class A>
struct RowCoefficients {
  A ref, log_sum;  // lse = ref + log_sum
  A u;             // weight of nll in what is differentiated, times the slope of a row map
  // d loss / d z_c = softmax_scale exp(z_c - ref) - q_scale q_c; at the target at_target - q_scale q_t
  A softmax_scale, q_scale, at_target;
  A level;  // of a row map, times the weight of nll
};
constexpr int kRowCoefficients = 7;

// The statistics of a row of a shard.
template <bool kGeneral, class A>
__device__ __forceinline__ void store_stats(const CrossEntropyParams<A>& p, int64_t row,
                                            const RowTarget<kGeneral>& target, const PartStats<A>& s, A z_target,
                                            Best<A> best) {
  A* at = p.stats + row;
  at[int(Stat::ref) * p.rows] = s.max;
  at[int(Stat::others) * p.rows] = s.others;
  at[int(Stat::target) * p.rows] = target.index >= 0 ? z_target : A(-INFINITY);
  if (kGeneral && p.want_q) {
    at[int(Stat::dot) * p.rows] = s.dot;
    at[int(Stat::mass) * p.rows] = s.mass;
  }
  if (kGeneral && p.want_best) {
    at[p.best_at * p.rows] = best.value;
    at[(p.best_at + 1) * p.rows] = A(p.class_offset + (p.classes > 0 ? best.at : 0));
    at[(p.best_at + 2) * p.rows] = s.exp_dot;
  }
  if (target.bad) record_bad_target(p.record, row, load_index(p.target, p.index_type, row));
}

// All that is O(1) per row. `leader` writes and counts; the other threads of the row only want the coefficients.
template <bool kGeneral, class A>
__device__ __forceinline__ RowCoefficients<A> coefficients_of_row(const CrossEntropyParams<A>& p,
                                                                  const CallTotals<A>& call, Pass pass, int64_t row,
                                                                  const RowTarget<kGeneral>& target, PartStats<A> s,
                                                                  A z_target, Best<A> best, Best<A> best_prob,
                                                                  bool leader, LossSums* sums) {
  RowConstants<A> k = p.k;
  k.weight_sum = call.weight_sum;
  if constexpr (!kGeneral) k.smoothing = k.smooth_share = A(0);
  const bool soft = kGeneral && p.soft;
  RowCoefficients<A> r;
  A slope = A(1);  // of the row map
  r.level = A(0);
  if (pass == Pass::backward) {
    r.ref = p.saved[row];
    s.others = p.saved[p.rows + row];
    if (p.fields.target >= 0) z_target = p.saved[p.fields.target * p.rows + row];
    if (soft) s.mass = p.saved[p.fields.mass * p.rows + row];
    if (kGeneral && p.fields.slope >= 0) slope = p.saved[p.fields.slope * p.rows + row];
    if (kGeneral && p.fields.level >= 0) r.level = p.saved[p.fields.level * p.rows + row];
  } else {
    if (target.index >= 0) rebase(s, max_of(s.max, z_target), {kGeneral && p.want_q, kGeneral && p.want_entropy});
    if (pass == Pass::forward && p.stats) {
      if (leader) store_stats<kGeneral>(p, row, target, s, z_target, best);
      return {};
    }
    r.ref = reference(s.max);
    if (s.max == A(-INFINITY)) s.others += A(NAN);  // a row of nothing but -inf has no softmax
  }
  const bool has_target = pass == Pass::backward ? target.counts && !soft : target.index >= 0;  // of a shard: anywhere
  const A d_target = z_target - r.ref;
  const A e_target = has_target ? exp_of(d_target) : A(0);
  const A sum = s.others + e_target, per_sum = reciprocal_of(sum);
  r.log_sum = log_of(sum);
  const A lse = r.ref + r.log_sum;
  A w_t = p.weight && target.index >= 0 ? p.weight[target.index] : A(1);
  if (p.weight && has_target && target.index < 0)
    w_t = p.weight[load_index(p.target, p.index_type, row) - p.class_offset];
  const A sample = p.sample_weight ? p.sample_weight[row] : A(1);
  if (kGeneral && p.margin.any && p.smooth && has_target)
    s.dot += product(p.weight ? w_t : A(1), d_target, p.zero_times_inf);  // see class_logit

  A mapped = A(0);  // nll by the row map
  if constexpr (kGeneral) {
    if (p.row_map != RowMap::none && pass != Pass::backward && target.counts) {
      A mass = w_t, mean;
      if (soft) {
        mass = s.mass;
        mean = spread_nll(mass, r.log_sum, s.dot) / mass;
      } else {
        const A ratio = s.others < e_target ? log1p_of(s.others * reciprocal_of(e_target)) : A(0);
        mean = target_nll(s.others, e_target, r.log_sum, d_target, ratio);
        if (p.smooth) {
          if (p.zero_times_inf && w_t == A(0)) mean = A(0);
          mean = index_row_nll(k, mean, w_t) + smooth_row_nll(k, r.log_sum, s.dot);
          mass = (A(1) - k.smoothing) * w_t + k.smooth_share * k.weight_sum;
          mean /= mass;
        }
      }
      const gpu::MappedRow<A> g = gpu::mapped_row(p.row_map, mass, mean, p.map_params[0], p.map_params[1]);
      mapped = g.nll;
      slope = g.slope;
      r.level = g.level;
    }
    if (p.saved && pass != Pass::backward && leader) {
      if (p.fields.slope >= 0) p.saved[p.fields.slope * p.rows + row] = slope;
      if (p.fields.level >= 0) p.saved[p.fields.level * p.rows + row] = r.level;
    }
  }

  RowGrad<A> grad{A(0), A(0), A(0)};
  r.u = A(0);
  if (target.counts && pass != Pass::forward) {
    A g = sample;
    if (pass == Pass::backward) g *= load_as<A>(p.grad_output, p.loss_type, p.grad_output_per_row ? row : 0);
    r.u = g * call.per_d;
    if (kGeneral) r.level *= r.u;
    if (kGeneral && p.row_map != RowMap::none) r.u *= slope;
    const A uz = k.z_loss != A(0) ? g * call.per_dn : A(0);
    grad = soft ? soft_row_grad(k, lse, s.mass, r.u, uz) : index_row_grad(k, lse, w_t, r.u, uz);
  } else if (kGeneral && p.smooth && pass != Pass::forward) {
    grad.rest_scale = A(0) * k.weight_sum;  // an ignored row has the nan of weights that are not finite
  }
  r.softmax_scale = (grad.target_scale + grad.rest_scale) * per_sum;  // nan in a nan row, whatever the scale
  r.q_scale = grad.q_scale;
  r.at_target = target_grad(grad, s.others, e_target, per_sum);
  if (kGeneral && p.all_classes == 1 && k.z_loss == A(0)) {  // 0, without what rounding leaves of a difference; or nan
    r.softmax_scale *= A(0);
    r.q_scale *= A(0);
    r.at_target *= A(0);
  }
  if (pass == Pass::backward || !leader) return r;

  double nll = 0, smooth = 0, z = 0;
  if (target.counts) {
    A n;
    if (kGeneral && p.row_map != RowMap::none) {
      n = mapped;
    } else if (soft) {
      n = spread_nll(s.mass, r.log_sum, s.dot);
    } else {
      const A ratio = s.others < e_target ? log1p_of(s.others * reciprocal_of(e_target)) : A(0);
      A nll_t = target_nll(s.others, e_target, r.log_sum, d_target, ratio);
      if (p.zero_times_inf && w_t == A(0)) nll_t = A(0);
      n = index_row_nll(k, nll_t, w_t);
      if (kGeneral && p.smooth) smooth = double(sample * smooth_row_nll(k, r.log_sum, s.dot));
    }
    nll = double(sample * n);
    if (k.z_loss != A(0)) z = double(sample * (k.z_loss * lse * lse));
  } else if (target.bad) {
    nll = double(NAN);
    record_bad_target(p.record, row, load_index(p.target, p.index_type, row));
  }
  // e / C sum_c ... over no classes is 0 inf, whether a row counts or not, as in torch.
  if (kGeneral && p.smooth && !soft && p.all_classes == 0) smooth = double(NAN);
  sums->nll += nll;
  if (kGeneral) sums->smooth += smooth;
  sums->z += z;
  if (p.reduction == Reduction::none && p.loss) store_as(p.loss, p.loss_type, row, A(nll + smooth + z));
  if (p.saved) {
    p.saved[row] = r.ref;
    p.saved[p.rows + row] = s.others;
    if (soft) p.saved[p.fields.mass * p.rows + row] = s.mass;
  }
  if (p.lse) {  // comes with the statistics, so `best` knows of a nan; rows of -inf and with +inf have no finite sum
    const bool infinite = s.max - s.max != A(0) && best.value == best.value;
    p.lse[row] = infinite ? s.max : lse;
  }
  if (kGeneral && p.entropy) {
    const A own = e_target > A(0) ? e_target * d_target : A(0);
    p.entropy[row] = r.log_sum - (s.exp_dot + own) * per_sum;
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

constexpr int kLossScratch = 4 * kWarp + 2;  // doubles

// The end of a forward kernel: partial sums of this block, one of `blocks` that come here; the last one to come adds
// them up in order and writes the scalars. Nothing has used the scratch before.
template <bool kGeneral, class A>
__device__ __forceinline__ void finish_loss(const CrossEntropyParams<A>& p, LossSums sums, unsigned block,
                                            unsigned blocks, double* scratch) {
  if (p.saved && block == 0) {
    const double weight = load_total(p, Total::weight), count = load_total(p, Total::count);
    if (threadIdx.x == 0) {
      A* d = p.saved + p.fields.count * p.rows;
      d[0] = A(weight);
      d[1] = A(count);
    }
  }
  if (!p.partials) return;
  const bool with_smooth = kGeneral && p.smooth && !p.soft, with_z = p.k.z_loss != A(0);
  auto sum_over_block = [&] {
    sums.nll = block_sum(sums.nll, scratch);
    if (with_smooth) sums.smooth = block_sum(sums.smooth, scratch + kWarp);
    if (with_z) sums.z = block_sum(sums.z, scratch + 2 * kWarp);
    if (p.accuracy) sums.correct = block_sum(sums.correct, scratch + 3 * kWarp);
  };
  sum_over_block();
  unsigned* ticket = reinterpret_cast<unsigned*>(scratch + 4 * kWarp);
  if (threadIdx.x == 0) {
    p.partials[block] = sums.nll;
    if (with_smooth) p.partials[blocks + block] = sums.smooth;
    if (with_z) p.partials[2 * blocks + block] = sums.z;
    if (p.accuracy) p.partials[3 * blocks + block] = sums.correct;
    memory_fence();  // the partials before the ticket
    *ticket = atomicAdd(p.counter, 1u);
    if (*ticket == blocks - 1)
      memory_fence();  // the ticket before the partials of the others; the barrier passes it on
  }
  block_barrier();
  if (*ticket != blocks - 1) return;
  sums = {sum_partials(p.partials, blocks), 0, 0, 0};
  if (with_smooth) sums.smooth = sum_partials(p.partials + blocks, blocks);
  if (with_z) sums.z = sum_partials(p.partials + 2 * blocks, blocks);
  if (p.accuracy) sums.correct = sum_partials(p.partials + 3 * blocks, blocks);
  sum_over_block();  // the ticket's barrier lies between the two uses of the scratch
  if (threadIdx.x >= kWarp) return;
  const double weight = load_total(p, Total::weight), counted = load_total(p, Total::counted);
  const double count = with_z ? load_total(p, Total::count) : 0;
  if (threadIdx.x != 0) return;
  const bool nothing = p.all_ignored_zero && counted == 0;
  if (p.loss && p.reduction != Reduction::none) {
    const bool mean = p.reduction == Reduction::mean;
    if (with_smooth && p.all_classes == 0) sums.smooth = double(NAN);  // see coefficients_of_row
    double loss = reduced_loss(sums, mean, with_smooth, with_z, weight, count);
    if (mean && nothing) loss = sums.nll * 0;  // nan if there was a bad target
    store_as(p.loss, p.loss_type, 0, loss);
  }
  if (p.accuracy) *p.accuracy = nothing ? 0.f : float(sums.correct / counted);
}

// ------------------------------------------------------------------------------------------- gradient of elements

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

// d loss / d x of N elements; arguments as in load_q. is_target[i]: row i's target is this class. Also writes the
// gradient of a probability target, at out_at, out_at + out_stride, ...
template <bool kGeneral, int N, class A>
__device__ __forceinline__ void gradient(const CrossEntropyParams<A>& p, const RowCoefficients<A>* r, int row_step,
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
        if (p.margin.any && is_target[i]) {
          slope[i] = transform_target(p, z[i]);
        } else {
          z[i] = transform(p.k, x[i]);
          slope[i] = transform_slope(p.k, z[i]);
        }
      }
    }
    const RowCoefficients<A>& row = r[i * row_step];
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
        const RowCoefficients<A>& row = r[i * row_step];
        const A w = p.weight ? p.weight[c + i * class_step] : A(1);
        A by_prob = row.u * (A(1) - p.k.smoothing) * w * (row.log_sum - z[i]);
        if (p.row_map != RowMap::none) by_prob += row.level * (A(1) - p.k.smoothing) * w;
        store_as(p.grad_target, p.prob_type, out_at + i * out_stride, by_prob);
      }
    }
  }
}

}  // namespace fastloss
