// Row losses on the GPU: see row_loss.h.
//   row_loss_forward_kernel   the loss of each row; partial sums per block
//   row_loss_finish_kernel    one block adds the partial sums up in order
//   row_loss_zero_kernel      zeros for a gradient that is not one dense piece of memory
//   row_loss_target_kernel    one thread per row writes the one element that is not 0, of a loss without sums
//   row_loss_gradient_kernel  the gradient of a loss with sums
// kLanes threads share a row: one where a single element of it is read, or where adjacent rows are adjacent in memory;
// a warp where adjacent classes are. So the threads of a warp read next to each other.
#pragma once
#include <math.h>

#include "../common/convert.cuh"
#include "../common/errors_cuda.cuh"
#include "row_losses.h"

namespace fastloss {

constexpr int kRowLossThreads = 256;
constexpr int kRowLossMaxBlocks = 512;

struct RowLossParams {
  RowLossArgs args;
  double* partials;  // [2][blocks]: loss, weight; null: no sums wanted
  int blocks;
  BadTargetRecord* record;
};

template <class P>
__device__ __forceinline__ P* row_of(P* x, const Strides& s, int64_t row, int64_t inner) {
  return x + row / inner * s.outer + row % inner * s.inner;
}
template <class T>
__device__ __forceinline__ double weight_of(const RowLossArgs& a, int64_t t) {
  return a.weight ? double(static_cast<const accum_t<T>*>(a.weight)[t]) : 1.0;
}

// The loss and grad_output have the input's dtype, or float32 for 16-bit input (autocast).
template <class T>
__device__ __forceinline__ bool is_float_loss(const RowLossArgs& a) {
  return sizeof(T) == 2 && a.loss_type == DType::f32;
}
template <class T>
__device__ __forceinline__ void store_loss(const RowLossArgs& a, int64_t i, double v) {
  const accum_t<T> loss = accum_t<T>(v);
  if (is_float_loss<T>(a))
    static_cast<float*>(a.loss)[i] = float(loss);
  else
    static_cast<T*>(a.loss)[i] = from_accum<T>(loss);
}

// v w_t grad_output / D; 0 stays 0, whatever grad_output is.
template <class T>
__device__ __forceinline__ accum_t<T> scaled(double v, const RowLossArgs& a, int64_t row, int64_t t, double per_total) {
  const int64_t i = a.grad_output_per_row ? row : 0;
  const double g = is_float_loss<T>(a) ? double(static_cast<const float*>(a.grad_output)[i])
                                       : double(to_accum(static_cast<const T*>(a.grad_output)[i]));
  return v == 0 ? accum_t<T>(0) : accum_t<T>(v * weight_of<T>(a, t) * g * per_total);
}
template <class T>
__device__ __forceinline__ double one_over_total(const RowLossArgs& a) {
  return a.reduction == Reduction::mean ? 1 / double(*static_cast<const accum_t<T>*>(a.total_weight)) : 1.0;
}

// The loss of a row [classes] with target t, before its weight; kLanes threads of the same row take part.
template <class Loss, class T, int kLanes>
__device__ __forceinline__ FinishedRow finish_row(const RowLossArgs& a, const T* row, int64_t t) {
  using A = accum_t<T>;
  const int64_t stride = a.input_strides.cls;
  A x_t = 0;
  if (!Loss::linear || row) x_t = to_accum(row[t * stride]);
  double sums[Loss::sums + 1] = {};
  if constexpr (Loss::sums > 0) {
    const RowParams<A> p = row_params<A>(a);
#pragma unroll 4
    for (int64_t c = threadIdx.x % kLanes; c < a.classes; c += kLanes) {
      const auto terms = Loss::terms(to_accum(row[c * stride]), x_t, p);
      for (int k = 0; k < Loss::sums; ++k) sums[k] += c == t ? 0.0 : double(terms.value[k]);
    }
    for (int k = 0; k < Loss::sums; ++k) sums[k] = group_sum(sums[k], kLanes);
  }
  return Loss::finish(sums, double(x_t), double(a.classes), row_params<double>(a));
}

// Sums of doubles in a fixed order: each block over a fixed share of the rows. Four blocks per multiprocessor are
// enough for it to stay busy; unasked, the compiler spills to have eight.
template <class Loss, class T, int kLanes>
__global__ void __launch_bounds__(kRowLossThreads, 4) row_loss_forward_kernel(const RowLossParams p) {
  const RowLossArgs& a = p.args;
  double* scratch = reinterpret_cast<double*>(shared_memory());
  double loss_sum = 0, weight_sum = 0;
  const int64_t rows = a.rows(), step = int64_t(gridDim.x) * (blockDim.x / kLanes);
  const bool is_first = threadIdx.x % kLanes == 0;
  for (int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes; row < rows; row += step) {
    const int64_t t = load_index(a.target, a.index_type, row);
    double loss = 0, weight = 0;
    if (a.counts(t)) {
      if (a.has_class(t)) {
        const double w = weight_of<T>(a, t);
        const T* elements = row_of(static_cast<const T*>(a.input), a.input_strides, row, a.inner);
        loss = w * finish_row<Loss, T, kLanes>(a, elements, t).value;
        weight = a.mean_over_rows ? 1 : w;
      } else {
        loss = double(NAN);
        if (is_first) record_bad_target(p.record, row, t);
      }
    }
    if (!is_first) continue;
    weight_sum += weight;
    loss_sum += loss;
    if (a.reduction == Reduction::none) store_loss<T>(a, row, loss + 0.0);
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
__global__ void __launch_bounds__(kRowLossThreads) row_loss_finish_kernel(const RowLossParams p) {
  const RowLossArgs& a = p.args;
  double* scratch = reinterpret_cast<double*>(shared_memory());
  double loss = 0, weight = 0;
  for (int i = threadIdx.x; i < p.blocks; i += blockDim.x) {
    loss += p.partials[i];
    weight += p.partials[p.blocks + i];
  }
  loss = block_sum(loss, scratch);
  weight = block_sum(weight, scratch + kWarp);
  if (threadIdx.x != 0) return;
  if (a.total_weight) *static_cast<accum_t<T>*>(a.total_weight) = accum_t<T>(weight);
  if (a.reduction != Reduction::none) store_loss<T>(a, 0, a.reduction == Reduction::mean ? loss / weight : loss);
}

template <class T>
__global__ void __launch_bounds__(kRowLossThreads) row_loss_zero_kernel(const RowLossParams p) {
  const RowLossArgs& a = p.args;
  const int64_t count = a.rows() * a.classes, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t o = i / (a.classes * a.inner), c = i / a.inner % a.classes;
    static_cast<T*>(a.grad)[o * a.grad_strides.outer + c * a.grad_strides.cls + i % a.inner * a.grad_strides.inner] =
        from_accum<T>(accum_t<T>(0));
  }
}

template <class Loss, class T>
__global__ void __launch_bounds__(kRowLossThreads) row_loss_target_kernel(const RowLossParams p) {
  const RowLossArgs& a = p.args;
  const int64_t rows = a.rows(), step = int64_t(gridDim.x) * blockDim.x;
  const double per_total = one_over_total<T>(a);
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < rows; row += step) {
    const int64_t t = load_index(a.target, a.index_type, row);
    if (!a.counts(t) || !a.has_class(t)) continue;
    const T* elements = Loss::linear ? nullptr : row_of(static_cast<const T*>(a.input), a.input_strides, row, a.inner);
    const double at = finish_row<Loss, T, 1>(a, elements, t).at_target;
    row_of(static_cast<T*>(a.grad), a.grad_strides, row, a.inner)[t * a.grad_strides.cls] =
        from_accum<T>(scaled<T>(at, a, row, t, per_total));
  }
}

template <class Loss, class T, int kLanes>
__global__ void __launch_bounds__(kRowLossThreads, 4) row_loss_gradient_kernel(const RowLossParams p) {
  using A = accum_t<T>;
  const RowLossArgs& a = p.args;
  const int64_t rows = a.rows(), step = int64_t(gridDim.x) * (blockDim.x / kLanes);
  const double per_total = one_over_total<T>(a);
  const RowParams<A> params = row_params<A>(a);
  for (int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes; row < rows; row += step) {
    int64_t t = load_index(a.target, a.index_type, row);
    if (!a.counts(t) || !a.has_class(t)) t = -1;
    const T* elements = row_of(static_cast<const T*>(a.input), a.input_strides, row, a.inner);
    A at_target = 0, factor = 0, x_t = 0;
    if (t >= 0) {
      const FinishedRow finished = finish_row<Loss, T, kLanes>(a, elements, t);
      at_target = scaled<T>(finished.at_target, a, row, t, per_total);
      factor = scaled<T>(finished.factor, a, row, t, per_total);
      x_t = to_accum(elements[t * a.input_strides.cls]);
    }
    T* to = row_of(static_cast<T*>(a.grad), a.grad_strides, row, a.inner);
    for (int64_t c = threadIdx.x % kLanes; c < a.classes; c += kLanes) {
      A g = at_target;
      if (c != t) {
        const A slope = t < 0 ? A(0) : Loss::slope(to_accum(elements[c * a.input_strides.cls]), x_t, params);
        g = slope == A(0) ? A(0) : slope * factor;
      }
      to[c * a.grad_strides.cls] = from_accum<T>(g);
    }
  }
}

}  // namespace fastloss
