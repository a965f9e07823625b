// The pointwise losses on the CPU: see pointwise.h. Included once per instruction set.
//
// A row is cut into blocks of kBlock elements, whatever the number of threads; a block is walked in chunks that stay in
// the L1 cache. Of each chunk the operands are brought into arrays of the accumulation type (contiguous ones of that
// type are used where they lie), the loss is evaluated on vectors, results go back. So every dtype, stride and
// broadcast costs one loop over a chunk, and a loss is compiled for float and double alone. Sums are taken in double,
// one per block, and added pairwise.
#pragma once
#include "../common/cpu_support.h"
#include "losses.h"
#include "pointwise.h"

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int64_t kChunk = 1024, kBlock = 16 * kChunk;

// ---- chunks in and out

// f(offset, count, at) for each stretch along the last axis of the elements [begin, begin + n): where it starts in the
// operand, and in the chunk.
template <class F>
inline void for_each_run(const PointwiseArgs& a, const PointwiseOperand& o, int64_t begin, int64_t n, const F& f) {
  if (a.dim <= 1) return f(a.dim ? begin * o.strides[0] : 0, n, int64_t(0));
  const int last = a.dim - 1;
  for (int64_t at = 0; at < n;) {
    int64_t rest = begin + at, offset = 0;
    const int64_t first = rest % a.sizes[last];
    for (int k = last; k >= 0; --k) {
      offset += rest % a.sizes[k] * o.strides[k];
      rest /= a.sizes[k];
    }
    const int64_t run = min_of(n - at, a.sizes[last] - first);
    f(offset, run, at);
    at += run;
  }
}
inline int64_t last_stride(const PointwiseArgs& a, const PointwiseOperand& o) {
  return a.dim ? o.strides[a.dim - 1] : 1;
}
inline bool is_flat(const PointwiseArgs& a, const PointwiseOperand& o) { return a.dim <= 1 && last_stride(a, o) == 1; }

template <class T>
constexpr DType dtype_of = sizeof(T) == 8 ? DType::f64 : DType::f32;

// Elements [begin, begin + n) as T: the operand itself where that can be, else in `buffer`.
template <class T>
inline const T* fetch(const PointwiseArgs& a, const PointwiseOperand& o, int64_t begin, int64_t n, T* buffer) {
  if (o.type == dtype_of<T> && is_flat(a, o)) return static_cast<const T*>(o.data) + begin;
  const int64_t stride = last_stride(a, o);
  with_storage(o.type, [&](auto* tag) {
    using S = typename strip_pointer<decltype(tag)>::type;
    for_each_run(a, o, begin, n, [&](int64_t offset, int64_t count, int64_t at) {
      const S* from = static_cast<const S*>(o.data) + offset;
      T* to = buffer + at;
      int64_t i = 0;
      if (stride == 0) {
        const T value = T(to_accum(from[0]));
        for (; i < count; ++i) to[i] = value;
      } else if (stride == 1) {
        if constexpr (sizeof(T) == sizeof(accum_t<S>))
          for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(from + i));
        for (; i < count; ++i) to[i] = T(to_accum(from[i]));
      } else {
        for (; i < count; ++i) to[i] = T(to_accum(from[i * stride]));
      }
    });
  });
  return buffer;
}

// Where the results for elements [begin, ...) go: into the operand itself where that can be, else into `buffer`, which
// put_back then brings to the operand.
template <class T>
inline T* place(const PointwiseArgs& a, const PointwiseOperand& o, int64_t begin, T* buffer) {
  if (!o.data) return nullptr;
  return o.type == dtype_of<T> && is_flat(a, o) ? static_cast<T*>(o.data) + begin : buffer;
}
template <class T>
inline void put_back(const PointwiseArgs& a, const PointwiseOperand& o, int64_t begin, int64_t n, const T* results,
                     const T* buffer, bool past) {
  if (results != buffer || !o.data) return;
  const int64_t stride = last_stride(a, o);
  with_storage(o.type, [&](auto* tag) {
    using S = typename strip_pointer<decltype(tag)>::type;
    for_each_run(a, o, begin, n, [&](int64_t offset, int64_t count, int64_t at) {
      S* to = static_cast<S*>(o.data) + offset;
      const T* from = buffer + at;
      int64_t i = 0;
      if constexpr (sizeof(T) == sizeof(accum_t<S>))
        if (stride == 1)
          for (; i + kLanes<T> <= count; i += kLanes<T>)
            past ? stream(to + i, load(from + i)) : store(to + i, load(from + i));
      for (; i < count; ++i) to[i * stride] = from_accum<S, T>(from[i]);
    });
  });
}

template <class T>
struct Buffers {
  Scratch<T> memory{8 * kChunk};
  T* operator[](int i) { return memory.get() + i * kChunk; }
};
enum Buffer { kX, kT, kM, kGradX, kGradT, kValue, kTangentX, kTangentT };

// The inputs of a chunk: x, t and the multiplier m (null: ones), which holds weight, mask and per-element grad_output.
// A masked element becomes x = t = 1 with m = 0, so that nothing of what it held is used.
template <class T>
struct Chunk {
  const T *x, *t, *m;
  int64_t n;
  bool far;  // too large for the caches: read_ahead, which would displace from L1 what they hold
};
template <class T>
inline Chunk<T> fetch_chunk(const PointwiseArgs& a, int64_t begin, int64_t n, Buffers<T>& buffers,
                            bool with_grad_output, double* denominator) {
  Chunk<T> c{fetch(a, a.input, begin, n, buffers[kX]), fetch(a, a.target, begin, n, buffers[kT]), nullptr, n,
             a.count() * int64_t(sizeof(T)) >= kStreamBytes};
  if (a.weight.data) c.m = fetch(a, a.weight, begin, n, buffers[kM]);
  if (a.mask.data) {
    T *x = buffers[kX], *t = buffers[kT], *m = buffers[kM];
    const unsigned char* mask = static_cast<const unsigned char*>(a.mask.data);
    const int64_t stride = last_stride(a, a.mask);
    int64_t counted = 0;
    for_each_run(a, a.mask, begin, n, [&](int64_t offset, int64_t count, int64_t at) {
      for (int64_t i = 0; i < count; ++i) {
        const bool counts = mask[offset + i * stride];
        x[at + i] = counts ? c.x[at + i] : T(1);
        t[at + i] = counts ? c.t[at + i] : T(1);
        m[at + i] = !counts ? T(0) : c.m ? c.m[at + i] : T(1);
        counted += counts;
      }
    });
    if (a.weight_denominator == 0) *denominator += double(counted);
    c = {x, t, m, n, c.far};
  }
  if (a.weight_denominator != 0 && c.m)
    for (int64_t i = 0; i < n; ++i) *denominator += double(c.m[i]);
  if (with_grad_output && a.grad_output_elements.data) {
    const T* g = fetch(a, a.grad_output_elements, begin, n, buffers[kValue]);
    T* m = buffers[kM];
    for (int64_t i = 0; i < n; ++i) m[i] = c.m ? (c.m[i] == T(0) ? T(0) : c.m[i] * g[i]) : g[i];
    c.m = m;
  }
  return c;
}

// ---- evaluation

// A sum of vectors in double.
template <class T>
struct DoubleSum {
  static constexpr int kParts = int(sizeof(double) / sizeof(T));
  using Piece = typename vector_type<T, kVectorBytes / kParts>::type;
  vec<double> sum[kParts] = {};
  // Adds f of v's lanes in double.
  template <class F>
  void add(vec<T> v, const F& f) {
    Piece piece[kParts];
    __builtin_memcpy(piece, &v, sizeof v);
    for (int k = 0; k < kParts; ++k) sum[k] += f(__builtin_convertvector(piece[k], vec<double>), k);
  }
  void add(vec<T> v) {
    add(v, [](vec<double> lanes, int) { return lanes; });
  }
  // m times the value of a loss of residuals d, taken in double; m may be null.
  template <class Loss>
  void add_value(vec<T> d, const vec<T>* m, double param) {
    Piece factor[kParts];
    if (m) __builtin_memcpy(factor, m, sizeof *m);
    add(d, [&](vec<double> lanes, int k) {
      const vec<double> value = Loss::of(lanes, param).value;
      return m ? value * __builtin_convertvector(factor[k], vec<double>) : value;
    });
  }
  double total() const {
    vec<double> all = sum[0];
    if constexpr (kParts > 1) all += sum[1];
    return sum_lanes<double>(all);
  }
};

// body(load_at, store_at) for every vector of the chunk; the last one may be partial: what lies outside is read as
// `fill` and not stored. store_at(p, v, true) goes past the caches. What body returns is summed (kSum): four vectors in
// a tree, then in double.
template <class T, bool kSum, bool kWrites, class F>
inline void for_each_vector(const Chunk<T>& chunk, DoubleSum<T>* sum, const F& body) {
  constexpr int64_t kStep = kLanes<T>, kNear = 2048 / int64_t(sizeof(T));
  const int64_t n = chunk.n;
  int64_t i = 0;
  auto whole_vectors = [&](auto far) {
    auto at = [&](int64_t i) {
      return body(
          [i](const T* p, T) {
            decltype(far)::value ? read_ahead(p + i) : __builtin_prefetch(p + i + kNear);
            return load(p + i);
          },
          [i](T* p, vec<T> v, bool past) { past ? stream(p + i, v) : store(p + i, v); });
    };
    for (; i + 4 * kStep <= n; i += 4 * kStep) {
      const vec<T> a = at(i), b = at(i + kStep), c = at(i + 2 * kStep), d = at(i + 3 * kStep);
      if constexpr (kSum) sum->add((a + b) + (c + d));
    }
    for (; i + kStep <= n; i += kStep) {
      const vec<T> a = at(i);
      if constexpr (kSum) sum->add(a);
    }
  };
  if constexpr (kWrites)  // no faster with more streams than it has
    whole_vectors(constant<false>{});
  else
    chunk.far ? whole_vectors(constant<true>{}) : whole_vectors(constant<false>{});
  if (i < n) {
    const vec<T> a = body([i, n](const T* p, T fill) { return load_tail(p + i, n - i, fill); },
                          [i, n](T* p, vec<T> v, bool) { store_tail(p + i, n - i, v); });
    if constexpr (kSum) sum->add(a);
  }
}

template <int kValue>
struct integral {
  static constexpr int value = kValue;
};
enum Want { kWantSum = 1, kWantValues = 2, kWantGradX = 4, kWantGradT = 8 };

// The loss over a chunk: returns sum m f, with kWide of values taken in double; writes m f to `values` and scale m f_x,
// scale m f_t to gx, gt, as wanted, past the caches if so asked.
template <class Loss, class T, int kWant, bool kWide>
__attribute__((noinline)) double evaluate_as(const Chunk<T>& c, T param, T scale, T* values, T* gx, T* gt, bool past) {
  DoubleSum<T> sum;
  for_each_vector<T, (kWant & kWantSum) && !kWide, kWant != kWantSum>(c, &sum, [&](auto load_at, auto store_at) {
    const vec<T> x = load_at(c.x, T(1)), t = load_at(c.t, T(1));
    const Jet<vec<T>> j = jet<Loss>(x, t, param);
    const vec<T> m = c.m ? load_at(c.m, T(0)) : splat(T(1)), value = c.m ? m * j.value : j.value;
    if constexpr ((kWant & kWantSum) && kWide) sum.template add_value<Loss>(x - t, c.m ? &m : nullptr, double(param));
    if constexpr (kWant & kWantValues) store_at(values, value, past);
    const vec<T> ms = m * scale;
    if constexpr (kWant & kWantGradX) store_at(gx, ms * j.x, past);
    if constexpr (kWant & kWantGradT) store_at(gt, ms * j.t, past);
    return rounded(value);
  });
  return sum.total();
}

// The same; of a wide loss in float, values are taken in double only where the sum shows that some may have overflowed
// or vanished (flushed to zero they are less than 2^-116 together), which weights would hide.
template <class Loss, class T, int kWant>
inline double evaluate(const Chunk<T>& c, T param, T scale, T* values, T* gx, T* gt, bool past) {
  if constexpr (Loss::wide && (kWant & kWantSum) && sizeof(T) == 4) {
    if (c.m) return evaluate_as<Loss, T, kWant, true>(c, param, scale, values, gx, gt, past);
    const double sum = evaluate_as<Loss, T, kWant, false>(c, param, scale, values, gx, gt, past);
    const bool sound = sum > 0x1p-80 && sum < 0x1p127;
    return sound ? sum : evaluate_as<Loss, T, kWantSum, true>(c, param, scale, nullptr, nullptr, nullptr, false);
  } else {
    return evaluate_as<Loss, T, kWant, false>(c, param, scale, values, gx, gt, past);
  }
}

// Second order: with v = (vx, vt), either may be null, returns sum m (v . grad f), writes m (v . grad f) to `values`,
// scale m (hessian of f) v to hx, ht, as wanted. Masked elements have m = 0 whatever their v.
template <class Loss, class T>
__attribute__((noinline)) double evaluate_second(const Chunk<T>& c, T param, T scale, const T* vx, const T* vt,
                                                 T* values, T* hx, T* ht) {
  DoubleSum<T> sum;
  for_each_vector<T, true, true>(c, &sum, [&](auto load_at, auto store_at) {
    const Jet<vec<T>> j = jet<Loss>(load_at(c.x, T(1)), load_at(c.t, T(1)), param);
    const vec<T> m = c.m ? load_at(c.m, T(0)) : splat(T(1));
    vec<T> a = vx ? load_at(vx, T(0)) : vec<T>{}, b = vt ? load_at(vt, T(0)) : vec<T>{};
    a = m == T(0) ? vec<T>{} : a;
    b = m == T(0) ? vec<T>{} : b;
    const vec<T> slope = m * (a * j.x + b * j.t);
    if (values) store_at(values, slope, false);
    if (hx) store_at(hx, m * scale * (a * j.xx + b * j.xt), false);
    if (ht) store_at(ht, m * scale * (a * j.xt + b * j.tt), false);
    return slope;
  });
  return sum.total();
}

// ---- the passes

inline int64_t blocks_of(const PointwiseArgs& a) { return (a.cols + kBlock - 1) / kBlock; }

// Whether results are too large to be read back from the caches; and whether they are all written where they lie.
inline bool is_streamed(const PointwiseArgs& a) {
  const bool any = a.grad_input.data || a.grad_target.data || a.loss_elements.data;
  return any && a.count() * size_of(a.accum) >= kStreamBytes;
}
template <class T>
inline bool is_direct(const PointwiseArgs& a) {
  const PointwiseOperand* results[] = {&a.grad_input, &a.grad_target, &a.loss_elements};
  for (const PointwiseOperand* o : results)
    if (o->data && !(o->type == dtype_of<T> && is_flat(a, *o))) return false;
  return true;
}

// body(row, begin, n, buffers, item) over all chunks; item numbers the block. Blocks go to threads.
template <class T, class F>
inline void for_each_chunk(const PointwiseArgs& a, ParallelFor parallel_for, const F& body) {
  const int64_t blocks = blocks_of(a);
  parallel(parallel_for, a.rows * blocks, grain_for(min_of(a.cols, kBlock)), [&](int64_t first, int64_t last) {
    Buffers<T> buffers;
    for (int64_t item = first; item < last; ++item) {
      const int64_t row = item / blocks, from = item % blocks * kBlock, to = min_of(a.cols, from + kBlock);
      for (int64_t at = from; at < to; at += kChunk)
        body(row, row * a.cols + at, min_of(kChunk, to - at), buffers, item);
    }
    if (is_streamed(a)) stream_fence();
  });
}

// Calls f(constant want) for what a call wants.
template <class F>
inline void with_want(int want, const F& f) {
  switch (want) {
    case kWantSum: return f(integral<kWantSum>{});
    case kWantSum | kWantGradX: return f(integral<kWantSum | kWantGradX>{});
    case kWantSum | kWantGradX | kWantGradT: return f(integral<kWantSum | kWantGradX | kWantGradT>{});
    case kWantValues: return f(integral<kWantValues>{});
    case kWantGradX: return f(integral<kWantGradX>{});
    case kWantGradT: return f(integral<kWantGradT>{});
    case kWantGradX | kWantGradT: return f(integral<kWantGradX | kWantGradT>{});
  }
}

// Results and factors of the reductions, from the partial sums of the blocks.
inline void finish(const PointwiseArgs& a, bool root, const double* sums, const double* denominators) {
  const int64_t blocks = blocks_of(a);
  for (int64_t row = 0; row < a.rows; ++row) {
    const double denominator = a.counts_all() ? 0 : pairwise_sum(denominators + row * blocks, blocks, 1);
    const RowResult r = row_result(a, root, pairwise_sum(sums + row * blocks, blocks, 1), denominator);
    if (a.loss_out) store_scalar(a.loss_out, a.loss_type, row, r.value);
    if (a.factor) a.factor[row] = r.factor;
  }
}

template <class Loss, class T>
inline void forward(const PointwiseArgs& a, ParallelFor parallel_for) {
  const bool elements = a.loss_elements.data != nullptr;
  const int64_t items = a.rows * blocks_of(a);
  Scratch<double> partial(2 * items + 2);
  double *sums = partial.get(), *denominators = sums + items;
  for (int64_t i = 0; i < 2 * items; ++i) sums[i] = 0;
  const T scale = T(factor_is_known(a, Loss::root) && a.reduction == Reduction::mean ? 1 / double(a.cols) : 1.0);
  const int want =
      elements ? kWantValues : kWantSum | (a.grad_input.data ? kWantGradX : 0) | (a.grad_target.data ? kWantGradT : 0);
  const bool past = is_streamed(a), direct = is_direct<T>(a);
  with_want(want, [&](auto wanted) {
    for_each_chunk<T>(a, parallel_for, [&](int64_t, int64_t begin, int64_t n, Buffers<T>& buffers, int64_t item) {
      const Chunk<T> c = fetch_chunk(a, begin, n, buffers, false, &denominators[item]);
      T* values = place(a, a.loss_elements, begin, buffers[kValue]);
      T *gx = place(a, a.grad_input, begin, buffers[kGradX]), *gt = place(a, a.grad_target, begin, buffers[kGradT]);
      sums[item] += evaluate<Loss, T, wanted.value>(c, T(a.param), scale, values, gx, gt, past && direct);
      put_back(a, a.loss_elements, begin, n, values, buffers[kValue], past);
      put_back(a, a.grad_input, begin, n, gx, buffers[kGradX], past);
      put_back(a, a.grad_target, begin, n, gt, buffers[kGradT], past);
    });
  });
  if (!elements) finish(a, Loss::root, sums, denominators);
}

// factor[row] grad_output[row]
template <class T>
inline T row_scale(const PointwiseArgs& a, int64_t row) {
  double s = a.factor ? a.factor[row] : 1;
  if (a.grad_output) s *= load_scalar(a.grad_output, a.grad_output_type, row);
  return T(sizeof(T) == 4 ? finite_scale(s) : s);
}

template <class Loss, class T>
inline void backward(const PointwiseArgs& a, ParallelFor parallel_for) {
  const bool past = is_streamed(a), direct = is_direct<T>(a);
  with_want((a.grad_input.data ? kWantGradX : 0) | (a.grad_target.data ? kWantGradT : 0), [&](auto wanted) {
    for_each_chunk<T>(a, parallel_for, [&](int64_t row, int64_t begin, int64_t n, Buffers<T>& buffers, int64_t) {
      double denominator = 0;
      const Chunk<T> c = fetch_chunk(a, begin, n, buffers, true, &denominator);
      T *gx = place(a, a.grad_input, begin, buffers[kGradX]), *gt = place(a, a.grad_target, begin, buffers[kGradT]);
      evaluate<Loss, T, wanted.value>(c, T(a.param), row_scale<T>(a, row), static_cast<T*>(nullptr), gx, gt,
                                      past && direct);
      put_back(a, a.grad_input, begin, n, gx, buffers[kGradX], past);
      put_back(a, a.grad_target, begin, n, gt, buffers[kGradT], past);
    });
  });
}

template <class Loss, class T>
inline void second(const PointwiseArgs& a, ParallelFor parallel_for) {
  const bool past = false;
  Scratch<double> sums(a.rows * blocks_of(a) + 1);
  const bool gradients = a.grad_input.data || a.grad_target.data;
  // One call gives either the derivative of the loss or that of the gradient: m holds grad_output in the second only.
  for_each_chunk<T>(a, parallel_for, [&](int64_t row, int64_t begin, int64_t n, Buffers<T>& buffers, int64_t item) {
    double denominator = 0;
    const Chunk<T> c = fetch_chunk(a, begin, n, buffers, gradients, &denominator);
    const T* vx = a.tangent_input.data ? fetch(a, a.tangent_input, begin, n, buffers[kTangentX]) : nullptr;
    const T* vt = a.tangent_target.data ? fetch(a, a.tangent_target, begin, n, buffers[kTangentT]) : nullptr;
    T* values = place(a, a.loss_elements, begin, buffers[kValue]);
    T *hx = place(a, a.grad_input, begin, buffers[kGradX]), *ht = place(a, a.grad_target, begin, buffers[kGradT]);
    const double sum =
        evaluate_second<Loss, T>(c, T(a.param), gradients ? row_scale<T>(a, row) : T(1), vx, vt, values, hx, ht);
    sums[item] = begin % a.cols % kBlock == 0 ? sum : sums[item] + sum;
    put_back(a, a.loss_elements, begin, n, values, buffers[kValue], past);
    put_back(a, a.grad_input, begin, n, hx, buffers[kGradX], past);
    put_back(a, a.grad_target, begin, n, ht, buffers[kGradT], past);
  });
  if (!a.loss_out) return;
  const int64_t blocks = blocks_of(a);
  for (int64_t row = 0; row < a.rows; ++row)
    store_scalar(a.loss_out, a.loss_type, row,
                 pairwise_sum(sums.get() + row * blocks, blocks, 1) * (a.factor ? a.factor[row] : 1));
}

// f(Loss{}, T{}) for the loss and the accumulation type of a call.
template <class F>
inline Status with_kernel(const PointwiseArgs& a, const F& f) {
  with_loss(Losses{}, a.loss, [&](auto loss) {
    if (a.accum == DType::f64) return f(loss, double{});
    f(loss, float{});
  });
  return {};
}

inline Status pointwise_forward(const PointwiseArgs& a, ParallelFor parallel_for) {
  return with_kernel(a, [&](auto loss, auto zero) { forward<decltype(loss), decltype(zero)>(a, parallel_for); });
}
inline Status pointwise_backward(const PointwiseArgs& a, ParallelFor parallel_for) {
  return with_kernel(a, [&](auto loss, auto zero) { backward<decltype(loss), decltype(zero)>(a, parallel_for); });
}
inline Status pointwise_second(const PointwiseArgs& a, ParallelFor parallel_for) {
  return with_kernel(a, [&](auto loss, auto zero) { second<decltype(loss), decltype(zero)>(a, parallel_for); });
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
