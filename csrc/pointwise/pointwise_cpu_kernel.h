// The pointwise losses on the CPU: see pointwise.h. Included once for each group of
// losses and instruction set.
//
// A row is cut into blocks of kBlock elements, whatever the number of threads; a block is walked in chunks that stay in
// the L1 cache. Of each chunk the operands are brought into arrays of the accumulation type (contiguous ones of that
// type are used where they lie, a short pattern that repeats is written out once), the loss is evaluated on vectors,
// results go back. So every dtype, stride and broadcast costs one loop over a chunk, and a loss is compiled for float
// and double alone. Sums are taken in double, one per block, and added pairwise.
#pragma once
#include "../common/cpu_support.h"
#include "../common/full_range.h"
#include "loss.h"

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int64_t kChunk = 1024, kBlock = 16 * kChunk;

template <int kValue>
struct integral {
  static constexpr int value = kValue;
};
// f(integral<0>{}), ..., f(integral<kCount - 1>{}): a loop whose index is a constant.
template <int kCount, int kFirst = 0, class F>
inline void unrolled(const F& f) {
  if constexpr (kFirst < kCount) {
    f(integral<kFirst>{});
    unrolled<kCount, kFirst + 1>(f);
  }
}

// ---- chunks in and out

// f(offset, count, at) for each stretch along the last axis of the elements [begin, begin + n): where it starts in the
// operand, and in the chunk.
template <class F>
inline void for_each_run(const PointwiseArgs& a, const PointwiseOperand& o, int64_t begin, int64_t n, const F& f) {
  const int last = a.dim - 1;
  if (last == 0) return f(begin * o.strides[0], n, int64_t(0));
  int64_t index[kPointwiseDims], offset = 0;
  for (int k = last; k >= 0; --k) {
    index[k] = begin % a.sizes[k];
    begin /= a.sizes[k];
    offset += index[k] * o.strides[k];
  }
  for (int64_t at = 0;;) {
    const int64_t run = min_of(n - at, a.sizes[last] - index[last]);
    f(offset, run, at);
    at += run;
    if (at >= n) return;
    offset -= index[last] * o.strides[last];
    index[last] = 0;
    for (int k = last - 1; k >= 0; --k) {
      offset += o.strides[k];
      if (++index[k] < a.sizes[k]) break;
      offset -= a.sizes[k] * o.strides[k];
      index[k] = 0;
    }
  }
}

template <class T>
constexpr DType dtype_of = sizeof(T) == 8 ? DType::f64 : DType::f32;

// An operand of a call, and how its elements lie.
class Walked {
 public:
  Walked() = default;
  Walked(const PointwiseArgs& a, const PointwiseOperand& o)
      : a_(&a), o_(&o), stride_(o.strides[a.dim - 1]), flat_(is_flat(a, o)) {
    if (flat_) stride_ = 1;
  }

 protected:
  const PointwiseArgs* a_ = nullptr;
  const PointwiseOperand* o_ = nullptr;
  int64_t stride_ = 1;  // along a run
  bool flat_ = false;   // a single run

  template <class F>
  void runs(int64_t begin, int64_t n, const F& f) const {
    flat_ ? f(begin, n, int64_t(0)) : for_each_run(*a_, *o_, begin, n, f);
  }
};

// An operand to read, by the chunk, as T.
template <class T>
class Reader : public Walked {
 public:
  Reader() = default;
  // Chunks have at most `chunk` elements; the buffer has room for two.
  Reader(const PointwiseArgs& a, const PointwiseOperand& o, T* buffer, int64_t chunk) : Walked(a, o), buffer_(buffer) {
    if (!o.data) {
      for (int64_t i = 0; i < chunk; ++i) buffer[i] = T(1);
      period_ = 1;
      return;
    }
    in_place_ = o.type == dtype_of<T> && stride_ == 1;
    if (flat_) return;
    const int64_t period = repeats_after();
    if (period <= 0 || period > chunk) return;
    copy(0, period);
    for (int64_t i = period; i < chunk + period; ++i) buffer[i] = buffer[i - period];
    period_ = period;
  }

  bool is_direct() const { return in_place_ && flat_; }

  // Elements [begin, begin + n), until the next call.
  const T* at(int64_t begin, int64_t n) {
    if (period_) return period_ == 1 ? buffer_ : buffer_ + begin % period_;
    if (in_place_) {
      if (flat_) return static_cast<const T*>(o_->data) + begin;
      const int64_t size = a_->sizes[a_->dim - 1];
      if (begin % size + n <= size) {  // one run
        int64_t start = 0;
        runs(begin, n, [&](int64_t offset, int64_t, int64_t) { start = offset; });
        return static_cast<const T*>(o_->data) + start;
      }
    }
    copy(begin, n);
    return buffer_;
  }

 private:
  T* buffer_ = nullptr;
  bool in_place_ = false;
  int64_t period_ = 0;  // of the pattern that the buffer holds

  // The number of elements after which the operand begins again, being broadcast along the axes before.
  int64_t repeats_after() const {
    int k = 0;
    while (k < a_->dim && o_->strides[k] == 0) ++k;
    int64_t period = 1;
    for (; k < a_->dim; ++k) period *= a_->sizes[k];
    return period;
  }

  void copy(int64_t begin, int64_t n) {
    with_storage(o_->type, [&](auto* tag) {
      using S = typename strip_pointer<decltype(tag)>::type;
      runs(begin, n, [&](int64_t offset, int64_t count, int64_t at) {
        const S* from = static_cast<const S*>(o_->data) + offset;
        T* to = buffer_ + at;
        int64_t i = 0;
        if (stride_ == 0) {
          const T value = T(to_accum(from[0]));
          for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, splat(value));
          for (; i < count; ++i) to[i] = value;
        } else if (stride_ == 1) {
          if constexpr (sizeof(T) == sizeof(accum_t<S>))
            for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(from + i));
          for (; i < count; ++i) to[i] = T(to_accum(from[i]));
        } else {
          for (; i < count; ++i) to[i] = T(to_accum(from[i * stride_]));
        }
      });
    });
  }
};

// A result, by the chunk: written into the operand itself where that can be, else into a buffer that put_back brings
// there, past the caches if so asked.
template <class T>
class Writer : public Walked {
 public:
  Writer() = default;
  Writer(const PointwiseArgs& a, const PointwiseOperand& o, T* buffer)
      : Walked(a, o), buffer_(buffer), in_place_(flat_ && o.type == dtype_of<T>) {}
  bool is_direct() const { return !o_->data || in_place_; }
  T* at(int64_t begin) const {
    if (!o_->data) return nullptr;
    return in_place_ ? static_cast<T*>(o_->data) + begin : buffer_;
  }
  void put_back(int64_t begin, int64_t n, bool past) const {
    if (is_direct()) return;
    with_storage(o_->type, [&](auto* tag) {
      using S = typename strip_pointer<decltype(tag)>::type;
      runs(begin, n, [&](int64_t offset, int64_t count, int64_t at) {
        S* to = static_cast<S*>(o_->data) + offset;
        const T* from = buffer_ + at;
        int64_t i = 0;
        if constexpr (sizeof(T) == sizeof(accum_t<S>))
          if (stride_ == 1)
            for (; i + kLanes<T> <= count; i += kLanes<T>)
              past ? stream(to + i, load(from + i)) : store(to + i, load(from + i));
        for (; i < count; ++i) to[i * stride_] = from_accum<S, T>(from[i]);
      });
    });
  }

 private:
  T* buffer_ = nullptr;
  bool in_place_ = false;
};

class MaskReader : public Walked {
 public:
  using Walked::Walked;
  template <class F>
  void at(int64_t begin, int64_t n, const F& f) const {  // f(mask, stride, count, at) for each run
    const unsigned char* mask = static_cast<const unsigned char*>(o_->data);
    runs(begin, n, [&](int64_t offset, int64_t count, int64_t at) { f(mask + offset, stride_, count, at); });
  }
};

// The inputs of a chunk: operands x and what multiplies f, m (null: ones), which holds weight, multiplier and mask. A
// masked element becomes x_k = 1 with m = 0, so that nothing of what it held is used.
template <class T, int kOperands>
struct Chunk {
  const T* x[kOperands];
  const T* m;
  int64_t n;
  bool far;  // too large for the caches: read_ahead, which would displace from L1 what they hold
};

// What a thread needs to go through a call chunk by chunk.
template <class T, int kOperands>
class Chunks {
 public:
  Writer<T> values, grads[kOperands];

  explicit Chunks(const PointwiseArgs& a)
      : a_(a), room_(min_of(kChunk, round_up(a.count() + 1, kLanes<T>))), memory_(kBuffers * room_), mask_(a, a.mask) {
    for (int k = 0; k < kOperands; ++k) {
      operands_[k] = Reader<T>(a, a.operands[k], buffer(2), room_);
      grads[k] = Writer<T>(a, a.grads[k], buffer(1));
      masked_[k] = buffer(1);
    }
    values = Writer<T>(a, a.loss_elements, buffer(1));
    m_ = buffer(1);
    if (a.weight.data) weight_ = Reader<T>(a, a.weight, buffer(2), room_);
    if (a.multiplier.data) multiplier_ = Reader<T>(a, a.multiplier, buffer(2), room_);
  }

  // Elements [begin, begin + n), until the next call; what they have of the denominator is added to it.
  Chunk<T, kOperands> fetch(int64_t begin, int64_t n, double* denominator) {
    Chunk<T, kOperands> c{{}, nullptr, n, a_.count() * int64_t(sizeof(T)) >= kStreamBytes};
    for (int k = 0; k < kOperands; ++k) c.x[k] = operands_[k].at(begin, n);
    if (a_.weight.data) c.m = weight_.at(begin, n);
    if (a_.mask.data) {
      const int64_t counted = apply_mask(c, begin);
      if (a_.weight_denominator == 0) *denominator += double(counted);
    }
    if (a_.multiplier.data) {
      const T* g = multiplier_.at(begin, n);
      for (int64_t i = 0; i < n; ++i) m_[i] = c.m ? (c.m[i] == T(0) ? T(0) : c.m[i] * g[i]) : g[i];
      c.m = m_;
    }
    if (a_.weight_denominator != 0 && c.m)
      for (int64_t i = 0; i < n; ++i) *denominator += double(c.m[i]);
    return c;
  }
  void put_back(int64_t begin, int64_t n, bool past) const {
    values.put_back(begin, n, past);
    for (const Writer<T>& grad : grads) grad.put_back(begin, n, past);
  }
  bool is_direct() const {
    bool all = values.is_direct();
    for (const Writer<T>& grad : grads) all = all && grad.is_direct();
    return all;
  }
  // Whether nothing takes a buffer, so that what is fetched may be as long as it likes.
  bool is_unbuffered() const {
    bool all = is_direct() && !a_.weight.data && !a_.mask.data && !a_.multiplier.data;
    for (const Reader<T>& operand : operands_) all = all && operand.is_direct();
    return all;
  }

 private:
  static constexpr int kBuffers = 4 * kOperands + 6;
  const PointwiseArgs& a_;
  const int64_t room_;  // elements of a chunk, at most
  Scratch<T> memory_;
  int64_t taken_ = 0;
  Reader<T> operands_[kOperands], weight_, multiplier_;
  MaskReader mask_;
  T *masked_[kOperands], *m_;

  T* buffer(int chunks) {
    T* at = memory_.get() + taken_;
    taken_ += chunks * room_;
    return at;
  }
  // Masks the operands and m; returns how many elements count.
  int64_t apply_mask(Chunk<T, kOperands>& c, int64_t begin) {
    int64_t counted = 0;
    mask_.at(begin, c.n, [&](const unsigned char* mask, int64_t stride, int64_t count, int64_t at) {
      for (int k = 0; k < kOperands; ++k)
        for (int64_t i = 0; i < count; ++i) masked_[k][at + i] = mask[i * stride] ? c.x[k][at + i] : T(1);
      for (int64_t i = 0; i < count; ++i) {
        const bool counts = mask[i * stride];
        m_[at + i] = !counts ? T(0) : c.m ? c.m[at + i] : T(1);
        counted += counts;
      }
    });
    for (int k = 0; k < kOperands; ++k) c.x[k] = masked_[k];
    c.m = m_;
    return counted;
  }
};

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
    for (int k = 0; k < kParts; ++k) sum[k] += f(doubles_of(piece[k]), k);
  }
  void add(vec<T> v) {
    add(v, [](vec<double> lanes, int) { return lanes; });
  }
  // m times the value of a loss of residuals d, taken in double; m may be null.
  template <class Loss>
  void add_value(vec<T> d, const vec<T>* m, const Params<double>& params) {
    Piece factor[kParts];
    if (m) __builtin_memcpy(factor, m, sizeof *m);
    add(d, [&](vec<double> lanes, int k) {
      const vec<double> value = Loss::of(lanes, params).value;
      return m ? value * doubles_of(factor[k]) : value;
    });
  }
  double total() const {
    vec<double> all = sum[0];
    if constexpr (kParts > 1) all += sum[1];
    return sum_lanes<double>(all);
  }
};

// body(load_at, store_at) for every vector of the chunk; the last one may be partial: what lies outside is read as
// `fill` and not stored. store_at(p, v, true) goes past the caches. The first kSums of the vectors that body returns
// are summed: four of each in a tree, then in double.
template <class T, int kSums, bool kWrites, int kOperands, class F>
inline void for_each_vector(const Chunk<T, kOperands>& chunk, DoubleSum<T>* sums, const F& body) {
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
      if constexpr (kSums > 1) {  // less to hold, twice the code
        vec<T> pairs[2][kSums];
        for (int k = 0; k < 2; ++k) {
          const auto a = at(i + 2 * k * kStep), b = at(i + (2 * k + 1) * kStep);
          for (int j = 0; j < kSums; ++j) pairs[k][j] = a.value[j] + b.value[j];
        }
        unrolled<kSums>([&](auto sum) {
          constexpr int j = decltype(sum)::value;
          sums[j].add(pairs[0][j] + pairs[1][j]);
        });
      } else {
        vec<T> four[4];
        for (int k = 0; k < 4; ++k) {  // short bodies are unrolled by the compiler, long ones are compiled once
          const auto a = at(i + k * kStep);
          if constexpr (kSums == 1) four[k] = a.value[0];
        }
        if constexpr (kSums == 1) sums[0].add((four[0] + four[1]) + (four[2] + four[3]));
      }
    }
  };
  if constexpr (kWrites)  // no faster with more streams than it has
    whole_vectors(constant<false>{});
  else
    chunk.far ? whole_vectors(constant<true>{}) : whole_vectors(constant<false>{});
  for (; i < n; i += kStep) {
    const int64_t rest = min_of(n - i, kStep);
    const auto a =
        body([i, rest](const T* p, T fill) { return rest == kStep ? load(p + i) : load_tail(p + i, rest, fill); },
             [i, rest](T* p, vec<T> v, bool) { rest == kStep ? store(p + i, v) : store_tail(p + i, rest, v); });
    const auto is_inside = iota<T>() < T(rest);
    unrolled<kSums>([&](auto sum) {
      constexpr int j = decltype(sum)::value;
      sums[j].add(is_inside ? a.value[j] : vec<T>{});
    });
  }
}

// What a call wants of a chunk: sums; the first term by element; the gradient of the first operand alone; those of any.
enum Want { kWantSums = 1, kWantValues = 2, kWantFirstGrad = 4, kWantGrads = 8 };

// Where the results of a chunk go, and what multiplies gradients by the terms; null: not wanted.
template <class Loss, class T>
struct Results {
  double sums[Loss::sums];
  T scale[Loss::sums];
  T* values;
  T* grads[Loss::operands];
  bool past;  // the caches
};

// The loss over a chunk: sums m f_j, with kWide of values taken in double; writes m f and sum_j scale_j m df_j/dx_k.
template <class Loss, class T, int kWant, bool kWide>
inline void evaluate_body(const Chunk<T, Loss::operands>& c, const PointwiseArgs& a, Results<Loss, T>& r) {
  constexpr int kSums = Loss::sums, kGrads = kWant & kWantGrads ? Loss::operands : kWant & kWantFirstGrad ? 1 : 0;
  static_assert(!kWide || (Loss::residual && kSums == 1), "wide values are those of one residual");
  struct Values {
    vec<T> value[kSums];
  };
  DoubleSum<T> sums[kSums];
  const Params<T> params = params_of<T>(a);
  const Params<double> wide_params = params_of<double>(a);
  T scale[kSums], *grads[Loss::operands];
  unrolled<kSums>([&](auto j) { scale[decltype(j)::value] = r.scale[decltype(j)::value]; });
  unrolled<Loss::operands>([&](auto k) { grads[decltype(k)::value] = r.grads[decltype(k)::value]; });
  T* const values = r.values;
  const bool past = r.past;
  constexpr int kVectorSums = (kWant & kWantSums) && !kWide ? kSums : 0;
  for_each_vector<T, kVectorSums, kWant != kWantSums>(c, sums, [&](auto load_at, auto store_at) {
    vec<T> x[Loss::operands];
    unrolled<Loss::operands>([&](auto k) { x[decltype(k)::value] = load_at(c.x[decltype(k)::value], T(1)); });
    const auto f = jet<Loss, vec<T>>(x, params);
    const vec<T> m = c.m ? load_at(c.m, T(0)) : splat(T(1));
    Values result;
    unrolled<kSums>([&](auto j) {
      constexpr int i = decltype(j)::value;
      result.value[i] = c.m ? m * f.value[i] : f.value[i];
    });
    if constexpr ((kWant & kWantSums) && kWide)
      sums[0].template add_value<Loss>(x[0] - x[1], c.m ? &m : nullptr, wide_params);
    if constexpr (kWant & kWantValues) store_at(values, result.value[0], past);
    unrolled<kGrads>([&](auto operand) {
      constexpr int k = decltype(operand)::value;
      if ((kWant & kWantGrads) && !grads[k]) return;
      vec<T> grad = m * scale[0] * f.slope[0][k];
      unrolled<kSums, 1>([&](auto j) { grad += m * scale[decltype(j)::value] * f.slope[decltype(j)::value][k]; });
      store_at(grads[k], grad, past);
    });
    unrolled<kSums>([&](auto j) { result.value[decltype(j)::value] = rounded(result.value[decltype(j)::value]); });
    return result;
  });
  unrolled<kSums>([&](auto j) { r.sums[decltype(j)::value] = sums[decltype(j)::value].total(); });
}

// Without a call in its loop, which would take vectors and constants from their registers.
template <class Loss, class T, int kWant, bool kWide>
__attribute__((noinline, flatten)) void evaluate_flat(const Chunk<T, Loss::operands>& c, const PointwiseArgs& a,
                                                      Results<Loss, T>& r) {
  evaluate_body<Loss, T, kWant, kWide>(c, a, r);
}
// In double, which fewer use, as the compiler likes: that takes it half the time.
template <class Loss, class T, int kWant, bool kWide>
inline void evaluate_as(const Chunk<T, Loss::operands>& c, const PointwiseArgs& a, Results<Loss, T>& r) {
  if constexpr (sizeof(T) == 4)
    evaluate_flat<Loss, T, kWant, kWide>(c, a, r);
  else
    evaluate_body<Loss, T, kWant, kWide>(c, a, r);
}

// The same; of a wide loss in float, values are taken in double only where the sum shows that some may have overflowed
// or vanished (flushed to zero they are less than 2^-116 together), which weights would hide.
template <class Loss, class T, int kWant>
inline void evaluate(const Chunk<T, Loss::operands>& c, const PointwiseArgs& a, Results<Loss, T>& r) {
  if constexpr (Loss::wide && (kWant & kWantSums) && sizeof(T) == 4) {
    if (c.m) return evaluate_as<Loss, T, kWant, true>(c, a, r);
    evaluate_as<Loss, T, kWant, false>(c, a, r);
    const bool sound = r.sums[0] > 0x1p-80 && r.sums[0] < 0x1p127;
    if (!sound) evaluate_as<Loss, T, kWantSums, true>(c, a, r);
  } else {
    evaluate_as<Loss, T, kWant, false>(c, a, r);
  }
}

// ---- the passes

inline int64_t blocks_of(const PointwiseArgs& a) { return (a.cols + kBlock - 1) / kBlock; }

// Whether results are too large to be read back from the caches.
inline bool is_streamed(const PointwiseArgs& a) {
  return (a.wants_grads() || a.loss_elements.data) && a.count() * size_of(a.accum) >= kStreamBytes;
}

// body(chunks, row, begin, n, item) over all chunks, or over whole blocks where nothing takes a buffer; item numbers
// the block. Blocks go to threads.
template <class Loss, class T, class F>
inline void for_each_chunk(const PointwiseArgs& a, ParallelFor parallel_for, const F& body) {
  const int64_t blocks = blocks_of(a);
  parallel(parallel_for, a.rows * blocks, grain_for(min_of(a.cols, kBlock)), [&](int64_t first, int64_t last) {
    Chunks<T, Loss::operands> chunks(a);
    const int64_t step = chunks.is_unbuffered() ? kBlock : kChunk;
    for (int64_t item = first; item < last; ++item) {
      const int64_t row = item / blocks, from = item % blocks * kBlock, to = min_of(a.cols, from + kBlock);
      for (int64_t at = from; at < to; at += step) body(chunks, row, row * a.cols + at, min_of(step, to - at), item);
    }
    if (is_streamed(a)) stream_fence();
  });
}

// Rows that fit go through a chunk together, where nothing but their sums is wanted of each: what comes before and
// after the evaluation then takes its time once.
inline int64_t rows_of_chunk(const PointwiseArgs& a) {
  const bool fits = a.rows > 1 && 0 < a.cols && a.cols <= kChunk / 2;
  return fits && a.counts_all() ? min_of(kChunk / a.cols, a.rows) : 1;
}

// Evaluates the chunks of a call, with results as prepare(results, row) sets scale and done(results, item) takes sums.
template <class Loss, class T, int kWant, class Prepare, class Done>
inline void walk(const PointwiseArgs& a, ParallelFor parallel_for, double* denominators, const Prepare& prepare,
                 const Done& done) {
  constexpr int kOperands = Loss::operands;
  const bool past = is_streamed(a);
  // `rows` rows, or a stretch of one row, which starts at element `begin`; `item` is of the first. A long stretch is
  // evaluated by the chunk as well, so that sums do not depend on how operands lie.
  const auto visit = [&](Chunks<T, kOperands>& chunks, int64_t row, int64_t rows, int64_t begin, int64_t n,
                         int64_t item) {
    double ignored = 0;
    const auto all = chunks.fetch(begin, rows * n, denominators ? &denominators[item] : &ignored);
    Results<Loss, T> to;
    to.values = chunks.values.at(begin);
    for (int k = 0; k < kOperands; ++k) to.grads[k] = chunks.grads[k].at(begin);
    to.past = past && chunks.is_direct();
    const int64_t piece = min_of(n, kChunk);
    for (int64_t at = 0, i = 0; at < rows * n; at += piece, i += rows > 1) {
      Chunk<T, kOperands> c = all;
      Results<Loss, T> r = to;
      c.n = min_of(piece, rows * n - at);
      for (int k = 0; k < kOperands; ++k) {
        c.x[k] += at;
        if (r.grads[k]) r.grads[k] += at;
      }
      if (c.m) c.m += at;
      if (r.values) r.values += at;
      prepare(r, row + i);
      evaluate<Loss, T, kWant>(c, a, r);
      done(r, item + i);
    }
    chunks.put_back(begin, rows * n, past);
  };
  const int64_t together = rows_of_chunk(a);
  if (together == 1)
    return for_each_chunk<Loss, T>(a, parallel_for,
                                   [&](auto& chunks, int64_t row, int64_t begin, int64_t n, int64_t item) {
                                     visit(chunks, row, 1, begin, n, item);
                                   });
  parallel(parallel_for, (a.rows + together - 1) / together, grain_for(together * a.cols),
           [&](int64_t first, int64_t last) {
             Chunks<T, kOperands> chunks(a);
             for (int64_t row = first * together; row < min_of(last * together, a.rows); row += together)
               visit(chunks, row, min_of(together, a.rows - row), row * a.cols, a.cols, row);
             if (past) stream_fence();
           });
}

inline bool wants_first_grad_only(const PointwiseArgs& a) {
  return a.grads[0].data && !a.grads[1].data && !a.grads[2].data && !a.grads[3].data;
}

// Gradients of weights that add up to 0, where forward has written them without their factor.
template <class T, int kOperands>
inline void fill_nan(const PointwiseArgs& a, int64_t row) {
  Chunks<T, kOperands> chunks(a);
  for (int64_t at = 0; at < a.cols; at += kChunk) {
    const int64_t n = min_of(kChunk, a.cols - at), begin = row * a.cols + at;
    for (Writer<T>& grad : chunks.grads) {
      T* to = grad.at(begin);
      for (int64_t i = 0; to && i < n; ++i) to[i] = kNan<T>;
    }
    chunks.put_back(begin, n, false);
  }
}

// Loss and factors of a row, from its sums.
template <class Loss>
inline void finish_row(const PointwiseArgs& a, int64_t row, const double (&sums)[Loss::sums], double denominator) {
  const auto r = row_result<Loss>(a, sums, denominator);
  if (a.loss_out) store_scalar(a.loss_out, a.loss_type, row, r.value);
  if (a.factor)
    for (int j = 0; j < Loss::sums; ++j) a.factor[row * Loss::sums + j] = r.factor[j];
}

// Losses and factors of the rows, from the partial sums of the blocks: those of each term, then the denominators.
template <class Loss, class T>
inline void finish(const PointwiseArgs& a, const double* partial, ParallelFor parallel_for) {
  const int64_t blocks = blocks_of(a), items = a.rows * blocks;
  parallel(parallel_for, a.rows, 1024, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      double sums[Loss::sums];
      for (int j = 0; j < Loss::sums; ++j) sums[j] = pairwise_sum(partial + j * items + row * blocks, blocks, 1);
      const double denominator =
          a.counts_all() ? 0 : pairwise_sum(partial + Loss::sums * items + row * blocks, blocks, 1);
      finish_row<Loss>(a, row, sums, denominator);
      if (a.wants_grads() && may_divide_by_zero(a) && denominator == 0) fill_nan<T, Loss::operands>(a, row);
    }
  });
}

// The first element outside the domains of its operands, in the order of the elements; what the mask hides may hold
// anything.
template <class Loss, class T>
inline Status find_fault(const PointwiseArgs& a) {
  Chunks<T, Loss::operands> chunks(a);
  double ignored = 0;
  for (int64_t begin = 0; begin < a.count(); begin += kChunk) {
    const int64_t n = min_of(kChunk, a.count() - begin);
    const Chunk<T, Loss::operands> c = chunks.fetch(begin, n, &ignored);
    for (int64_t i = 0; i < n; ++i)
      for (int k = 0; k < Loss::operands; ++k) {
        const T x = c.x[k][i];
        if (!is_in(Loss::domain(k), x)) return {Status::bad_target, k, bit_cast<int64_t>(double(x))};
      }
  }
  return {};
}

// Whether the operands were in their domains: a sum of the blocks says nan where they were not.
template <class Loss, class T>
inline Status checked(const PointwiseArgs& a, const double* partial) {
  if constexpr (Loss::checks)
    for (int64_t i = 0; i < a.rows * blocks_of(a); ++i)
      if (partial[i] != partial[i]) return find_fault<Loss, T>(a);
  return {};
}

template <class Loss, class T>
inline Status forward(const PointwiseArgs& a, ParallelFor parallel_for) {
  constexpr int kSums = Loss::sums;
  // A row of one chunk is finished with it: many short rows would spend their time on partial sums. The other losses
  // need no code for it: their rows are seldom many.
  const bool at_once = Loss::finishes && !Loss::checks && a.counts_all() && 0 < a.cols && a.cols <= kChunk;
  const int64_t items = at_once ? 0 : a.rows * blocks_of(a);
  Scratch<double> partial((kSums + 1) * items + 1);
  for (int64_t i = 0; i < (kSums + 1) * items; ++i) partial[i] = 0;
  const T scale = T(factor_is_known(a) && a.reduction == Reduction::mean ? 1 / double(a.cols) : 1.0);
  const auto prepare = [&](Results<Loss, T>& r, int64_t) {
    for (int j = 0; j < kSums; ++j) r.scale[j] = scale;
  };
  const auto done = [&](const Results<Loss, T>& r, int64_t item) {
    if (at_once) return finish_row<Loss>(a, item, r.sums, 0);
    for (int j = 0; j < kSums; ++j) partial[j * items + item] += r.sums[j];
  };
  double* denominators = at_once ? nullptr : &partial[kSums * items];
  if constexpr (!Loss::finishes)
    if (a.loss_elements.data) {
      walk<Loss, T, kWantValues | (Loss::checks ? kWantSums : 0)>(a, parallel_for, denominators, prepare, done);
      return checked<Loss, T>(a, partial.get());
    }
  if (kSums > 1 || !a.wants_grads())
    walk<Loss, T, kWantSums>(a, parallel_for, denominators, prepare, done);
  else if (wants_first_grad_only(a))
    walk<Loss, T, kWantSums | kWantFirstGrad>(a, parallel_for, denominators, prepare, done);
  else
    walk<Loss, T, kWantSums | kWantGrads>(a, parallel_for, denominators, prepare, done);
  if (!at_once) finish<Loss, T>(a, partial.get(), parallel_for);
  return checked<Loss, T>(a, partial.get());
}

template <class Loss, class T>
inline Status backward(const PointwiseArgs& a, ParallelFor parallel_for) {
  const auto prepare = [&](Results<Loss, T>& r, int64_t row) {  // factor grad_output
    for (int j = 0; j < Loss::sums; ++j) {
      double s = a.factor ? a.factor[row * Loss::sums + j] : 1;
      if (a.grad_output) s *= load_scalar(a.grad_output, a.grad_output_type, row);
      r.scale[j] = T(sizeof(T) == 4 ? finite_scale(s) : s);
    }
  };
  const auto done = [](const Results<Loss, T>&, int64_t) {};
  if (wants_first_grad_only(a))
    walk<Loss, T, kWantFirstGrad>(a, parallel_for, nullptr, prepare, done);
  else
    walk<Loss, T, kWantGrads>(a, parallel_for, nullptr, prepare, done);
  return {};
}

// f(Loss{}, T{}) for the loss and the accumulation type of a call.
template <LossGroup kGroup, class F>
inline Status with_kernel(const PointwiseArgs& a, const F& f) {
  Status status;
  with_loss(typename LossesOf<kGroup>::type{}, a.loss,
            [&](auto loss) { status = a.accum == DType::f64 ? f(loss, double{}) : f(loss, float{}); });
  return status;
}

template <LossGroup kGroup>
inline Status pointwise_forward(const PointwiseArgs& a, ParallelFor parallel_for) {
  return with_kernel<kGroup>(
      a, [&](auto loss, auto zero) { return forward<decltype(loss), decltype(zero)>(a, parallel_for); });
}
template <LossGroup kGroup>
inline Status pointwise_backward(const PointwiseArgs& a, ParallelFor parallel_for) {
  return with_kernel<kGroup>(
      a, [&](auto loss, auto zero) { return backward<decltype(loss), decltype(zero)>(a, parallel_for); });
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
