// The pointwise losses on the GPU: see pointwise.h; pointwise_policy.h says which kernel takes what.
//   pointwise_streaming_kernel  one row of contiguous operands: value, value and gradient, or gradient alone; each
//                               operand is read once by 16-byte loads (32 from sm_100 on), the gradient written once
//   pointwise_general_kernel    any strides, dtypes, weights, masks, per-element results, second order
// Sums: floats within the few elements of a tile, doubles from there; one partial sum per block, added up in order by
// the last block to come. No atomics on floats, nothing that depends on the device.
#pragma once
#define FASTLOSS_ISA gpu
#include <math.h>

#include "../common/convert.cuh"
#include "pointwise_policy.h"

namespace fastloss {
namespace gpu {
template <class V>
using lane_t = V;
template <class V>
__host__ __device__ inline V exp_of(V x) {
  return exp(x);
}
template <class V>
__host__ __device__ inline V log1p_of(V x) {
  return log1p(x);
}
template <class V>
__host__ __device__ inline V tanh_of(V x) {
  return tanh(x);
}
__device__ inline float inverse_of(float x) { return reciprocal_fast(x); }  // 1 ulp
__device__ inline double inverse_of(double x) { return 1 / x; }
}  // namespace gpu
}  // namespace fastloss

#include "losses.h"

namespace fastloss {

struct PointwiseParams {
  PointwiseArgs a;
  PointwisePass pass;
  int64_t parts;       // blocks per row
  double* partials;    // [2][rows * parts]: sums, denominators
  unsigned* counters;  // [rows], zeroed: parts that have written their partials; null when parts is 1
  double inverse_parts, inverse_sizes[kPointwiseDims];
  bool wide;  // the operands of the streaming kernel begin at multiples of 32 bytes
};

// i / n and i % n for 0 <= i < 2^52 by the reciprocal of n: a 64-bit division is a subroutine, a hundred instructions.
struct Divided {
  int64_t quotient, rest;
};
__device__ __forceinline__ Divided divide(int64_t i, int64_t n, double inverse) {
  Divided d;
  d.quotient = int64_t(double(i) * inverse);  // off by one at most
  d.rest = i - d.quotient * n;
  const int64_t correction = d.rest < 0 ? -1 : d.rest >= n ? 1 : 0;
  return {d.quotient + correction, d.rest - correction * n};
}

// The sums of one part of a row, valid in thread 0, arrive; the last part writes the row's result.
__device__ __forceinline__ void finish_row(const PointwiseParams& p, bool root, int64_t row, int64_t part, double sum,
                                           double denominator) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  unsigned* ticket = reinterpret_cast<unsigned*>(scratch + 2 * kWarp);
  // No barrier at either end: the two sums have a scratch each, so a barrier of one lies between two uses of the other.
  sum = block_sum(sum, scratch);
  denominator = block_sum(denominator, scratch + kWarp);
  if (p.parts > 1) {
    double* sums = p.partials + row * p.parts;
    double* denominators = sums + p.a.rows * p.parts;
    if (threadIdx.x == 0) {
      sums[part] = sum;
      denominators[part] = denominator;
      memory_fence();  // the partials before the ticket
      *ticket = atomicAdd(&p.counters[row], 1u);
      if (*ticket == unsigned(p.parts) - 1)
        memory_fence();  // the ticket before the partials of the others; the barrier passes it on
    }
    block_barrier();
    if (*ticket != unsigned(p.parts) - 1) return;
    sum = denominator = 0;
    for (int64_t i = threadIdx.x; i < p.parts; i += blockDim.x) {
      sum += sums[i];
      denominator += denominators[i];
    }
    sum = block_sum(sum, scratch);
    denominator = block_sum(denominator, scratch + kWarp);
  }
  if (threadIdx.x != 0) return;
  if (p.pass == PointwisePass::second) {
    if (p.a.loss_out) store_as(p.a.loss_out, p.a.loss_type, row, sum * (p.a.factor ? p.a.factor[row] : 1.0));
    return;
  }
  const RowResult r = row_result(p.a, root, sum, denominator);
  if (p.a.loss_out) store_as(p.a.loss_out, p.a.loss_type, row, r.value);
  if (p.a.factor) p.a.factor[row] = r.factor;
}

// What multiplies the gradients of a row: 1/D in forward (where it is known), factor grad_output later.
template <class Loss, class A>
__device__ __forceinline__ A row_scale(const PointwiseParams& p, int64_t row) {
  double s = 1;
  if (p.pass == PointwisePass::forward) {
    if (factor_is_known(p.a, Loss::root) && p.a.reduction == Reduction::mean) s = 1 / double(p.a.cols);
  } else {
    if (p.a.factor) s = p.a.factor[row];
    if (p.a.grad_output) s *= load_as<double>(p.a.grad_output, p.a.grad_output_type, row);
  }
  return A(sizeof(A) == 4 ? finite_scale(s) : s);
}

// m f(x, t) as it is to be summed.
template <class Loss, class A>
__device__ __forceinline__ auto value_of(A x, A t, A param) {
  if constexpr (Loss::wide)
    return Loss::of(double(x - t), double(param)).value;
  else
    return gpu::jet<Loss>(x, t, param).value;
}

template <class Loss, class T, bool kSum, bool kGrad>
__global__ void __launch_bounds__(kPointwiseThreads) pointwise_streaming_kernel(const PointwiseParams p) {
  using A = accum_t<T>;
  constexpr int kPart = kLanes16<T>, kL = kPart * kWideParts, kV = kPointwiseTile / kL;
  const T* input = static_cast<const T*>(p.a.input.data);
  const T* target = static_cast<const T*>(p.a.target.data);
  T* grad = static_cast<T*>(p.a.grad_input.data);
  const A param = A(p.a.param), scale = kGrad ? row_scale<Loss, A>(p, 0) : A(0);
  const int64_t vectors = p.a.cols / kL, tile = int64_t(kPointwiseThreads) * kV;
  double sum = 0;
  for (int64_t base = blockIdx.x * tile + threadIdx.x; base < vectors; base += gridDim.x * tile) {
    VecWide x[kV], t[kV];  // all loads go out before the first is used
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const int64_t at = base + j * kPointwiseThreads;
      if (at < vectors) {
        x[j] = load_wide_stream(input + at * kL, p.wide);
        t[j] = load_wide_stream(target + at * kL, p.wide);
      }
    }
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const int64_t at = base + j * kPointwiseThreads;
      if (at >= vectors) continue;
      VecWide out;
#pragma unroll
      for (int h = 0; h < kWideParts; ++h) {
        A xs[kPart], ts[kPart];
        unpack<T>(x[j].part[h], xs);
        unpack<T>(t[j].part[h], ts);
        if constexpr (kSum) {
          decltype(value_of<Loss>(xs[0], ts[0], param)) part = 0;
#pragma unroll
          for (int i = 0; i < kPart; ++i) part += value_of<Loss>(xs[i], ts[i], param);
          sum += double(part);
        }
        if constexpr (kGrad) {
          A g[kPart];
#pragma unroll
          for (int i = 0; i < kPart; ++i) g[i] = scale * gpu::jet<Loss>(xs[i], ts[i], param).x;
          out.part[h] = pack<T>(g);
        }
      }
      if constexpr (kGrad) store_wide_stream(grad + at * kL, out, p.wide);
    }
  }
  for (int64_t i = vectors * kL + blockIdx.x * blockDim.x + threadIdx.x; i < p.a.cols; i += gridDim.x * blockDim.x) {
    const A x = to_accum(input[i]), t = to_accum(target[i]);
    if constexpr (kSum) sum += double(value_of<Loss>(x, t, param));
    if constexpr (kGrad) grad[i] = from_accum<T>(scale * gpu::jet<Loss>(x, t, param).x);
  }
  if constexpr (kSum) finish_row(p, Loss::root, 0, blockIdx.x, sum, 0);
}

// Where element i of an operand is.
__device__ __forceinline__ int64_t offset_of(const PointwiseParams& p, const PointwiseOperand& o, int64_t i) {
  int64_t offset = 0;
  for (int k = p.a.dim - 1; k > 0; --k) {
    const Divided d = divide(i, p.a.sizes[k], p.inverse_sizes[k]);
    offset += d.rest * o.strides[k];
    i = d.quotient;
  }
  return offset + i * o.strides[0];
}
template <class A>
__device__ __forceinline__ A load_element(const PointwiseParams& p, const PointwiseOperand& o, int64_t i) {
  return load_as<A>(o.data, o.type, offset_of(p, o, i));
}
template <class A>
__device__ __forceinline__ void store_element(const PointwiseParams& p, const PointwiseOperand& o, int64_t i, A v) {
  if (o.data) store_as(o.data, o.type, offset_of(p, o, i), v);
}

template <class Loss, class A>
__global__ void __launch_bounds__(kPointwiseThreads) pointwise_general_kernel(const PointwiseParams p) {
  const PointwiseArgs& a = p.a;
  const bool gradients = a.grad_input.data || a.grad_target.data, second = p.pass == PointwisePass::second;
  const bool sums = sums_rows(a, p.pass);
  const A param = A(a.param);
  for (int64_t item = blockIdx.x; item < a.rows * p.parts; item += gridDim.x) {
    const Divided of_parts = divide(item, p.parts, p.inverse_parts);
    const int64_t row = of_parts.quotient, part = of_parts.rest, first = row * a.cols;
    const A scale = gradients ? row_scale<Loss, A>(p, row) : A(0);
    double sum = 0, denominator = 0;
    for (int64_t col = part * blockDim.x + threadIdx.x; col < a.cols; col += p.parts * blockDim.x) {
      const int64_t i = first + col;
      const bool counts = !a.mask.data || static_cast<const unsigned char*>(a.mask.data)[offset_of(p, a.mask, i)];
      // A masked element is x = t = 1 with weight 0, so that nothing of what it holds is used.
      A m = counts ? A(1) : A(0);
      if (counts && a.weight.data) m = load_element<A>(p, a.weight, i);
      denominator += a.weight_denominator != 0 ? double(m) : counts ? 1.0 : 0.0;
      const A x = counts ? load_element<A>(p, a.input, i) : A(1), t = counts ? load_element<A>(p, a.target, i) : A(1);
      if (a.grad_output_elements.data && gradients && m != A(0)) m *= load_element<A>(p, a.grad_output_elements, i);
      const gpu::Jet<A> j = gpu::jet<Loss>(x, t, param);
      if (second) {
        const A vx = a.tangent_input.data && m != A(0) ? load_element<A>(p, a.tangent_input, i) : A(0);
        const A vt = a.tangent_target.data && m != A(0) ? load_element<A>(p, a.tangent_target, i) : A(0);
        const A slope = m * (vx * j.x + vt * j.t);
        sum += double(slope);
        store_element(p, a.loss_elements, i, slope);
        store_element(p, a.grad_input, i, m * scale * (vx * j.xx + vt * j.xt));
        store_element(p, a.grad_target, i, m * scale * (vx * j.xt + vt * j.tt));
      } else {
        if (sums) sum += double(m) * double(value_of<Loss>(x, t, param));
        if (p.pass == PointwisePass::forward) store_element(p, a.loss_elements, i, m * j.value);
        store_element(p, a.grad_input, i, m * scale * j.x);
        store_element(p, a.grad_target, i, m * scale * j.t);
      }
    }
    if (sums) finish_row(p, Loss::root, row, part, sum, denominator);
  }
}

}  // namespace fastloss
