// The pointwise losses on the GPU: see pointwise.h; pointwise_policy.h says which kernel takes what.
//   pointwise_streaming_kernel  one row of two contiguous operands: value, value and gradients, or gradients alone;
//   each
//                               operand is read once by 16-byte loads (32 from sm_100 on), each gradient written once
//   pointwise_general_kernel    any strides, dtypes, weights, masks, per-element results: several elements at a time,
//                               by 16-byte accesses to all that lies contiguously, or one at a time
// Sums: floats within the few elements of a tile, doubles from there; one partial sum per block, added up in order by
// the last block to come. No atomics on floats, nothing that depends on the device.
#pragma once
#include "../common/convert.cuh"
#include "../common/errors_cuda.cuh"
#include "../common/lanes_gpu.cuh"
#include "loss.h"
#include "pointwise_policy.h"

namespace fastloss {

struct PointwiseParams {
  PointwiseArgs a;
  PointwiseConfig config;
  double* partials;         // [sums + 1][rows * parts]: sums, denominators
  unsigned* counters;       // [rows], zeroed: parts that have written their partials; null when parts is 1
  BadTargetRecord* record;  // where a forward reports what is outside its operand's domain
  double inverse_parts, inverse_sizes[kPointwiseDims];
  bool operand_is_flat[kPointwiseOperands], grad_is_flat[kPointwiseOperands];
  bool weight_is_flat, mask_is_flat, loss_is_flat, multiplier_is_flat;
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

// ---- sums of a row

constexpr int kPointwiseShared = ((kPointwiseSums + 1) * kWarp + 2) * int(sizeof(double));

// A thread's part in the sums of a row.
template <class Loss>
struct RowSums {
  double term[Loss::sums] = {}, denominator = 0;
};

// The sums of a block in thread 0.
template <class Loss>
__device__ __forceinline__ void sum_over_block(RowSums<Loss>& s) {
  // No barrier at either end: each sum has a scratch of its own, so a barrier of another lies between two uses of it.
  double* scratch = reinterpret_cast<double*>(shared_memory());
#pragma unroll
  for (int j = 0; j < Loss::sums; ++j) s.term[j] = block_sum(s.term[j], scratch + j * kWarp);
  s.denominator = block_sum(s.denominator, scratch + Loss::sums * kWarp);
}

// The sums of one part of a row arrive; the last part writes the row's result. Returns whether this was the last one;
// then thread 0 has the sums of the row in s.
template <class Loss>
__device__ __forceinline__ bool finish_row(const PointwiseParams& p, int64_t row, int64_t part, RowSums<Loss>& s) {
  const int64_t parts = p.config.parts;
  sum_over_block(s);
  if (parts > 1) {
    unsigned* ticket = reinterpret_cast<unsigned*>(shared_memory() + kPointwiseShared - sizeof(double));
    double* partials = p.partials + row * parts;
    const int64_t step = p.a.rows * parts;  // from the partial sums of a term to those of the next
    if (threadIdx.x == 0) {
#pragma unroll
      for (int j = 0; j < Loss::sums; ++j) partials[j * step + part] = s.term[j];
      partials[Loss::sums * step + part] = s.denominator;
      memory_fence();  // the partials before the ticket
      *ticket = atomicAdd(&p.counters[row], 1u);
      if (*ticket == unsigned(parts) - 1)
        memory_fence();  // the ticket before the partials of the others; the barrier passes it on
    }
    block_barrier();
    if (*ticket != unsigned(parts) - 1) return false;
    s = RowSums<Loss>();
    for (int64_t i = threadIdx.x; i < parts; i += blockDim.x) {
#pragma unroll
      for (int j = 0; j < Loss::sums; ++j) s.term[j] += partials[j * step + i];
      s.denominator += partials[Loss::sums * step + i];
    }
    sum_over_block(s);
  }
  if (threadIdx.x == 0) {
    const auto r = gpu::row_result<Loss>(p.a, s.term, s.denominator);
    if (p.a.loss_out) store_as(p.a.loss_out, p.a.loss_type, row, r.value);
    if (p.a.factor)
#pragma unroll
      for (int j = 0; j < Loss::sums; ++j) p.a.factor[row * Loss::sums + j] = r.factor[j];
  }
  return true;
}

// What multiplies the gradient by a term: 1/D in forward (where it is known), factor grad_output in backward.
template <class Loss, class A>
__device__ __forceinline__ void row_scale(const PointwiseParams& p, int64_t row, A (&scale)[Loss::sums]) {
#pragma unroll
  for (int j = 0; j < Loss::sums; ++j) {
    double s = 1;
    if (p.config.pass == PointwisePass::forward) {
      if (factor_is_known(p.a) && p.a.reduction == Reduction::mean) s = 1 / double(p.a.cols);
    } else {
      if (p.a.factor) s = p.a.factor[row * Loss::sums + j];
      if (p.a.grad_output) s *= load_as<double>(p.a.grad_output, p.a.grad_output_type, row);
    }
    scale[j] = A(sizeof(A) == 4 ? finite_scale(s) : s);
  }
}

// A loss of one element, and what it gives: terms as they are to be summed, gradients.
template <class Loss, class A>
struct Element {
  using sum_t = std::conditional_t<Loss::wide, double, A>;
  static constexpr int kOperands = Loss::operands, kSums = Loss::sums;
  A x[kOperands];
  gpu::Jet<A, kOperands, kSums> jet;

  __device__ __forceinline__ void evaluate(const gpu::Params<A>& params) { jet = gpu::jet<Loss, A>(x, params); }
  // m f_j
  __device__ __forceinline__ sum_t term(int j, A m, const gpu::Params<A>& params) const {
    if constexpr (Loss::wide) {
      const gpu::Params<double> wide{{params[0], params[1], params[2], params[3]}};
      return double(m) * Loss::of(double(x[0] - x[1]), wide).value;
    } else {
      return m * jet.value[j];
    }
  }
  // sum_j scale_j m df_j/dx_k
  __device__ __forceinline__ A grad(int k, A m, const A (&scale)[kSums]) const {
    A sum = m * scale[0] * jet.slope[0][k];
#pragma unroll
    for (int j = 1; j < kSums; ++j) sum += m * scale[j] * jet.slope[j][k];
    return sum;
  }
};

// ---- streaming

template <class Loss, class T>
__global__ void __launch_bounds__(kPointwiseThreads) pointwise_streaming_kernel(const PointwiseParams p) {
  using A = accum_t<T>;
  using E = Element<Loss, A>;
  constexpr int kPart = kLanes16<T>, kL = kPart * kWideParts, kV = kPointwiseTile / kL, kSums = Loss::sums;
  const T* input = static_cast<const T*>(p.a.operands[0].data);
  const T* target = static_cast<const T*>(p.a.operands[1].data);
  T* grads[2] = {static_cast<T*>(p.a.grads[0].data), static_cast<T*>(p.a.grads[1].data)};
  const bool wide = p.config.wide, sums_rows = p.config.sums_rows;
  const gpu::Params<A> params = gpu::params_of<A>(p.a);
  A scale[kSums];
  row_scale<Loss>(p, 0, scale);
  const int64_t vectors = p.a.cols / kL, tile = int64_t(kPointwiseThreads) * kV;
  RowSums<Loss> sums;
  E e;
#pragma unroll
  for (int k = 2; k < Loss::operands; ++k) e.x[k] = A(1);
  for (int64_t base = blockIdx.x * tile + threadIdx.x; base < vectors; base += gridDim.x * tile) {
    VecWide x[kV], t[kV];  // all loads go out before the first is used
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const int64_t at = base + j * kPointwiseThreads;
      if (at < vectors) {
        x[j] = load_wide_stream(input + at * kL, wide);
        t[j] = load_wide_stream(target + at * kL, wide);
      }
    }
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const int64_t at = base + j * kPointwiseThreads;
      if (at >= vectors) continue;
      VecWide out[2];
      typename E::sum_t part[kSums] = {};
#pragma unroll
      for (int h = 0; h < kWideParts; ++h) {
        A xs[kPart], ts[kPart], g[2][kPart];
        unpack<T>(x[j].part[h], xs);
        unpack<T>(t[j].part[h], ts);
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          e.x[0] = xs[i];
          e.x[1] = ts[i];
          e.evaluate(params);
#pragma unroll
          for (int s = 0; s < kSums; ++s) part[s] += e.term(s, A(1), params);
          g[0][i] = e.grad(0, A(1), scale);
          g[1][i] = e.grad(1, A(1), scale);
        }
        out[0].part[h] = pack<T>(g[0]);
        out[1].part[h] = pack<T>(g[1]);
      }
      if (sums_rows)
#pragma unroll
        for (int s = 0; s < kSums; ++s) sums.term[s] += double(part[s]);
      if (grads[0]) store_wide_stream(grads[0] + at * kL, out[0], wide);
      if (grads[1]) store_wide_stream(grads[1] + at * kL, out[1], wide);
    }
  }
  for (int64_t i = vectors * kL + blockIdx.x * blockDim.x + threadIdx.x; i < p.a.cols; i += gridDim.x * blockDim.x) {
    e.x[0] = to_accum(input[i]);
    e.x[1] = to_accum(target[i]);
    e.evaluate(params);
#pragma unroll
    for (int s = 0; s < kSums; ++s) sums.term[s] += double(e.term(s, A(1), params));
    if (grads[0]) grads[0][i] = from_accum<T>(e.grad(0, A(1), scale));
    if (grads[1]) grads[1][i] = from_accum<T>(e.grad(1, A(1), scale));
  }
  if (sums_rows) finish_row(p, 0, blockIdx.x, sums);
}

// ---- general

// Where element i of an operand is.
__device__ __forceinline__ int64_t offset_of(const PointwiseParams& p, const PointwiseOperand& o, bool flat,
                                             int64_t i) {
  if (flat) return i;
  int64_t offset = 0;
#pragma unroll 1
  for (int k = p.a.dim - 1; k > 0; --k) {
    const Divided d = divide(i, p.a.sizes[k], p.inverse_sizes[k]);
    offset += d.rest * o.strides[k];
    i = d.quotient;
  }
  return offset + i * o.strides[0];
}
// How many elements from i on lie along the last axis.
__device__ __forceinline__ int64_t run_from(const PointwiseParams& p, int64_t i) {
  const int last = p.a.dim - 1;
  return p.a.sizes[last] - (last > 0 ? divide(i, p.a.sizes[last], p.inverse_sizes[last]).rest : i);
}

// f(T*) with the storage type of an operand whose accumulation type is A, which has no doubles unless that is double.
template <class A, class F>
__device__ __forceinline__ void with_storage(DType type, const F& f) {
  switch (type) {
    case DType::f16: return f(static_cast<half_t*>(nullptr));
    case DType::bf16: return f(static_cast<bfloat16_t*>(nullptr));
    case DType::f64:
      if constexpr (sizeof(A) == 8) f(static_cast<double*>(nullptr));
      return;
    default: f(static_cast<float*>(nullptr));
  }
}

// Elements i, ..., i + kN - 1 of an operand: neighbours along the last axis. All ones where it is absent.
template <int kN, class A>
__device__ __forceinline__ void load_group(const PointwiseParams& p, const PointwiseOperand& o, bool flat, int64_t i,
                                           A (&out)[kN]) {
  if (!o.data) {
#pragma unroll
    for (int e = 0; e < kN; ++e) out[e] = A(1);
    return;
  }
  const int64_t offset = offset_of(p, o, flat, i), stride = flat ? 1 : o.strides[p.a.dim - 1];
  with_storage<A>(o.type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* from = static_cast<const T*>(o.data) + offset;
    if (kN > 1 && stride == 0) {
      const A value = A(to_accum(*from));
#pragma unroll
      for (int e = 0; e < kN; ++e) out[e] = value;
    } else {
      load_run_of(from, stride, out);
    }
  });
}
template <int kN, class A>
__device__ __forceinline__ void store_group(const PointwiseParams& p, const PointwiseOperand& o, bool flat, int64_t i,
                                            const A (&in)[kN]) {
  const int64_t offset = offset_of(p, o, flat, i), stride = flat ? 1 : o.strides[p.a.dim - 1];
  with_storage<A>(o.type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    constexpr int kL = kLanes16<T>;
    T* to = static_cast<T*>(o.data) + offset;
    if constexpr (kN % kL == 0) {
      if (stride == 1 && aligned16(to)) {
#pragma unroll
        for (int v = 0; v < kN / kL; ++v) {
          accum_t<T> part[kL];
#pragma unroll
          for (int e = 0; e < kL; ++e) part[e] = accum_t<T>(in[v * kL + e]);
          store16_stream(to + v * kL, pack<T>(part));
        }
        return;
      }
    }
#pragma unroll
    for (int e = 0; e < kN; ++e) to[e * stride] = from_accum<T>(accum_t<T>(in[e]));
  });
}
// Which of them the mask lets pass.
template <int kN>
__device__ __forceinline__ void load_mask(const PointwiseParams& p, int64_t i, bool (&counts)[kN]) {
  const PointwiseOperand& o = p.a.mask;
#pragma unroll
  for (int e = 0; e < kN; ++e) counts[e] = true;
  if (!o.data) return;
  const int64_t stride = p.mask_is_flat ? 1 : o.strides[p.a.dim - 1];
  const unsigned char* from = static_cast<const unsigned char*>(o.data) + offset_of(p, o, p.mask_is_flat, i);
  if (kN == 8 && stride == 1 && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
    const Vec8 bytes = load8_stream(from);
#pragma unroll
    for (int e = 0; e < kN; ++e) counts[e] = bytes.word[e / 4] >> (8 * (e % 4)) & 0xffu;
  } else {
#pragma unroll
    for (int e = 0; e < kN; ++e) counts[e] = from[e * stride];
  }
}

// kN neighbours: their loss, gradients and parts in the sums.
template <int kN, class Loss, class A>
__device__ __forceinline__ void take(const PointwiseParams& p, const gpu::Params<A>& params,
                                     const A (&scale)[Loss::sums], int64_t i, RowSums<Loss>& sums) {
  constexpr int kOperands = Loss::operands, kSums = Loss::sums;
  const PointwiseArgs& a = p.a;
  A x[kOperands][kN], m[kN];
  bool counts[kN];
#pragma unroll
  for (int k = 0; k < kOperands; ++k) load_group(p, a.operands[k], p.operand_is_flat[k], i, x[k]);
  load_group(p, a.weight, p.weight_is_flat, i, m);
  load_mask(p, i, counts);
#pragma unroll
  for (int e = 0; e < kN; ++e) {  // a masked element is x_k = 1 with weight 0: nothing of what it holds is used
    if (!counts[e]) m[e] = A(0);
#pragma unroll
    for (int k = 0; k < kOperands; ++k)
      if (!counts[e]) x[k][e] = A(1);
    if (a.weight_denominator == 0) sums.denominator += counts[e] ? 1.0 : 0.0;
  }
  if (a.multiplier.data) {
    A g[kN];
    load_group(p, a.multiplier, p.multiplier_is_flat, i, g);
#pragma unroll
    for (int e = 0; e < kN; ++e) m[e] = m[e] == A(0) ? A(0) : m[e] * g[e];
  }
  if (a.weight_denominator != 0)
#pragma unroll
    for (int e = 0; e < kN; ++e) sums.denominator += double(m[e]);
  if constexpr (Loss::checks) {  // one report at most, whose code is there once
    int at = -1, operand = 0;
    double found = 0;
#pragma unroll
    for (int e = 0; e < kN; ++e)
#pragma unroll
      for (int k = 0; k < kOperands; ++k)
        if (!gpu::is_in(Loss::domain(k), x[k][e])) at = e, operand = k, found = double(x[k][e]);
    if (at >= 0 && p.record) {
      int64_t bits;
      memcpy(&bits, &found, sizeof bits);
      record_bad_target(p.record, i + at, bits, outside_domain(Loss::domain(operand), operand));
    }
  }
  Element<Loss, A> element[kN];
  typename Element<Loss, A>::sum_t part[kSums] = {};
#pragma unroll
  for (int e = 0; e < kN; ++e) {
#pragma unroll
    for (int k = 0; k < kOperands; ++k) element[e].x[k] = x[k][e];
    element[e].evaluate(params);
#pragma unroll
    for (int j = 0; j < kSums; ++j) part[j] += element[e].term(j, m[e], params);
  }
  if (p.config.sums_rows)
#pragma unroll
    for (int j = 0; j < kSums; ++j) sums.term[j] += double(part[j]);
  A out[kN];
  if (a.loss_elements.data) {
#pragma unroll
    for (int e = 0; e < kN; ++e) out[e] = m[e] * element[e].jet.value[0];
    store_group(p, a.loss_elements, p.loss_is_flat, i, out);
  }
#pragma unroll
  for (int k = 0; k < kOperands; ++k) {
    if (!a.grads[k].data) continue;
#pragma unroll
    for (int e = 0; e < kN; ++e) out[e] = element[e].grad(k, m[e], scale);
    store_group(p, a.grads[k], p.grad_is_flat[k], i, out);
  }
}

// On a multiprocessor at a time, at least: as many as leave each thread the registers that it needs.
template <class Loss, class A>
constexpr int kGeneralBlocks = sizeof(A) > 4 || Loss::operands > 2 || Loss::sums > 1 || kWideParts > 1 ? 2 : 3;

template <class Loss, class A>
__global__ void __launch_bounds__(kPointwiseThreads, kGeneralBlocks<Loss, A>)
    pointwise_general_kernel(const PointwiseParams p) {
  constexpr int kGroup = kPointwiseGroup / int(sizeof(A));
  const PointwiseArgs& a = p.a;
  const gpu::Params<A> params = gpu::params_of<A>(a);
  const bool vectors = p.config.regime == PointwiseRegime::vectors;
  const int64_t parts = p.config.parts, items = a.rows * parts, step = vectors ? kGroup : 1;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Divided of_parts = divide(item, parts, p.inverse_parts);
    const int64_t row = of_parts.quotient, part = of_parts.rest;
    A scale[Loss::sums];
    row_scale<Loss>(p, row, scale);
    RowSums<Loss> sums;
    for (int64_t col = (part * blockDim.x + threadIdx.x) * step; col < a.cols; col += parts * blockDim.x * step) {
      const int64_t i = row * a.cols + col, count = a.cols - col;
      if (vectors && count >= kGroup && run_from(p, i) >= kGroup) {
        take<kGroup>(p, params, scale, i, sums);
      } else {
#pragma unroll 1
        for (int e = 0; e < step && e < count; ++e) take<1>(p, params, scale, i + e, sums);
      }
    }
    if (!p.config.sums_rows || !finish_row(p, row, part, sums)) continue;
    if (!a.wants_grads() || !may_divide_by_zero(a)) continue;
    double* denominator = reinterpret_cast<double*>(shared_memory() + kPointwiseShared) - 2;
    if (threadIdx.x == 0) *denominator = sums.denominator;
    block_barrier();
    if (*denominator != 0) continue;
    const A nan[1] = {A(NAN)};  // weights that add up to 0
    for (int64_t col = threadIdx.x; col < a.cols; col += blockDim.x)
      for (int k = 0; k < Loss::operands; ++k)
        if (a.grads[k].data) store_group(p, a.grads[k], p.grad_is_flat[k], row * a.cols + col, nan);
  }
}

}  // namespace fastloss
