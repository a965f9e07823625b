// Negative log likelihood on the GPU: see nll_loss.h.
//   nll_loss_forward_kernel  one thread per row, one gathered element each; partial sums per block
//   nll_loss_finish_kernel   one block adds the partial sums up in order
//   nll_loss_zero_kernel     zeros for a gradient that is not one dense piece of memory
//   nll_loss_scatter_kernel  one thread per row writes the one element that is not 0
#pragma once
#include <math.h>

#include "../common/convert.cuh"
#include "../common/errors_cuda.cuh"
#include "nll_loss.h"

namespace fastloss {

constexpr int kNllThreads = 256;
constexpr int kNllMaxBlocks = 512;

template <class A>
struct NllLossParams {
  const void* input;
  const void* target;
  const A* weight;
  void* loss;
  A* total_weight;
  const void* grad_output;
  void* grad;
  double* partials;  // [2][blocks]: loss, weight; null: no sums wanted
  int blocks;
  BadTargetRecord* record;
  Strides input_strides, grad_strides;
  int64_t outer, classes, inner, rows, ignore_index;
  IndexType index_type;
  DType loss_type;  // of loss and grad_output
  Reduction reduction;
  bool grad_output_per_row;
};

__device__ __forceinline__ int64_t element_offset(const Strides& s, int64_t row, int64_t inner, int64_t c) {
  return row / inner * s.outer + row % inner * s.inner + c * s.cls;
}

// The loss and grad_output have the input's dtype, or float32 for 16-bit input (autocast).
template <class T>
__device__ __forceinline__ bool is_float_loss(const NllLossParams<accum_t<T>>& p) {
  return sizeof(T) == 2 && p.loss_type == DType::f32;
}
template <class T>
__device__ __forceinline__ void store_loss(const NllLossParams<accum_t<T>>& p, int64_t i, double v) {
  const accum_t<T> loss = accum_t<T>(v);
  if (is_float_loss<T>(p))
    static_cast<float*>(p.loss)[i] = float(loss);
  else
    static_cast<T*>(p.loss)[i] = from_accum<T>(loss);
}

// Sums of doubles in a fixed order: each block over a fixed share of the rows. Four blocks per multiprocessor are
// enough for it to stay busy; unasked, the compiler spills to have eight.
template <class T>
__global__ void __launch_bounds__(kNllThreads, 4) nll_loss_forward_kernel(const NllLossParams<accum_t<T>> p) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const T* x = static_cast<const T*>(p.input);
  double loss_sum = 0, weight_sum = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < p.rows; row += step) {
    const int64_t t = load_index(p.target, p.index_type, row);
    double loss = 0;
    if (t >= 0 && t < p.classes && t != p.ignore_index) {
      const double w = p.weight ? double(p.weight[t]) : 1.0;
      loss = -w * double(to_accum(x[element_offset(p.input_strides, row, p.inner, t)]));
      weight_sum += w;
      loss_sum += loss;
    } else if (t != p.ignore_index) {
      loss = double(NAN);
      loss_sum += loss;
      record_bad_target(p.record, row, t);
    }
    if (p.reduction == Reduction::none) store_loss<T>(p, row, loss + 0.0);
  }
  if (!p.partials) return;
  loss_sum = block_sum(loss_sum, scratch);
  weight_sum = block_sum(weight_sum, scratch + kWarp);
  if (threadIdx.x == 0) {
    p.partials[blockIdx.x] = loss_sum;
    p.partials[gridDim.x + blockIdx.x] = weight_sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kNllThreads) nll_loss_finish_kernel(const NllLossParams<accum_t<T>> p) {
  using A = accum_t<T>;
  double* scratch = reinterpret_cast<double*>(shared_memory());
  double loss = 0, weight = 0;
  for (int i = threadIdx.x; i < p.blocks; i += blockDim.x) {
    loss += p.partials[i];
    weight += p.partials[p.blocks + i];
  }
  loss = block_sum(loss, scratch);
  weight = block_sum(weight, scratch + kWarp);
  if (threadIdx.x != 0) return;
  if (p.total_weight) *p.total_weight = A(weight);
  if (p.reduction != Reduction::none) store_loss<T>(p, 0, p.reduction == Reduction::mean ? loss / weight : loss);
}

template <class T>
__global__ void __launch_bounds__(kNllThreads) nll_loss_zero_kernel(const NllLossParams<accum_t<T>> p) {
  const int64_t count = p.rows * p.classes, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t o = i / (p.classes * p.inner), c = i / p.inner % p.classes;
    static_cast<T*>(p.grad)[o * p.grad_strides.outer + c * p.grad_strides.cls + i % p.inner * p.grad_strides.inner] =
        from_accum<T>(accum_t<T>(0));
  }
}

template <class T>
__global__ void __launch_bounds__(kNllThreads) nll_loss_scatter_kernel(const NllLossParams<accum_t<T>> p) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  const double per_total = p.reduction == Reduction::mean ? 1 / double(*p.total_weight) : 1.0;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < p.rows; row += step) {
    const int64_t t = load_index(p.target, p.index_type, row);
    if (t < 0 || t >= p.classes || t == p.ignore_index) continue;
    const double w = p.weight ? double(p.weight[t]) : 1.0;
    const int64_t at = p.grad_output_per_row ? row : 0;
    const double g = is_float_loss<T>(p) ? double(static_cast<const float*>(p.grad_output)[at])
                                         : double(to_accum(static_cast<const T*>(p.grad_output)[at]));
    static_cast<T*>(p.grad)[element_offset(p.grad_strides, row, p.inner, t)] =
        from_accum<T>(accum_t<T>(-w * g * per_total));
  }
}

}  // namespace fastloss
