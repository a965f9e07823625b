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
  double* partials;   // [groups, classes, 3, parts]
  double* losses;     // [groups, classes]; null: not reduced
  unsigned* bad;      // [groups], zeroed: bad targets; null: not to be reported
  unsigned* counter;  // zeroed: blocks of the finish kernel that are done
  BadTargetRecord* record;
  bool shared;  // sums, slopes: in shared memory. Else sums: a block is one warp, and adds to its partials. Slopes:
                // computed whenever they are needed
};

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
    const double weight = a.weight ? double(static_cast<const A*>(a.weight)[c]) : 1.0;
    const double up = c < a.first_class ? 0.0 : load_as<double>(a.grad_output, a.loss_type, dice_place(a, group, c));
    return dice_slopes<A>(a, group, c, weight, up);
  }
  __device__ __forceinline__ DiceSlopes<A> operator[](int64_t c) const { return shared ? shared[c] : computed(c); }
};

// The softmax of a thread's rows: p = e^(x - ref) inverse; and dot = sum_c p dL/dp where there are slopes.
template <class A, int kRows>
struct DiceSoftmax {
  A ref[kRows], inverse[kRows], dot[kRows];

  // One walk along the classes, a few at a time: their loads go out together, and the sums are rescaled once for them.
  template <class T, class Slopes>
  __device__ __forceinline__ void walk(const DiceLossParams& p, const DiceRows<T, kRows>& rows, const Slopes& slopes) {
    constexpr bool kSlopes = !std::is_same_v<Slopes, std::nullptr_t>;
    constexpr int kTogether = kRows >= 8 ? 2 : 4;
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
          sum[i] += e;
          if constexpr (kSlopes) {
            linear[i] += e * (slope.by_other * t[i] + slope.constant);
            square[i] += e * (e * slope.by_own);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      inverse[i] = A(1) / sum[i];
      if constexpr (kSlopes) dot[i] = inverse[i] * linear[i] + inverse[i] * (inverse[i] * square[i]);
    }
  }
};

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
  const int64_t group = blockIdx.x / p.parts, part = blockIdx.x % p.parts, sets = 3 * a.classes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double* const in_shared = reinterpret_cast<double*>(shared_memory());  // [warps, classes, 3]
  double* const partials = p.partials + group * sets * p.parts + part;   // [classes, 3], parts apart
  double* const sums = p.shared ? in_shared + warp * sets : partials;
  const int64_t step = p.shared ? 1 : p.parts;
  for (int64_t c = 0; c < a.classes && lane < 3; ++c) sums[(3 * c + lane) * step] = 0;

  const int64_t tile = int64_t(blockDim.x) * kRows;
  for (int64_t at = part * tile; at < p.rows_per_group; at += p.parts * tile) {
    const DiceRows<T, kRows> rows(p, group, at + int64_t(threadIdx.x) * kRows);
    DiceSoftmax<A, kRows> softmax;
    if (a.activation == Activation::softmax) softmax.walk(p, rows, nullptr);
    for (int64_t c = 0; c < a.classes; ++c) {
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
        }
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) sum[k] = group_sum(sum[k], kWarp);
      if (lane < 3) sums[(3 * c + lane) * step] += double(lane == 0 ? sum[0] : lane == 1 ? sum[1] : sum[2]);
    }
  }
  if (!p.shared) return;
  block_barrier();
  for (int64_t i = threadIdx.x; i < sets; i += blockDim.x) {
    double sum = 0;
    for (int w = 0; w < int(blockDim.x) / kWarp; ++w) sum += in_shared[w * sets + i];
    partials[i * p.parts] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kDiceFinishThreads, 8) dice_loss_finish_kernel(const DiceLossParams p) {
  using A = accum_t<T>;
  const DiceLossArgs& a = p.a;
  double* const scratch = reinterpret_cast<double*>(shared_memory());
  unsigned* const ticket = reinterpret_cast<unsigned*>(scratch + 3 * kWarp);
  const int64_t items = a.groups * a.classes;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    double sum[3];
    for (int k = 0; k < 3; ++k) {
      const double* partials = p.partials + (3 * item + k) * p.parts;
      sum[k] = 0;
      for (int64_t i = threadIdx.x; i < p.parts; i += blockDim.x) sum[k] += partials[i];
      // No barrier: barriers of the other two lie between two uses of the same scratch.
      sum[k] = block_sum(sum[k], scratch + k * kWarp);
    }
    if (threadIdx.x != 0) continue;
    const int64_t group = item / a.classes, c = item - group * a.classes;
    const DiceTerm term = dice_term(a, sum[0], sum[1], sum[2]);
    if (a.saved) {
      a.saved[2 * item] = term.per_intersection;
      a.saved[2 * item + 1] = term.per_area;
    }
    double loss = (a.weight ? double(static_cast<const A*>(a.weight)[c]) : 1.0) * term.loss;
    if (p.bad[group] != 0) loss = double(NAN);
    if (p.losses)
      p.losses[item] = c < a.first_class ? 0.0 : loss;
    else if (c >= a.first_class)
      store_as(a.loss, a.loss_type, dice_place(a, group, c), loss);
  }
  if (!p.losses) return;
  if (threadIdx.x == 0) {
    memory_fence();  // the losses before the ticket
    *ticket = atomicAdd(p.counter, 1u);
    if (*ticket == gridDim.x - 1) memory_fence();  // the ticket before the losses of the others
  }
  block_barrier();
  if (*ticket != gridDim.x - 1) return;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < items; i += blockDim.x) sum += p.losses[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) store_as(a.loss, a.loss_type, 0, dice_reduced(a, sum));
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
  const int64_t tile = int64_t(blockDim.x) * kRows;
  for (int64_t at = part * tile; at < p.rows_per_group; at += p.parts * tile) {
    const DiceRows<T, kRows> rows(p, group, at + int64_t(threadIdx.x) * kRows);
    if (!rows.any) continue;
    DiceSoftmax<A, kRows> softmax;
    if (a.activation == Activation::softmax) softmax.walk(p, rows, slopes);
    const Strides& strides = a.grad ? a.grad_strides : a.grad_target_strides;
    const int64_t to = rows.outer * strides.outer + rows.inner * strides.inner;
    for (int64_t c = 0; c < a.classes; ++c) {
      const DiceSlopes<A> slope = slopes[c];
      A x[kRows], t[kRows];
      rows.load_class(p, c, x);
      rows.load_target(p, c, t);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        A value, g;
        if (a.activation == Activation::softmax) {
          value = dice_exp(x[i] - softmax.ref[i]) * softmax.inverse[i];
          g = value * (slope.by_other * t[i] + slope.constant + value * slope.by_own - softmax.dot[i]);
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
