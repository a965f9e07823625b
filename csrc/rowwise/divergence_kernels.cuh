// Divergences of two softmaxes on the GPU: see divergence.h and divergence_math.h.
//   divergence_kernel         value and gradients of rows, or the gradients from what forward has saved; partial sums
//   of
//                             the values per block
//   divergence_finish_kernel  one block adds the partial sums up in order
//
// kGroup threads share a row: one where adjacent rows are adjacent in memory; a warp where adjacent classes are and the
// row is short; a block (kGroup 0) where it is long. So the threads of a warp read next to each other: 16 bytes each
// and more where logits and gradients can be, whatever the length of the rows.
//
// A row is walked for the largest logits and the sums of exponentials, for its value (and the gradient by q's logits of
// kl), and for other gradients, back from its end. The first walk reads from memory. The others find the row in the L2:
// long rows have blocks of 512 threads, of which a multiprocessor holds one, so that few rows are under way.
//
// Dtypes are told apart at run time, once per access; A is what is computed with.
#pragma once
#include <math.h>

#include "../common/convert.cuh"
#include "../common/lanes_gpu.cuh"
#include "divergence_math.h"

namespace fastloss {

constexpr int kDivergenceThreads = 256;
constexpr int kDivergenceMaxBlocks = 4096;
template <class A>
constexpr int kDivergenceMostThreads = sizeof(A) == 8 ? 256 : 512;  // of a block, so that registers suffice
template <class A>
constexpr int kPairRun = sizeof(A) == 8 ? 1 : 4;  // classes that a thread takes together
constexpr int kPairSums = 4;
constexpr int kDivergenceShared = kPairSums * kWarp * int(sizeof(double));

struct DivergenceParams {
  DivergenceArgs a;
  double* partials;  // [blocks]; null: no sum wanted
  int blocks;
  bool backward;
};

// v[i] combined over the threads of a row; all of them get the same result.
template <int kGroup, int kCount, class V, class Op>
__device__ __forceinline__ void all_reduce(V (&v)[kCount], void* shared, const Op& op) {
  if constexpr (kGroup != 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      for (int o = kWarp / 2; o > 0; o >>= 1) v[i] = op(v[i], __shfl_xor_sync(kFullMask, v[i], o));
  }
  if constexpr (kGroup == 0) {
    V* scratch = static_cast<V*>(shared);
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    if (threadIdx.x % kWarp == 0)
      for (int i = 0; i < kCount; ++i) scratch[i * kWarp + warp] = v[i];
    block_barrier();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = scratch[i * kWarp];
      for (int w = 1; w < warps; ++w) v[i] = op(v[i], scratch[i * kWarp + w]);
    }
    block_barrier();  // before the next use of the scratch
  }
}

// N classes from x[0] on: by one access of 16 or 8 bytes where N is more than 1, which the caller has aligned.
template <int N, class T, class A>
__device__ __forceinline__ void load_classes(const T* x, A (&out)[N]) {
  constexpr int kBytes = N * int(sizeof(T));
  if constexpr (kBytes == 16 || (kBytes == 8 && N > 1)) {
    accum_t<T> v[N];
    if constexpr (kBytes == 16)
      unpack<T>(load16(x), v);
    else
      unpack<T>(load8_stream(x), v);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = A(v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = A(to_accum(x[i]));
  }
}
template <int N, class T, class A>
__device__ __forceinline__ void store_classes(T* x, const A (&in)[N]) {
  constexpr int kBytes = N * int(sizeof(T));
  if constexpr (kBytes == 16 || (kBytes == 8 && N > 1)) {
    accum_t<T> v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = accum_t<T>(in[i]);
    if constexpr (kBytes == 16)
      store16_stream(x, pack<T>(v));
    else
      store8_stream(x, pack<T>(v));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = from_accum<T>(accum_t<T>(in[i]));
  }
}
template <int N, class A>
__device__ __forceinline__ void load_logits(const DivergenceOperand& o, int64_t at, int64_t c, A (&out)[N]) {
  at += c * o.strides.cls;
  switch (o.type) {
    case DType::f32: return load_classes<N>(static_cast<const float*>(o.logits) + at, out);
    case DType::f16: return load_classes<N>(static_cast<const half_t*>(o.logits) + at, out);
    case DType::bf16: return load_classes<N>(static_cast<const bfloat16_t*>(o.logits) + at, out);
    case DType::f64:
      if constexpr (sizeof(A) == 8) load_classes<N>(static_cast<const double*>(o.logits) + at, out);
  }
}
template <int N, class A>
__device__ __forceinline__ void store_grad(const DivergenceOperand& o, int64_t at, int64_t c, const A (&in)[N]) {
  at += c * o.grad_strides.cls;
  switch (o.type) {
    case DType::f32: return store_classes<N>(static_cast<float*>(o.grad) + at, in);
    case DType::f16: return store_classes<N>(static_cast<half_t*>(o.grad) + at, in);
    case DType::bf16: return store_classes<N>(static_cast<bfloat16_t*>(o.grad) + at, in);
    case DType::f64:
      if constexpr (sizeof(A) == 8) store_classes<N>(static_cast<double*>(o.grad) + at, in);
  }
}

// Where a row lies.
struct PairPlace {
  int64_t p, q, grad_p, grad_q;  // its first class, in elements
  int64_t first;                 // the class from which on runs of kRun are aligned everywhere; -1: there is none

  template <int kRun>
  __device__ __forceinline__ static PairPlace of(const DivergenceArgs& a, int64_t row,
                                                 std::integral_constant<int, kRun>) {
    const int64_t o = row / a.inner, i = row % a.inner;
    const auto begin = [&](const Strides& s) { return o * s.outer + i * s.inner; };
    PairPlace at{begin(a.p.strides), begin(a.q.strides), begin(a.p.grad_strides), begin(a.q.grad_strides), -1};
    const int64_t first = to_run(a.p.logits, a.p.type, at.p, a.p.strides.cls, kRun);
    if (to_run(a.q.logits, a.q.type, at.q, a.q.strides.cls, kRun) == first &&
        (!a.p.grad || to_run(a.p.grad, a.p.type, at.grad_p, a.p.grad_strides.cls, kRun) == first) &&
        (!a.q.grad || to_run(a.q.grad, a.q.type, at.grad_q, a.q.grad_strides.cls, kRun) == first))
      at.first = first;
    return at;
  }
  // Classes to the next whole run.
  __device__ __forceinline__ static int64_t to_run(const void* x, DType t, int64_t at, int64_t stride, int run) {
    const int64_t size = size_of(t), bytes = run * size;
    const int64_t past = (static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16) + at * size) & (bytes - 1);
    return stride == 1 ? ((bytes - past) & (bytes - 1)) / size : -1;
  }
};

// body(class, N) for the N classes that a thread takes together, until the threads of the row have taken all of them;
// `back`: from the end on.
template <class A, int kGroup, class Body>
__device__ __forceinline__ void for_classes(const DivergenceArgs& a, const PairPlace& at, bool back, const Body& body) {
  constexpr int kRun = kPairRun<A>;
  const int threads = kGroup == 0 ? int(blockDim.x) : kGroup, thread = threadIdx.x % threads;
  int64_t first = a.classes, runs = 0;  // by themselves; those from `first` on in runs, then the rest
  if constexpr (kGroup != 1 && kRun > 1)
    if (at.first >= 0) {  // less than kRun
      first = at.first, runs = (a.classes - first) / kRun;
      for (int64_t i = thread; i < runs; i += threads)
        body(first + (back ? runs - 1 - i : i) * kRun, std::integral_constant<int, kRun>{});
    }
  for (int64_t i = thread; i < a.classes - runs * kRun; i += threads)
    body(i < first ? i : i + runs * kRun, std::integral_constant<int, 1>{});
}

// Brings a thread's largest logit, and the sum of exp((x - max) / T), up to date.
template <int N, class A, class Sum>
__device__ __forceinline__ void add_exponentials(const A (&x)[N], A inv_temperature, A* max, Sum* sum) {
  A top = *max;
#pragma unroll
  for (int i = 0; i < N; ++i) top = max_of(top, x[i]);
  const A ref = top > A(-INFINITY) ? top : A(0);
  if (top > *max) *sum *= Sum(exp((*max - ref) * inv_temperature));
  A part = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) part += exp((x[i] - ref) * inv_temperature);
  *sum += Sum(part);
  *max = top;
}

template <class A, int kGroup>
__device__ __forceinline__ gpu::PairRow<A> pair_row_of(const DivergenceArgs& a, const PairPlace& at,
                                                       A inv_temperature) {
  using Sum = std::conditional_t<kGroup == 1, double, A>;  // one thread adds up all classes
  A max[2] = {A(-INFINITY), A(-INFINITY)};
  Sum sum[2] = {0, 0};
  for_classes<A, kGroup>(a, at, /*back=*/false, [&](int64_t c, auto n) {
    A x_p[n.value], x_q[n.value];
    load_logits(a.p, at.p, c, x_p);
    load_logits(a.q, at.q, c, x_q);
    add_exponentials(x_p, inv_temperature, &max[0], &sum[0]);
    add_exponentials(x_q, inv_temperature, &max[1], &sum[1]);
  });
  A top[2] = {max[0], max[1]};
  all_reduce<kGroup>(top, shared_memory(), [](A x, A y) { return max_of(x, y); });
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const A ref = top[i] > A(-INFINITY) ? top[i] : A(0);
    sum[i] *= Sum(exp((max[i] - ref) * inv_temperature));
  }
  all_reduce<kGroup>(sum, shared_memory(), [](Sum x, Sum y) { return x + y; });
  return gpu::pair_row(top[0], A(sum[0]), top[1], A(sum[1]));
}

template <class A, int kGroup>
__global__ void __launch_bounds__(kGroup == 0 ? kDivergenceMostThreads<A> : kDivergenceThreads)
    divergence_kernel(const DivergenceParams params) {
  using Sum = std::conditional_t<kGroup == 1, double, A>;
  const DivergenceArgs& a = params.a;
  const gpu::PairCall<A> k = gpu::pair_call<A>(a);
  const int threads = kGroup == 0 ? int(blockDim.x) : kGroup;
  const bool leads = threadIdx.x % threads == 0;
  const int64_t rows = a.rows(), step = int64_t(gridDim.x) * (blockDim.x / threads);
  const double total = a.total ? double(*static_cast<const A*>(a.total)) : double(rows);
  const double per_row = a.reduction == Reduction::mean ? a.scale / total : a.scale;
  A* saved = static_cast<A*>(a.saved);
  double sum = 0;
  for (int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / threads; row < rows; row += step) {
    const PairPlace at = PairPlace::of(a, row, std::integral_constant<int, kPairRun<A>>{});
    const A weight = a.weight ? static_cast<const A*>(a.weight)[row] : A(1);
    const bool counts = weight != A(0);
    const double g =
        !params.backward ? 1.0 : load_as<double>(a.grad_output, a.loss_type, a.grad_output_per_row ? row : 0);
    const A factor = A(g * per_row * double(weight) * double(k.inv_temperature));
    gpu::PairRow<A> r{};
    A mean_p = 0, mean_q = 0;
    bool by_p = a.p.grad, by_q = a.q.grad;
    if (params.backward) {
      r = {saved[row], saved[rows + row], saved[2 * rows + row], saved[3 * rows + row], saved[4 * rows + row]};
      mean_p = saved[5 * rows + row], mean_q = saved[6 * rows + row];
    } else {
      double value = 0;
      if (counts) {
        r = pair_row_of<A, kGroup>(a, at, k.inv_temperature);
        const bool soon = by_q && !k.js;
        Sum sums[kPairSums] = {};
        for_classes<A, kGroup>(a, at, /*back=*/true, [&](int64_t c, auto n) {
          A x_p[n.value], x_q[n.value];
          load_logits(a.p, at.p, c, x_p);
          load_logits(a.q, at.q, c, x_q);
#pragma unroll
          for (int i = 0; i < n.value; ++i) {
            const gpu::PairTerms<A> t = gpu::pair_terms(x_p[i], x_q[i], r, k);
            sums[0] += t.value, sums[1] += t.by_p, sums[2] += t.by_q, sums[3] += t.excess;
            x_q[i] = factor * t.by_q;
          }
          if (soon) store_grad(a.q, at.grad_q, c, x_q);
        });
        all_reduce<kGroup>(sums, shared_memory(), [](Sum x, Sum y) { return x + y; });
        value = double(weight) * gpu::row_divergence(double(sums[0]), double(sums[3]), k);
        mean_p = A(sums[1]), mean_q = A(sums[2]);
        by_q = by_q && !soon;
      }
      if (leads) {
        sum += value;
        if (a.reduction == Reduction::none) store_as(a.loss, a.loss_type, row, a.scale * value);
        if (saved) {
          const A fields[kDivergenceSaved] = {r.max_p, r.max_q, r.log_sum_p, r.log_sum_q, r.log_ratio, mean_p, mean_q};
          for (int i = 0; i < kDivergenceSaved; ++i) saved[i * rows + row] = fields[i];
        }
      }
    }
    if (!by_p && !by_q) continue;
    for_classes<A, kGroup>(a, at, /*back=*/false, [&](int64_t c, auto n) {
      A x_p[n.value] = {}, x_q[n.value] = {};
      if (counts) {
        load_logits(a.p, at.p, c, x_p);
        load_logits(a.q, at.q, c, x_q);
#pragma unroll
        for (int i = 0; i < n.value; ++i) {
          const gpu::PairTerms<A> t = gpu::pair_terms(x_p[i], x_q[i], r, k);
          x_p[i] = factor * (t.by_p - t.p * mean_p);
          x_q[i] = factor * (t.by_q - t.q * mean_q);
        }
      }
      if (by_p) store_grad(a.p, at.grad_p, c, x_p);
      if (by_q) store_grad(a.q, at.grad_q, c, x_q);
    });
  }
  if (!params.partials) return;
  sum = block_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) params.partials[blockIdx.x] = sum;
}

template <class A>
__global__ void __launch_bounds__(kDivergenceThreads) divergence_finish_kernel(const DivergenceParams params) {
  const DivergenceArgs& a = params.a;
  double sum = 0;
  for (int i = threadIdx.x; i < params.blocks; i += blockDim.x) sum += params.partials[i];
  sum = a.scale * block_sum(sum, reinterpret_cast<double*>(shared_memory()));
  if (threadIdx.x != 0) return;
  const double total = a.total ? double(*static_cast<const A*>(a.total)) : double(a.rows());
  store_as(a.loss, a.loss_type, 0, a.reduction == Reduction::mean ? sum / total : sum);
}

}  // namespace fastloss
