// Dice loss on the GPU: see dice_loss.h.
//   dice_loss_sums_kernel      I, P, T of every class over the rows of a block, one partial sum each
//   dice_loss_finish_kernel    one block for each group and class adds these up in order; the last block to come adds
//   up
//                              the losses
//   dice_loss_gradient_kernel  the gradient by the input, or by a dense target
// A thread takes kRows adjacent rows at a time (16 bytes of each class), or one row where the layout does not allow
// that, and walks along their classes twice: for the maximum and the sum of the softmax, and for what is wanted. Memory
// is read once: a block's rows stay in the L1 cache between the two, up to some hundred classes, and in the L2 beyond.
// Channels first, adjacent threads have adjacent rows; channels last, the L1 turns a warp's walk into whole lines.
// Sums: floats over the rows of a warp, doubles from there. Blocks and partial sums follow from the shape alone. No
// atomics on floats.
#pragma once
#include <math.h>

#include "../common/convert.cuh"
#include "../common/errors_cuda.cuh"
#include "dice_loss_math.h"

namespace fastloss {

constexpr int kDiceThreads = 128;  // four blocks of a multiprocessor have 128 registers a thread
constexpr int kDiceFinishThreads = 128;

struct DiceLossParams {
  DiceLossArgs a;
  int64_t rows_per_group;
  int64_t parts;      // blocks of a group
  int64_t sets;       // sums of a group: I, P, T of every class, and with a cross entropy that
  double* partials;   // [groups, sets, parts]
  double* losses;     // [groups, classes]; null: not reduced
  double* weights;    // [groups, classes]: w_c T; cross entropy only
  double* nll;        // [groups]: the rows' cross entropy
  unsigned* bad;      // [groups], zeroed: bad targets; null: not to be reported
  unsigned* counted;  // [groups], zeroed: whether any row counts
  unsigned* counter;  // zeroed: blocks of the finish kernel that are done
  BadTargetRecord* record;
  bool shared;  // sums, slopes: in shared memory. Else sums: a block is one warp, and adds to its partials. Slopes:
                // computed whenever they are needed
};

__device__ __forceinline__ float dice_log(float x) { return logf(x); }
__device__ __forceinline__ double dice_log(double x) { return log(x); }
__device__ __forceinline__ float dice_log1p(float x) { return log1pf(x); }
__device__ __forceinline__ double dice_log1p(double x) { return log1p(x); }
__device__ __forceinline__ float dice_exp(float x) { return exp2_fast(x * 1.44269504088896341f); }
__device__ __forceinline__ double dice_exp(double x) { return exp(x); }

// Adjacent rows of one thread, and their classes.
template <class T, int kRows>
struct DiceRows {
  using A = accum_t<T>;
  bool any;              // the thread has rows
  int64_t outer, inner;  // where the first of them is
  const T* x;
  int64_t target;        // dense: offset of the first row's class 0
  int32_t index[kRows];  // class indices, -1: does not count; dense: 0

  __device__ __forceinline__ DiceRows(const DiceLossParams& p, int64_t group, int64_t at) {
    const DiceLossArgs& a = p.a;
    any = at < p.rows_per_group;
    const int64_t first = group * p.rows_per_group + (any ? at : 0);
    outer = first / a.inner;
    inner = first - outer * a.inner;
    x = static_cast<const T*>(a.input) + outer * a.input_strides.outer + inner * a.input_strides.inner;
    target = outer * a.target_strides.outer + inner * a.target_strides.inner;
#pragma unroll
    for (int i = 0; i < kRows; ++i) index[i] = any && a.dense ? 0 : -1;
    if (!any || a.dense) return;
    int64_t loaded[kRows];
    load_indices(a.target, a.index_type, first, loaded);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (loaded[i] == a.ignore_index) continue;
      if (loaded[i] >= 0 && loaded[i] < a.classes) {
        index[i] = static_cast<int32_t>(loaded[i]);
      } else if (p.bad) {
        record_bad_target(p.record, first + i, loaded[i]);
        atomicAdd(&p.bad[group], 1u);
      }
    }
  }
  __device__ __forceinline__ bool counts(int i) const { return index[i] >= 0; }
  // Of a row that counts: the logit and the weight of its class.
  __device__ __forceinline__ A target_logit(const DiceLossParams& p, int i) const {
    return to_accum(x[index[i] * p.a.input_strides.cls + i * p.a.input_strides.inner]);
  }
  __device__ __forceinline__ A target_weight(const DiceLossParams& p, int i) const {
    return A(dice_weight<A>(p.a, index[i]));
  }
  __device__ __forceinline__ void load_class(const DiceLossParams& p, int64_t c, A (&out)[kRows]) const {
    const T* at = x + c * p.a.input_strides.cls;
    if constexpr (kRows == 1)
      out[0] = to_accum(*at);
    else
      unpack<T>(load16(at), out);
  }
  __device__ __forceinline__ void load_target(const DiceLossParams& p, int64_t c, A (&out)[kRows]) const {
    if (p.a.dense) {
      load_run(p.a.target, p.a.target_type, target + c * p.a.target_strides.cls, p.a.target_strides.inner, out);
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) out[i] = index[i] == c ? A(1) : A(0);
    }
  }
};

// The slopes of a class, from shared memory or computed.
template <class A>
struct DiceSlopeTable {
  const DiceLossParams& p;
  const DiceSlopes<A>* shared;  // [classes] or null
  int64_t group;

  __device__ __forceinline__ DiceSlopes<A> computed(int64_t c) const {
    const DiceLossArgs& a = p.a;
    const double weight = dice_weight<A>(a, c);
    const double up = c < a.first_class ? 0.0 : load_as<double>(a.grad_output, a.loss_type, dice_place(a, group, c));
    return dice_slopes<A>(a, group, c, weight, up);
  }
  __device__ __forceinline__ DiceSlopes<A> operator[](int64_t c) const { return shared ? shared[c] : computed(c); }
};

// The softmax of a thread's rows: p = e^(x - ref) inverse; and dot = sum_c p dL/dp where there are slopes. With a cross
// entropy others = sum e^(x - ref) without the target's, so that 1 - p_t = others inverse keeps its digits.
template <class A, int kRows>
struct DiceSoftmax {
  A ref[kRows], inverse[kRows], dot[kRows], others[kRows];

  // One walk along the classes, a few at a time: their loads go out together, and the sums are rescaled once for them.
  template <class T, class Slopes>
  __device__ __forceinline__ void walk(const DiceLossParams& p, const DiceRows<T, kRows>& rows, const Slopes& slopes) {
    constexpr bool kSlopes = !std::is_same_v<Slopes, std::nullptr_t>;
    constexpr int kTogether = kRows >= 8 ? 2 : 4;
    const bool apart = with_cross_entropy(p.a);
    A top[kRows], sum[kRows], linear[kRows], square[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) top[i] = A(-INFINITY), sum[i] = linear[i] = square[i] = A(0);
    for (int64_t c0 = 0; c0 < p.a.classes; c0 += kTogether) {
      A x[kTogether][kRows];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (c0 + j < p.a.classes) {
          rows.load_class(p, c0 + j, x[j]);
        } else {
#pragma unroll
          for (int i = 0; i < kRows; ++i) x[j][i] = A(-INFINITY);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const A before = top[i];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) top[i] = max_of(top[i], x[j][i]);
        ref[i] = top[i] > A(-INFINITY) ? top[i] : A(0);
        const A shrink = dice_exp(before - ref[i]);
        sum[i] *= shrink;
        if constexpr (kSlopes) linear[i] *= shrink, square[i] *= shrink * shrink;
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (c0 + j >= p.a.classes) break;
        A t[kRows];
        DiceSlopes<A> slope{};
        if constexpr (kSlopes) {
          slope = slopes[c0 + j];
          rows.load_target(p, c0 + j, t);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const A e = dice_exp(x[j][i] - ref[i]);
          sum[i] += apart && rows.index[i] == c0 + j ? A(0) : e;
          if constexpr (kSlopes) {
            linear[i] += e * (slope.by_other * t[i] + slope.constant);
            square[i] += e * (e * slope.by_own);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      others[i] = sum[i];
      if (apart && rows.counts(i)) sum[i] += dice_exp(rows.target_logit(p, i) - ref[i]);
      inverse[i] = A(1) / sum[i];
      if constexpr (kSlopes) dot[i] = inverse[i] * linear[i] + inverse[i] * (inverse[i] * square[i]);
    }
  }
};

template <class A>
__device__ __forceinline__ A dice_all_weights(const DiceLossArgs& a) {
  double sum = 0;
  for (int64_t c = 0; c < a.classes; ++c) sum += dice_weight<A>(a, c);
  return A(sum);
}
// The cross entropy of a thread's rows, but for sum_c w_c (ref - x_c) smoothing / classes.
template <class T, int kRows>
__device__ __forceinline__ accum_t<T> dice_nll(const DiceLossParams& p, const DiceRows<T, kRows>& rows,
                                               const DiceSoftmax<accum_t<T>, kRows>& softmax) {
  using A = accum_t<T>;
  const A all = p.a.smoothing == 0 ? A(0) : A(p.a.smoothing / double(p.a.classes)) * dice_all_weights<A>(p.a);
  A sum = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (!rows.counts(i)) continue;
    const A past = rows.target_logit(p, i) - softmax.ref[i], e = dice_exp(past), others = softmax.others[i];
    const A log_sum = e == A(1) ? dice_log1p(others) : dice_log(others + e);
    sum += A(1 - p.a.smoothing) * rows.target_weight(p, i) * (log_sum - past);
    if (p.a.smoothing != 0) sum += all * log_sum;
  }
  return sum;
}

// p and dp/dx of an activation that looks at one element.
template <class A>
struct DiceElement {
  A p, slope;
};
template <class A>
__device__ __forceinline__ DiceElement<A> dice_element(Activation activation, A x) {
  if (activation != Activation::sigmoid) return {x, A(1)};
  const A e = dice_exp(x < A(0) ? x : -x), inverse = A(1) / (A(1) + e);
  return {x < A(0) ? e * inverse : inverse, e * inverse * inverse};
}

template <class T, int kRows>
__global__ void __launch_bounds__(kDiceThreads, 4) dice_loss_sums_kernel(const DiceLossParams p) {
  using A = accum_t<T>;
  const DiceLossArgs& a = p.a;
  const int64_t group = blockIdx.x / p.parts, part = blockIdx.x % p.parts, sets = p.sets;
  const bool nll = with_cross_entropy(a), smooth = nll && a.smoothing != 0;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double* const in_shared = reinterpret_cast<double*>(shared_memory());  // [warps, sets]
  double* const partials = p.partials + group * sets * p.parts + part;   // [sets], parts apart
  double* const sums = p.shared ? in_shared + warp * sets : partials;
  const int64_t step = p.shared ? 1 : p.parts;
  for (int64_t c = 0; c < a.classes && lane < 3; ++c) sums[(3 * c + lane) * step] = 0;
  if (nll && lane == 0) sums[3 * a.classes * step] = 0;
  bool counted = false;

  const int64_t tile = int64_t(blockDim.x) * kRows;
  for (int64_t at = part * tile; at < p.rows_per_group; at += p.parts * tile) {
    const DiceRows<T, kRows> rows(p, group, at + int64_t(threadIdx.x) * kRows);
    DiceSoftmax<A, kRows> softmax;
    if (a.activation == Activation::softmax) softmax.walk(p, rows, nullptr);
#pragma unroll
    for (int i = 0; i < kRows; ++i) counted |= rows.counts(i);
    A rows_nll = nll ? dice_nll(p, rows, softmax) : A(0);
    for (int64_t c = 0; c < a.classes; ++c) {
      const A share = smooth ? A(a.smoothing / double(a.classes) * dice_weight<A>(a, c)) : A(0);
      A sum[3] = {A(0), A(0), A(0)};
      A x[kRows], t[kRows];
      if (rows.any) {
        rows.load_class(p, c, x);
        rows.load_target(p, c, t);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          A value = a.activation == Activation::softmax ? dice_exp(x[i] - softmax.ref[i]) * softmax.inverse[i]
                                                        : dice_element(a.activation, x[i]).p;
          value = rows.counts(i) ? value : A(0);
          sum[0] += value * t[i];
          sum[1] += a.squared ? value * value : value;
          sum[2] += a.squared ? t[i] * t[i] : t[i];
          if (smooth && rows.counts(i)) rows_nll += share * (softmax.ref[i] - x[i]);
        }
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) sum[k] = group_sum(sum[k], kWarp);
      if (lane < 3) sums[(3 * c + lane) * step] += double(lane == 0 ? sum[0] : lane == 1 ? sum[1] : sum[2]);
    }
    if (nll) {
      rows_nll = group_sum(rows_nll, kWarp);
      if (lane == 0) sums[3 * a.classes * step] += double(rows_nll);
    }
  }
  if (group_sum(counted ? 1.0f : 0.0f, kWarp) > 0 && lane == 0) atomicAdd(&p.counted[group], 1u);
  if (!p.shared) return;
  block_barrier();
  for (int64_t i = threadIdx.x; i < sets; i += blockDim.x) {
    double sum = 0;
    for (int w = 0; w < int(blockDim.x) / kWarp; ++w) sum += in_shared[w * sets + i];
    partials[i * p.parts] = sum;
  }
}

// Whether any row of a group counts.
__device__ __forceinline__ bool dice_counts(const DiceLossParams& p, int64_t group) {
  return p.a.dense || p.rows_per_group == 0 || p.counted[group] != 0;
}

template <class T>
__global__ void __launch_bounds__(kDiceFinishThreads, 8) dice_loss_finish_kernel(const DiceLossParams p) {
  using A = accum_t<T>;
  const DiceLossArgs& a = p.a;
  double* const scratch = reinterpret_cast<double*>(shared_memory());
  unsigned* const ticket = reinterpret_cast<unsigned*>(scratch + 3 * kWarp);
  const bool nll = with_cross_entropy(a);
  const int64_t items = a.groups * a.classes;
  // Groups and classes; then, with a cross entropy, the groups once more, with one sum.
  for (int64_t item = blockIdx.x; item < items + (nll ? a.groups : 0); item += gridDim.x) {
    const bool of_rows = item >= items;
    const int64_t group = of_rows ? item - items : item / a.classes, c = of_rows ? a.classes : item - group * a.classes;
    double sum[3];
    for (int k = 0; k < 3; ++k) {
      const double* partials = p.partials + (group * p.sets + 3 * c + k) * p.parts;
      sum[k] = 0;
      for (int64_t i = threadIdx.x; i < p.parts && (k == 0 || !of_rows); i += blockDim.x) sum[k] += partials[i];
      // No barrier: barriers of the other two lie between two uses of the same scratch.
      sum[k] = block_sum(sum[k], scratch + k * kWarp);
    }
    if (threadIdx.x != 0) continue;
    if (of_rows) {
      p.nll[group] = sum[0];
      continue;
    }
    const DiceTerm term = dice_counts(p, group) ? dice_term(a, sum[0], sum[1], sum[2]) : DiceTerm{0, 0, 0, 0};
    if (a.saved) {
      a.saved[3 * item] = term.per_intersection;
      a.saved[3 * item + 1] = term.per_prediction;
      a.saved[3 * item + 2] = term.per_target;
    }
    const double weight = dice_weight<A>(a, c);
    if (nll) p.weights[item] = weight * sum[2];
    double loss = weight * term.loss;
    if (p.bad[group] != 0) loss = double(NAN);
    if (p.losses)
      p.losses[item] = c < a.first_class ? 0.0 : loss;
    else if (c >= a.first_class)
      store_as(a.loss, a.loss_type, dice_place(a, group, c), loss);
  }
  if (!p.losses) {
    if (a.saved && blockIdx.x == 0 && threadIdx.x < 2) dice_divisors(a)[threadIdx.x] = 1;  // not used
    return;
  }
  if (threadIdx.x == 0) {
    memory_fence();  // the losses before the ticket
    *ticket = atomicAdd(p.counter, 1u);
    if (*ticket == gridDim.x - 1) memory_fence();  // the ticket before the losses of the others
  }
  block_barrier();
  if (*ticket != gridDim.x - 1) return;
  double sum = 0, groups = 0, rows_nll = 0, weights = 0;
  for (int64_t i = threadIdx.x; i < items; i += blockDim.x) {
    sum += p.losses[i];
    if (nll) weights += p.weights[i];
  }
  for (int64_t i = threadIdx.x; i < a.groups; i += blockDim.x) {
    groups += dice_counts(p, i) ? 1 : 0;
    if (nll) rows_nll += p.nll[i];
  }
  sum = block_sum(sum, scratch);
  groups = block_sum(groups, scratch + kWarp);
  if (nll) {
    weights = block_sum(weights, scratch + 2 * kWarp);
    rows_nll = block_sum(rows_nll, scratch);
  }
  if (threadIdx.x != 0) return;
  const double count = dice_count(a, int64_t(groups));
  if (a.saved) {
    dice_divisors(a)[0] = count;
    dice_divisors(a)[1] = weights;
  }
  double loss = dice_reduced(a, sum, count);
  if (nll) loss += cross_entropy_reduced(a, rows_nll, weights);
  store_as(a.loss, a.loss_type, 0, loss);
}

// Rows by vectors, of doubles above all, take more registers than four blocks on a multiprocessor leave from sm_100 on.
template <class T, int kRows>
constexpr int kDiceGradientBlocks = kRows == 1       ? 4
                                    : sizeof(T) == 8 ? 2
                                                     : 3;

template <class T, int kRows>
__global__ void __launch_bounds__(kDiceThreads, kDiceGradientBlocks<T, kRows>)
    dice_loss_gradient_kernel(const DiceLossParams p) {
  using A = accum_t<T>;
  const DiceLossArgs& a = p.a;
  const int64_t group = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
  DiceSlopes<A>* const in_shared = reinterpret_cast<DiceSlopes<A>*>(shared_memory());  // [classes]
  const DiceSlopeTable<A> slopes{p, p.shared ? in_shared : nullptr, group};
  if (p.shared) {
    for (int64_t c = threadIdx.x; c < a.classes; c += blockDim.x) in_shared[c] = slopes.computed(c);
    block_barrier();
  }
  const bool nll = with_cross_entropy(a);
  CrossEntropySlopes<A> of_nll{};
  if (nll)
    of_nll = cross_entropy_slopes<A>(a, load_as<double>(a.grad_output, a.loss_type, 0),
                                     a.smoothing == 0 ? A(0) : dice_all_weights<A>(a));
  const int64_t tile = int64_t(blockDim.x) * kRows;
  for (int64_t at = part * tile; at < p.rows_per_group; at += p.parts * tile) {
    const DiceRows<T, kRows> rows(p, group, at + int64_t(threadIdx.x) * kRows);
    if (!rows.any) continue;
    DiceSoftmax<A, kRows> softmax;
    if (a.activation == Activation::softmax) softmax.walk(p, rows, slopes);
    A up[kRows];  // the gradient of the rows' -log p_t
    if (nll) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) up[i] = rows.counts(i) ? of_nll.target * rows.target_weight(p, i) : A(0);
    }
    const Strides& strides = a.grad ? a.grad_strides : a.grad_target_strides;
    const int64_t to = rows.outer * strides.outer + rows.inner * strides.inner;
    for (int64_t c = 0; c < a.classes; ++c) {
      const DiceSlopes<A> slope = slopes[c];
      const A smooth = nll ? of_nll.rest * A(dice_weight<A>(a, c)) : A(0);
      A x[kRows], t[kRows];
      rows.load_class(p, c, x);
      rows.load_target(p, c, t);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        A value, g;
        if (a.activation == Activation::softmax) {
          value = dice_exp(x[i] - softmax.ref[i]) * softmax.inverse[i];
          g = value * (slope.by_other * t[i] + slope.constant + value * slope.by_own - softmax.dot[i]);
          if (nll) {
            g += up[i] * (rows.index[i] == c ? -softmax.others[i] * softmax.inverse[i] : value);
            g += of_nll.rest * of_nll.all_weights * value - smooth;
          }
        } else {
          const DiceElement<A> element = dice_element(a.activation, x[i]);
          value = element.p;
          g = element.slope * (slope.by_other * t[i] + slope.constant + value * slope.by_own);
        }
        if (!a.grad) g = slope.by_other * value + slope.constant + slope.by_own * t[i];
        x[i] = rows.counts(i) ? g : A(0);
      }
      if (!a.grad) {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          store_as(a.grad_target, a.target_type, to + c * strides.cls + i * strides.inner, x[i]);
      } else if constexpr (kRows == 1) {
        static_cast<T*>(a.grad)[to + c * strides.cls] = from_accum<T>(x[0]);
      } else {
        store16_stream(static_cast<T*>(a.grad) + to + c * strides.cls, pack<T>(x));
      }
    }
  }
}

}  // namespace fastloss
