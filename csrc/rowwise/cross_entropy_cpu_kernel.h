// Cross entropy on the CPU, generic over dtype, target and instruction set. Included by cross_entropy_<isa>.cpp.
//
// Two ways through memory, chosen by layout (see run_batches):
//   row path   classes contiguous and not few: vectors along the classes. Every element is read once from memory, in
//              chunks; 1 read (+ 1 write).
//   tile path  anything else (few classes, class axis strided, channels first): rows are laid out as [classes, rows] in
//              L1/L2 and vectors run along the rows. 1 read (+ 1 write) while all classes of a tile fit, else one more
//              read for the gradient.
// Both are bound by the exponentials as much as by memory, so that those of the statistics are kept (L1/L2) for the
// gradient, which then takes a multiplication per element.
// Work is cut into batches of rows by shape alone; each adds its rows in order and batches are added pairwise, so the
// result does not depend on the number of threads. What is O(1) per row is done for a batch at a time, in vectors.
#pragma once
#include "../common/cpu_support.h"
#include "cross_entropy_cpu_policy.h"
#include "cross_entropy_math.h"

namespace fastloss {
namespace FASTLOSS_ISA {

enum class Mode { index, smooth, smooth_weighted, soft };  // what q_c is: nothing, 1, w_c, w_c p'_c

constexpr int64_t kChunk = 1024;           // classes per chunk of the row path
constexpr int64_t kKeptBytes = 262144;     // exponentials of a row that are kept for its gradient
constexpr int64_t kStreamRowBytes = 2048;  // shorter rows are mostly parts of lines: not streamed
constexpr int64_t kLineBytes = 64;
constexpr int64_t kTileBytes = 8192;
constexpr int64_t kTileBytesMax = 262144;  // past this a tile holds only part of the classes

struct Denominators {
  double weight = 0;  // D
  double count = 0;   // Dn
  int64_t counted = 0;
};

// What all rows of a call share, in the accumulation type.
template <class T>
struct Call {
  const CrossEntropyArgs& a;
  RowConstants<T> k;
  Denominators d;
  const T* weight;         // [classes] or null
  const T* sample_weight;  // [rows] or null
  T* ref;                  // saved statistics, or null
  T* others;
  T* mass;
  bool backward;
  bool streamed;  // the gradient is stored past the caches

  explicit Call(const CrossEntropyArgs& args, bool is_backward)
      : a(args),
        weight(static_cast<const T*>(args.weight)),
        sample_weight(static_cast<const T*>(args.sample_weight)),
        ref(static_cast<T*>(args.saved)),
        others(ref ? ref + args.rows() : nullptr),
        mass(ref && args.soft ? others + args.rows() : nullptr),
        backward(is_backward),
        streamed(args.grad && args.grad != args.logits &&
                 args.rows() * args.classes * size_of(args.logits_type) >= kStreamBytes &&
                 (!takes_row_path(args) || args.classes * size_of(args.logits_type) >= kStreamRowBytes)) {
    double weight_sum = double(args.classes);
    if (weight) {
      weight_sum = 0;
      for (int64_t c = 0; c < args.classes; ++c) weight_sum += double(weight[c]);
    }
    k = {T(args.label_smoothing),
         T(args.label_smoothing / double(args.classes)),
         T(weight_sum),
         T(args.z_loss),
         T(args.logit_scale),
         T(args.softcap),
         T(args.softcap > 0 ? 1 / args.softcap : 0)};
  }
  // 1 / D and 1 / Dn for mean, else 1.
  T per_d() const { return a.reduction == Reduction::mean ? T(1) / T(d.weight) : T(1); }
  T per_dn() const { return a.reduction == Reduction::mean ? T(1) / T(d.count) : T(1); }
  T grad_output(int64_t row) const {
    return T(load_scalar(a.grad_output, a.loss_type, a.grad_output_per_row ? row : 0));
  }
};

template <bool kTransform, class T>
inline vec<T> transform(const RowConstants<T>& k, vec<T> x) {
  if constexpr (kTransform) {
    x = x * k.logit_scale;
    if (k.softcap > T(0)) x = k.softcap * tanh_of(x * k.inv_softcap);
  }
  return x;
}
template <bool kTransform, class T>
inline T transform_scalar(const RowConstants<T>& k, T x) {
  if constexpr (kTransform)
    return transform<kTransform, T>(k, splat(x))[0];
  else
    return x;
}
// dz/dx from z.
template <class V, class T>
inline V transform_slope(const RowConstants<T>& k, V z) {
  V u = z * k.inv_softcap;  // 0 without a cap
  return k.logit_scale * (T(1) - u * u);
}

// q of a probability target.
template <class T>
inline vec<T> soft_q(const RowConstants<T>& k, vec<T> p, vec<T> w) {
  return w * (p * (T(1) - k.smoothing) + k.smooth_share);
}
// What q is multiplied with in sum_c q_c d_c. The product itself stays in the sum, where it is always contracted to a
// fused multiply-add, so that every variant of a kernel gives the same bits.
template <class T>
inline vec<T> factor_of(vec<T> q, vec<T> d, bool zero_times_inf) {
  return zero_times_inf ? (q == T(0) ? vec<T>{} : d) : d;
}

// ---------------------------------------------------------------------------------------------------- row path

// The vectors of a chunk of one row: f(offset, lanes, n) with n < lanes only at the very end.
template <class T, class F>
inline void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t c = begin;
  for (; c + kLanes<T> <= end; c += kLanes<T>) f(c, kLanes<T>);
  if (c < end) f(c, end - c);
}
template <class S>
inline vec<accum_t<S>> load_n(const S* p, int64_t n, accum_t<S> fill) {
  return n == kLanes<accum_t<S>> ? load(p) : load_tail(p, n, fill);
}
template <class S>
inline void store_n(S* p, int64_t n, vec<accum_t<S>> v) {
  if (n == kLanes<accum_t<S>>)
    store(p, v);
  else
    store_tail(p, n, v);
}
// Probabilities of one chunk, converted to the accumulation type.
template <class T>
inline void load_probabilities(const CrossEntropyArgs& a, int64_t offset, int64_t n, T* out) {
  with_storage(a.prob_type, [&](auto* tag) {
    auto* p = static_cast<decltype(tag)>(const_cast<void*>(a.target)) + offset;
    for (int64_t c = 0; c < n; c += kLineBytes / int64_t(sizeof *p))
      __builtin_prefetch(p + kChunk + c);  // the next chunk
    for (int64_t c = 0; c < n; ++c) out[c] = T(to_accum(p[c]));
  });
}

// The exponentials of a row, as the statistics leave them for the gradient: e^(z_c - chunk_ref[c / kChunk]).
template <class T>
struct KeptRow {
  T* exps;       // [classes], padded to a whole vector
  T* chunk_ref;  // [chunks]
};

// Statistics of the row x[classes], each element read once from memory; *best is the chunk that holds the maximum.
//
// Exponentials are taken relative to a running reference: the maximum of the first chunk, which is read twice (the
// second time from L1), until a chunk exceeds it by more than kHeadroom and is done again relative to its own maximum.
// At the end all is brought to the maximum of the row.
template <Mode kMode, bool kTransform, bool kKeep, class S, class T>
inline RowStats<T> row_stats(const Call<T>& call, const S* x, int64_t prob_offset, int64_t target, int64_t* best,
                             const KeptRow<T>& kept) {
  constexpr T kHeadroom = 8;  // small: the error of exp grows with its argument
  const int64_t classes = call.a.classes;
  const bool zero_inf = call.a.zero_times_inf;
  const RowConstants<T>& k = call.k;
  alignas(64) T prob[kMode == Mode::soft ? kChunk + kLanes<T> : 1];
  T max = -kInf<T>, ref = 0;
  vec<T> sum{}, dot{}, mass{};
  T done = 0;  // smooth: mass of the chunks before this one
  auto rebase = [&](T to) {
    if (max > -kInf<T>) {
      sum *= exp_of_scalar(ref - to);
    }
    if constexpr (kMode == Mode::smooth) dot[0] += done * (ref - to);
    if constexpr (kMode == Mode::smooth_weighted || kMode == Mode::soft)
      if (done > T(0)) dot += mass * (ref - to);
    ref = to;
  };
  const int64_t target_vector = target >= 0 ? target / kLanes<T> * kLanes<T> : -1;  // chunks hold whole vectors
  for (int64_t c0 = 0; c0 < classes; c0 += kChunk) {
    const int64_t c1 = min_of(classes, c0 + kChunk);
    const T fill = T(to_accum(x[c0]));
    if constexpr (kMode == Mode::soft) load_probabilities(call.a, prob_offset + c0, c1 - c0, prob);
    if (!(max > -kInf<T>)) {  // no reference yet
      vec<T> m0 = splat(-kInf<T>), m1 = m0, m2 = m0, m3 = m0;
      int64_t c = c0;
      for (; c + 4 * kLanes<T> <= c1; c += 4 * kLanes<T>) {
        m0 = max_of(transform<kTransform, T>(k, load(x + c)), m0);
        m1 = max_of(transform<kTransform, T>(k, load(x + c + kLanes<T>)), m1);
        m2 = max_of(transform<kTransform, T>(k, load(x + c + 2 * kLanes<T>)), m2);
        m3 = max_of(transform<kTransform, T>(k, load(x + c + 3 * kLanes<T>)), m3);
      }
      for_vectors<T>(
          c, c1, [&](int64_t i, int64_t n) { m0 = max_of(transform<kTransform, T>(k, load_n(x + i, n, fill)), m0); });
      const T first = max_lanes<T>(max_of(max_of(m1, m0), max_of(m3, m2)));
      if (first > -kInf<T>) rebase(first);
    }
    vec<T> s0, s1, max0, max1, chunk_dot, chunk_mass;
    auto add = [&](int64_t i, int64_t n, vec<T>& s, vec<T>& m) {
      __builtin_prefetch(x + i + kChunk);  // the next chunk arrives while this one is computed
      const vec<T> z = transform<kTransform, T>(k, load_n(x + i, n, fill));
      m = max_of(z, m);
      vec<T> d = z - ref;
      vec<T> e = exp_of(d);
      if constexpr (kKeep) store(kept.exps + i, e);
      if (n < kLanes<T>) {
        auto in_row = iota<T>() < T(n);
        e = in_row ? e : vec<T>{};
        d = in_row ? d : vec<T>{};
      }
      if (i == target_vector) e[target - i] = T(0);
      s += e;
      if constexpr (kMode == Mode::smooth) chunk_dot += d;
      if constexpr (kMode == Mode::smooth_weighted) {
        const vec<T> q = load_n(call.weight + i, n, T(0));
        chunk_dot += q * factor_of<T>(q, d, zero_inf);
        chunk_mass += q;
      }
      if constexpr (kMode == Mode::soft) {
        const vec<T> w = call.weight ? load_n(call.weight + i, n, T(0)) : splat(T(1));
        vec<T> q = soft_q<T>(k, load_n(prob + (i - c0), n, T(0)), w);
        if (n < kLanes<T>) q = iota<T>() < T(n) ? q : vec<T>{};
        chunk_dot += q * factor_of<T>(q, d, zero_inf);
        chunk_mass += q;
      }
    };
    T chunk_max;
    for (;;) {
      s0 = s1 = chunk_dot = chunk_mass = vec<T>{};
      max0 = max1 = splat(-kInf<T>);
      int64_t c = c0;
      for (; c + 2 * kLanes<T> <= c1; c += 2 * kLanes<T>) {
        add(c, kLanes<T>, s0, max0);
        add(c + kLanes<T>, kLanes<T>, s1, max1);
      }
      for_vectors<T>(c, c1, [&](int64_t i, int64_t n) { add(i, n, s0, max0); });
      chunk_max = max_lanes<T>(max_of(max0, max1));
      if (!(chunk_max > ref + kHeadroom)) break;
      rebase(chunk_max);
    }
    if (chunk_max > max) {
      max = chunk_max;
      *best = c0;
    }
    // Exponentials of -inf are 0 whatever they were relative to.
    if constexpr (kKeep) kept.chunk_ref[c0 / kChunk] = max > -kInf<T> ? ref : -kInf<T>;
    sum += s0 + s1;
    dot += chunk_dot;
    mass += chunk_mass;
    done += T(c1 - c0);
  }
  if (max > ref) rebase(max);
  // A row of nothing but -inf has no softmax: nan, as in torch.
  const T total = sum_lanes<T>(sum);
  return {ref, max > -kInf<T> ? total : total + kNan<T>, sum_lanes<T>(dot), sum_lanes<T>(mass)};
}

// The gradient of one row from its coefficients and, if kKept, the exponentials that its statistics left;
// `target_grad` is the target's own, already complete (see finish_batch).
template <Mode kMode, bool kTransform, bool kKept, class S, class T>
inline void row_grad(const Call<T>& call, const S* x, int64_t prob_offset, T ref, T softmax_scale, T q_scale,
                     int64_t target, T target_grad, const KeptRow<T>& kept, S* grad) {
  const int64_t classes = call.a.classes;
  const RowConstants<T>& k = call.k;
  alignas(64) T prob[kMode == Mode::soft ? kChunk + kLanes<T> : 1];
  for (int64_t c0 = 0; c0 < classes; c0 += kChunk) {
    const int64_t c1 = min_of(classes, c0 + kChunk);
    const T scale = kKept ? softmax_scale * exp_of_scalar(kept.chunk_ref[c0 / kChunk] - ref) : softmax_scale;
    if constexpr (kMode == Mode::soft) load_probabilities(call.a, prob_offset + c0, c1 - c0, prob);
    auto gradient = [&](int64_t i, int64_t n) {
      vec<T> z{}, r;
      if constexpr (!kKept) __builtin_prefetch(x + i + kChunk);
      if constexpr (!kKept || kTransform) z = transform<kTransform, T>(k, load_n(x + i, n, T(0)));
      if constexpr (kKept)
        r = load(kept.exps + i) * scale;
      else
        r = exp_of(z - ref) * scale;
      if constexpr (kMode == Mode::smooth) r -= q_scale;
      if constexpr (kMode == Mode::smooth_weighted) r -= q_scale * load_n(call.weight + i, n, T(0));
      if constexpr (kMode == Mode::soft) {
        vec<T> w = call.weight ? load_n(call.weight + i, n, T(0)) : splat(T(1));
        r -= q_scale * soft_q<T>(k, load_n(prob + (i - c0), n, T(0)), w);
      }
      if constexpr (kTransform) r *= transform_slope(k, z);
      if (uint64_t(target - i) < uint64_t(n)) r[target - i] = target_grad;
      return r;
    };
    auto edge = [&](int64_t begin, int64_t end) __attribute__((noinline)) {
      for_vectors<T>(begin, end, [&](int64_t i, int64_t n) { store_n(grad + i, n, gradient(i, n)); });
    };
    // Stores past the caches take whole lines; chunks are made of lines, so that all begin alike.
    const int64_t unit = call.streamed ? kLineBytes / int64_t(sizeof(S)) : kLanes<T>;
    const int64_t to_line = call.streamed ? int64_t(-uintptr_t(grad) % kLineBytes / sizeof(S)) : 0;
    const int64_t first = min_of(c0 + to_line, c1), last = first + (c1 - first) / unit * unit;
    if (first > c0) edge(c0, first);
    for (int64_t i = first; i < last; i += kLanes<T>)
      call.streamed ? stream(grad + i, gradient(i, kLanes<T>)) : store(grad + i, gradient(i, kLanes<T>));
    if (last < c1) edge(last, c1);
  }
}

template <class S>
inline bool row_has_nan(const S* x, int64_t stride, int64_t classes) {
  for (int64_t c = 0; c < classes; ++c) {
    const auto v = to_accum(x[c * stride]);
    if (v != v) return true;
  }
  return false;
}
// First index of the row's maximum; the first nan if there is one (torch.argmax). The transform keeps or, with a
// negative scale, reverses the order, so the logits themselves tell: two that a cap makes equal are still told apart.
template <bool kTransform, class S, class T>
inline int64_t row_argmax(const RowConstants<T>& k, const S* x, int64_t stride, int64_t classes, T max, bool has_nan,
                          int64_t from) {
  if (has_nan)
    for (int64_t c = 0; c < classes; ++c) {
      const T v = T(to_accum(x[c * stride]));
      if (v != v) return c;
    }
  if constexpr (kTransform) {
    const T sign = k.logit_scale > T(0) ? T(1) : k.logit_scale < T(0) ? T(-1) : T(0);
    int64_t best = 0;
    for (int64_t c = 1; c < classes && sign != T(0); ++c)
      if (sign * T(to_accum(x[c * stride])) > sign * T(to_accum(x[best * stride]))) best = c;
    return best;
  } else {
    for (int64_t c = from; c < classes; ++c)
      if (T(to_accum(x[c * stride])) == max) return c;
    return 0;
  }
}
// The same for a probability target.
inline int64_t prob_argmax(const CrossEntropyArgs& a, int64_t offset) {
  int64_t best = 0;
  double top = load_scalar(a.target, a.prob_type, offset);
  for (int64_t c = 1; c < a.classes && top == top; ++c) {
    double v = load_scalar(a.target, a.prob_type, offset + c * a.target_strides.cls);
    if (v > top || v != v) top = v, best = c;
  }
  return best;
}

// ----------------------------------------------------------------------------------------------- a batch of rows

// Where the rows first, ..., first + n - 1 of a tensor start.
class Rows {
  int64_t outer_ = 0, place_ = 0, inner_ = 1;
  Strides strides_{};

 public:
  int64_t step = 0;  // from each row to the next, 0 if that varies

  Rows() = default;
  Rows(int64_t first, int64_t n, int64_t inner, Strides s)
      : outer_(first / inner), place_(first % inner), inner_(inner), strides_(s) {
    const int64_t next = inner == 1 ? s.outer : s.inner;
    if (inner == 1 || place_ + n <= inner || s.outer == inner * s.inner) step = next;
  }
  int64_t operator[](int64_t b) const {
    if (step != 0) return outer_ * strides_.outer + place_ * strides_.inner + b * step;
    const int64_t at = place_ + b;
    return (outer_ + at / inner_) * strides_.outer + at % inner_ * strides_.inner;
  }
};

struct BlockSums {  // of one batch; doubles so that rows can be added in order without loss
  double nll = 0, z = 0, correct = 0;
};

// One value per row of a batch, in arrays padded to whole vectors.
template <class T>
class RowBatch {
  using lane_int = typename bits_of<T>::type;
  static constexpr int64_t kValues = 10;
  const int64_t pitch_;
  Scratch<T> values_;
  Scratch<int64_t> indices_;
  Scratch<lane_int> lane_target_;

 public:
  explicit RowBatch(int64_t rows)
      : pitch_(round_up(rows, kLanes<T>)), values_(kValues * pitch_), indices_(2 * pitch_), lane_target_(pitch_) {}
  T* value(int i) { return values_.get() + i * pitch_; }
  int64_t* index(int i) { return indices_.get() + i * pitch_; }

  T *const max = value(0), *const ref = value(1), *const others = value(2);  // statistics: see RowStats
  T *const dot = value(3), *const mass = value(4);
  T *const picked = value(5), *const target_exp = value(9);      // z_t, e^(z_t - ref)
  T *const softmax_scale = value(6), *const q_scale = value(7);  // gradient: per e^(z - ref), per q
  T* const target_grad = value(8);                               // the target's own, complete
  int64_t* const target = index(0);                              // class index, -1: ignored or none
  int64_t* const best = index(1);                                // where to look for the maximum
  Rows logits, prob, grad;
  lane_int* const lane_target = lane_target_.get();

  void set_targets(const CrossEntropyArgs& a, int64_t first, int64_t n) {
    // Copies of the members: stores to integers could change those, as far as the compiler knows, and it would not
    // use vectors.
    const int64_t ignored = a.ignore_index, pitch = pitch_;
    int64_t *const to = target, *const best_of = best;
    lane_int* const lanes = lane_target;
    for (int64_t b = a.soft ? 0 : n; b < pitch; ++b) to[b] = -1;
    if (!a.soft)
      with_index(a.index_type, [=, &a](auto* tag) {
        const auto* t = static_cast<decltype(tag)>(a.target) + first;
        for (int64_t b = 0; b < n; b += kLineBytes / int64_t(sizeof *t))
          __builtin_prefetch(t + n + b);  // the next batch
        for (int64_t b = 0; b < n; ++b) to[b] = int64_t(t[b]) == ignored ? -1 : int64_t(t[b]);
      });
    for (int64_t b = 0; b < pitch; ++b) {
      lanes[b] = lane_int(to[b]);
      best_of[b] = 0;
    }
    for (int64_t b = n; b < pitch_; ++b)  // lanes that are computed and not used
      ref[b] = others[b] = dot[b] = mass[b] = picked[b] = T(0);
  }
  void clear_statistics(int64_t lanes) {
    for (int64_t v = 0; v < lanes; v += kLanes<T>) {
      store(max + v, splat(-kInf<T>));
      T* const zeroed[] = {ref, others, dot, mass};
      for (T* p : zeroed) store(p + v, vec<T>{});
    }
  }
  void restore(const Call<T>& call, int64_t first, int64_t n) {
    // Out of range here only if somebody wrote to the targets after forward had looked: then without gradient.
    for (int64_t b = 0; b < pitch_; ++b)
      if (target[b] >= call.a.classes || target[b] < 0) lane_target[b] = lane_int(target[b] = -1);
    for (int64_t b = 0; b < pitch_; ++b) {
      const int64_t row = first + (b < n ? b : 0);
      ref[b] = call.ref[row];
      others[b] = call.others[row];
      mass[b] = call.mass ? call.mass[row] : T(0);
      dot[b] = T(0);
    }
  }
};

// All that is O(1) per row, from the statistics of a batch: losses, saved values, gradient coefficients.
template <Mode kMode, bool kTransform, class S, class T>
inline void finish_batch(const Call<T>& call, RowBatch<T>& s, int64_t first, int64_t n, BlockSums* sums) {
  const CrossEntropyArgs& a = call.a;
  const RowConstants<T>& k = call.k;
  const T per_d = call.per_d(), per_dn = call.per_dn();
  vec_double nll_sum{}, z_sum{};
  // In a loop of its own: one long chain of operations per vector would leave the processor waiting.
  for (int64_t v = 0; v < n; v += kLanes<T>) store(s.target_exp + v, exp_of(load(s.picked + v) - load(s.ref + v)));
  for (int64_t v = 0; v < n; v += kLanes<T>) {
    const int64_t row = first + v, m = min_of(kLanes<T>, n - v);
    ivec<T> target;
    __builtin_memcpy(&target, s.lane_target + v, sizeof target);
    const auto counts = kMode == Mode::soft ? iota<T>() < T(m) : target >= 0;
    const vec<T> ref = load(s.ref + v), others = load(s.others + v), dot = load(s.dot + v), mass = load(s.mass + v);
    const vec<T> picked = load(s.picked + v), d = picked - ref;
    const vec<T> e = target >= 0 ? load(s.target_exp + v) : vec<T>{}, sum = others + e;
    const bool wants_lse = kMode != Mode::index || k.z_loss != T(0) || a.lse;
    const vec<T> log_sum = wants_lse ? log_of(sum) : vec<T>{}, lse = ref + log_sum;
    vec<T> w_t = splat(T(1));
    if (kMode != Mode::soft && call.weight)
      for (int64_t b = 0; b < m; ++b)
        if (target[b] >= 0) w_t[b] = call.weight[target[b]];
    vec<T> sample = splat(T(1));
    if (call.sample_weight) sample = load_n(call.sample_weight + row, m, T(0));

    if (!call.backward) {
      vec<T> nll;
      if constexpr (kMode == Mode::soft)
        nll = spread_nll(mass, log_sum, dot);
      else {
        // Either form of target_nll from one logarithm.
        const vec<T> ratio = others / e, w = others < e ? T(1) + ratio : sum, log_w = log_of(w);
        vec<T> nll_t = target_nll(others, e, log_w, d, log1p_from(ratio, w, log_w));
        if (a.zero_times_inf) nll_t = w_t == T(0) ? vec<T>{} : nll_t;
        nll = index_row_nll(k, nll_t, log_sum, dot, w_t);
      }
      nll = counts ? nll * sample : vec<T>{};
      vec<T> z{};
      if (k.z_loss != T(0)) z = counts ? sample * (k.z_loss * lse * lse) : vec<T>{};
      nll_sum += widen(nll);
      z_sum += widen(z);
      if (a.loss && a.reduction == Reduction::none)
        for (int64_t b = 0; b < m; ++b) store_scalar(a.loss, a.loss_type, row + b, double(nll[b]) + double(z[b]));
      if (call.ref) {
        store_n(call.ref + row, m, ref);
        store_n(call.others + row, m, others);
        if (call.mass) store_n(call.mass + row, m, mass);
      }
      if (a.lse) store_n(static_cast<T*>(a.lse) + row, m, lse);
      if (a.argmax || a.accuracy)
        for (int64_t b = 0; b < m; ++b) {
          const S* x = static_cast<const S*>(a.logits) + s.logits[v + b];
          // No nan in it: the sum was not to be had because all is -inf, or something +inf.
          if (a.lse && sum[b] != sum[b] && !row_has_nan(x, a.logits_strides.cls, a.classes))
            static_cast<T*>(a.lse)[row + b] = ref[b] > T(0) ? kInf<T> : -kInf<T>;
          const int64_t top = row_argmax<kTransform, S, T>(k, x, a.logits_strides.cls, a.classes, s.max[v + b],
                                                           sum[b] != sum[b], s.best[v + b]);
          if (a.argmax) a.argmax[row + b] = top;
          sums->correct += top == (kMode == Mode::soft ? prob_argmax(a, s.prob[v + b]) : s.target[v + b]);
        }
    }
    if (!a.grad) continue;
    vec<T> up = sample;  // what the row's loss weighs in the result that is differentiated
    if (call.backward)
      for (int64_t b = 0; b < m; ++b) up[b] *= call.grad_output(row + b);
    const vec<T> u = counts ? up * per_d : vec<T>{};
    const vec<T> uz = counts && k.z_loss != T(0) ? up * per_dn : vec<T>{};
    RowGrad<vec<T>> g;
    if constexpr (kMode == Mode::soft)
      g = soft_row_grad(k, lse, mass, u, uz);
    else
      g = index_row_grad(k, lse, w_t, u, uz);
    const vec<T> per_sum = T(1) / sum;
    store(s.softmax_scale + v, (g.target_scale + g.rest_scale) * per_sum);
    store(s.q_scale + v, g.q_scale);
    vec<T> own = target_grad(g, others, e, per_sum);
    if constexpr (kMode == Mode::smooth) own -= g.q_scale;
    if constexpr (kMode == Mode::smooth_weighted) own -= g.q_scale * w_t;
    if constexpr (kTransform) own *= transform_slope(k, picked);
    store(s.target_grad + v, own);
  }
  sums->nll += sum_lanes<double>(nll_sum);
  sums->z += sum_lanes<double>(z_sum);
}

// The exponentials of a batch of rows, if they are kept.
template <class T>
class KeptRows {
  const int64_t chunks_, pitch_;
  Scratch<T> exps_, chunk_ref_;

 public:
  KeptRows(int64_t rows, int64_t classes)
      : chunks_((classes + kChunk - 1) / kChunk),
        pitch_(round_up(classes, kLanes<T>)),
        exps_(rows * pitch_),
        chunk_ref_(rows * chunks_) {}
  KeptRow<T> row(int64_t b) { return {exps_.get() + b * pitch_, chunk_ref_.get() + b * chunks_}; }
};

template <Mode kMode, bool kTransform, bool kKeep, class S>
inline void row_path(const Call<accum_t<S>>& call, RowBatch<accum_t<S>>& s, KeptRows<accum_t<S>>& exps, int64_t first,
                     int64_t n, BlockSums* sums) {
  using T = accum_t<S>;
  const CrossEntropyArgs& a = call.a;
  const S* logits = static_cast<const S*>(a.logits);
  s.logits = {first, n, a.inner, a.logits_strides};
  if constexpr (kMode == Mode::soft) s.prob = {first, n, a.inner, a.target_strides};
  s.set_targets(a, first, n);
  if (call.backward) s.restore(call, first, n);
  const bool ignored_matter = call.backward || a.grad || a.saved || a.lse || a.argmax || a.accuracy;
  for (int64_t b = 0; b < n; ++b) {
    const S* x = logits + s.logits[b];
    s.picked[b] = s.target[b] >= 0 ? transform_scalar<kTransform, T>(call.k, T(to_accum(x[s.target[b]]))) : T(0);
    if (call.backward) continue;
    if (kMode != Mode::soft && s.target[b] < 0 && !ignored_matter) {  // nothing depends on this row
      s.ref[b] = s.others[b] = s.dot[b] = T(0);
      continue;
    }
    RowStats<T> st =
        row_stats<kMode, kTransform, kKeep, S, T>(call, x, s.prob[b], s.target[b], &s.best[b], exps.row(b));
    s.max[b] = s.ref[b] = st.ref;
    s.others[b] = st.others;
    s.dot[b] = st.dot;
    s.mass[b] = st.mass;
  }
  finish_batch<kMode, kTransform, S, T>(call, s, first, n, sums);
  if (!a.grad) return;
  s.grad = {first, n, a.inner, a.grad_strides};
  for (int64_t b = 0; b < n; ++b)
    row_grad<kMode, kTransform, kKeep, S, T>(call, logits + s.logits[b], s.prob[b], s.ref[b], s.softmax_scale[b],
                                             s.q_scale[b], s.target[b], s.target_grad[b], exps.row(b),
                                             static_cast<S*>(a.grad) + s.grad[b]);
}

// --------------------------------------------------------------------------------------------------- tile path

// tile[c][b] at tile + c * pitch + b, for n rows; lanes past them hold 0. The class stride of x is `stride`. Classes
// next to each other are transposed, rows next to each other are copied, anything else is gathered.
template <class S, class T>
inline void load_tile(const S* x, const Rows& rows, int64_t n, int64_t stride, int64_t c0, int64_t classes, T* tile,
                      int64_t pitch) {
  const int64_t padded = round_up(n, kLanes<T>);
  constexpr bool kSameAccum = sizeof(accum_t<S>) == sizeof(T);
  const int64_t step = rows.step;
  const S* first = x + rows[0] + c0 * stride;
  if (step == 1) {
    for (int64_t c = 0; c < classes; ++c) {
      const S* p = first + c * stride;
      T* d = tile + c * pitch;
      if constexpr (kSameAccum) {
        for_vectors<T>(0, n, [&](int64_t b, int64_t m) { store(d + b, load_n(p + b, m, T(0))); });
      } else {
        for (int64_t b = 0; b < padded; ++b) d[b] = b < n ? T(to_accum(p[b])) : T(0);
      }
    }
    return;
  }
  int64_t b = 0;
  if constexpr (kSameAccum && sizeof(T) == 4) {
    if (step != 0 && stride == 1 && classes >= 4)
      for (; b + kLanes<T> <= n; b += kLanes<T>)
        for (int64_t i = 0; i < classes; i += 4) {
          const int64_t c = min_of(i, classes - 4);  // the last four may overlap those before
          vec<T> m[4];
          for (int j = 0; j < 4; ++j) m[j] = load_fours(first + (b + j) * step + c, 4 * step);
          transpose_fours(m);
          for (int j = 0; j < 4; ++j) store(tile + (c + j) * pitch + b, m[j]);
        }
  }
  for (; b < n; ++b) {
    const S* p = x + rows[b] + c0 * stride;
    for (int64_t c = 0; c < classes; ++c) tile[c * pitch + b] = T(to_accum(p[c * stride]));
  }
  for (int64_t c = 0; c < classes; ++c)
    for (b = n; b < padded; ++b) tile[c * pitch + b] = T(0);
}
// The way back, for rows that are not adjacent; first[0] is class c0 of the first of them.
template <class S, class T>
inline void store_tile(S* first, const Rows& rows, int64_t n, int64_t stride, int64_t classes, const T* tile,
                       int64_t pitch) {
  const int64_t step = rows.step;
  int64_t b = 0;
  if constexpr (sizeof(T) == 4) {
    if (step != 0 && stride == 1 && classes >= 4)
      for (; b + kLanes<T> <= n; b += kLanes<T>)
        for (int64_t i = 0; i < classes; i += 4) {
          const int64_t c = min_of(i, classes - 4);
          vec<T> m[4];
          for (int j = 0; j < 4; ++j) m[j] = load(tile + (c + j) * pitch + b);
          transpose_fours(m);
          for (int j = 0; j < 4; ++j) store_fours(first + (b + j) * step + c, 4 * step, m[j]);
        }
  }
  for (; b < n; ++b) {
    S* p = first + (rows[b] - rows[0]);
    for (int64_t c = 0; c < classes; ++c) p[c * stride] = from_accum<S, T>(tile[c * pitch + b]);
  }
}

// memcpy past the caches, but for the lines at both ends that it fills in part.
inline void stream_bytes(void* to, const void* from, int64_t bytes) {
  constexpr int64_t kStep = int64_t(sizeof(vec<float>));
  char* p = static_cast<char*>(to);
  const char* q = static_cast<const char*>(from);
  int64_t i = min_of(bytes, int64_t(-uintptr_t(p) % kLineBytes));
  __builtin_memcpy(p, q, i);
  for (; i + kLineBytes <= bytes; i += kLineBytes)
    for (int64_t at = i; at < i + kLineBytes; at += kStep) {
      vec<float> v;
      __builtin_memcpy(&v, q + at, sizeof v);
      stream(reinterpret_cast<float*>(p + at), v);
    }
  __builtin_memcpy(p + i, q + i, bytes - i);
}

// Fetches what the next tile will be made of, a vector at a call, while the exponentials of this one are computed: its
// pieces (a class, or all rows at once where classes are neighbours) are too short for the hardware to run ahead, and
// so reading and computing take place at the same time.
class NextTile {
  const char* p_ = nullptr;
  int64_t step_ = 0, piece_ = 0, jump_ = 0, left_ = 0;

 public:
  NextTile() = default;
  // Of n rows of x, in tiles of `classes` out of all_classes, of which this begins with c0.
  template <class S>
  NextTile(const S* x, const Rows& rows, int64_t n, int64_t stride, int64_t c0, int64_t classes, int64_t all_classes)
      : step_(kLanes<accum_t<S>> * int64_t(sizeof(S))) {
    const bool same_rows = classes < all_classes, by_class = rows.step == 1 || same_rows;
    p_ = reinterpret_cast<const char*>(x + rows[0] + (same_rows ? (c0 + classes) * stride : n * rows.step));
    left_ = piece_ = (by_class ? n : n * classes) * int64_t(sizeof(S));
    jump_ = by_class ? stride * int64_t(sizeof(S)) - piece_ : 0;
  }
  void fetch() {
    __builtin_prefetch(p_, 0, 2);
    p_ += step_;
    left_ -= step_;
    if (left_ <= 0) {
      p_ += jump_ + left_;
      left_ = piece_;
    }
  }
};

// How the tile path cuts a problem: rows per tile and classes held at a time. Depends on the shape alone.
struct TileShape {
  int64_t rows, pitch, classes;
};
template <class T>
inline TileShape tile_shape(const CrossEntropyArgs& a) {
  constexpr int64_t lanes = kLanes<T>, element = int64_t(sizeof(T));
  const int64_t fit = kTileBytes / element / (a.classes > 0 ? a.classes : 1) / 64 * 64;
  const int64_t rows = clamp_to(fit, 64, 512);
  const int64_t pitch = rows + lanes;  // rows are powers of two times lanes: keep columns out of one cache set
  return {rows, pitch, clamp_to(kTileBytesMax / element / pitch, 1, a.classes > 0 ? a.classes : 1)};
}

// Brings the maximum of a tile's rows, and what has been summed relative to it, up to date with further classes. For
// class indices z_t is not in the tile but in `picked` (see tile_path), so that nothing need be compared with the
// target.
template <Mode kMode, class T>
inline void tile_reference(RowBatch<T>& s, int64_t lanes, const T* tile, int64_t pitch, int64_t c0, int64_t classes) {
  constexpr int kTogether = 4;  // independent maxima: one alone would wait for itself
  for (int64_t v = 0; v < lanes; v += kTogether * kLanes<T>) {
    vec<T> top[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      top[i] = load(s.max + v + i * kLanes<T>);
      if constexpr (kMode == Mode::index) top[i] = max_of(load(s.picked + v + i * kLanes<T>), top[i]);
    }
    for (int64_t c = 0; c < classes; ++c)
      for (int i = 0; i < kTogether; ++i) top[i] = max_of(load(tile + c * pitch + v + i * kLanes<T>), top[i]);
    for (int i = 0; i < kTogether; ++i) {
      const int64_t at = v + i * kLanes<T>;
      const vec<T> max = top[i], ref = max > -kInf<T> ? max : vec<T>{};
      if (c0 > 0) {
        const vec<T> shift = load(s.ref + at) - ref, others = load(s.others + at);
        store(s.others + at, load(s.max + at) > -kInf<T> ? others * exp_of(shift) : others);
        if constexpr (kMode != Mode::index) store(s.dot + at, load(s.dot + at) + load(s.mass + at) * shift);
      }
      store(s.max + at, max);
      store(s.ref + at, ref);
    }
  }
}

// Adds classes to the sums of a tile's rows; with kKeep, z[c][b] becomes e^(z - ref). Terms are added in blocks of
// classes, blocks in the tile, tiles in the row: one long sum would lose a digit or two at 1e5 classes.
template <Mode kMode, bool kKeep, class T>
inline void tile_sums(const Call<T>& call, RowBatch<T>& s, int64_t lanes, T* tile, const T* prob, int64_t pitch,
                      int64_t c0, int64_t classes, NextTile next, NextTile next_prob) {
  const RowConstants<T>& k = call.k;
  const bool zero_inf = call.a.zero_times_inf;
  constexpr int64_t kBlock = 64;
  for (int64_t v = 0; v < lanes; v += kLanes<T>) {
    const vec<T> ref = load(s.ref + v);
    vec<T> others{}, dot{}, mass{}, blocks_others{}, blocks_dot{}, blocks_mass{};
    ivec<T> target;
    __builtin_memcpy(&target, s.lane_target + v, sizeof target);
    target -= typename bits_of<T>::type(c0);
    for (int64_t c = 0;;) {
      for (const int64_t end = min_of(c + kBlock, classes); c < end; ++c) {
        next.fetch();
        if constexpr (kMode == Mode::soft) next_prob.fetch();
        vec<T> d = load(tile + c * pitch + v) - ref;
        vec<T> e = exp_of(d);
        if constexpr (kKeep) store(tile + c * pitch + v, e);
        if constexpr (kMode == Mode::smooth || kMode == Mode::smooth_weighted)
          e = target == typename bits_of<T>::type(c) ? vec<T>{} : e;
        others += e;
        if constexpr (kMode == Mode::smooth) {
          dot += d;
          mass += T(1);
        }
        if constexpr (kMode == Mode::smooth_weighted) {
          vec<T> q = splat(call.weight[c0 + c]);
          dot += q * factor_of<T>(q, d, zero_inf);
          mass += q;
        }
        if constexpr (kMode == Mode::soft) {
          vec<T> q = soft_q<T>(k, load(prob + c * pitch + v), splat(call.weight ? call.weight[c0 + c] : T(1)));
          dot += q * factor_of<T>(q, d, zero_inf);
          mass += q;
        }
      }
      if (c >= classes) break;
      blocks_others += others;
      blocks_dot += dot;
      blocks_mass += mass;
      others = dot = mass = vec<T>{};
    }
    store(s.others + v, load(s.others + v) + (blocks_others + others));
    if constexpr (kMode != Mode::index) {
      store(s.dot + v, load(s.dot + v) + (blocks_dot + dot));
      store(s.mass + v, load(s.mass + v) + (blocks_mass + mass));
    }
  }
}

// The gradient from z[c][b], or with kKept from e^(z - ref): put(c, v, g) for the vector v of class c0 + c.
template <Mode kMode, bool kTransform, bool kKept, class T, class F>
inline void tile_gradient(const Call<T>& call, const RowBatch<T>& s, int64_t lanes, const T* tile, const T* prob,
                          int64_t pitch, int64_t c0, int64_t classes, NextTile next, NextTile next_prob, const F& put) {
  using lane_int = typename bits_of<T>::type;
  const RowConstants<T> k = call.k;
  const T *const ref = s.ref, *const softmax_scale = s.softmax_scale, *const q_scale = s.q_scale;
  const T* const target_grad = s.target_grad;
  const lane_int* const lane_target = s.lane_target;
  for (int64_t c = 0; c < classes; ++c) {
    const T w = call.weight ? call.weight[c0 + c] : T(1);
    for (int64_t v = 0; v < lanes; v += kLanes<T>) {
      if constexpr (!kKept) next.fetch();
      if constexpr (!kKept && kMode == Mode::soft) next_prob.fetch();
      const vec<T> z = load(tile + c * pitch + v);
      vec<T> g = (kKept ? z : exp_of(z - load(ref + v))) * load(softmax_scale + v);
      if constexpr (kMode == Mode::smooth) g -= load(q_scale + v);
      if constexpr (kMode == Mode::smooth_weighted) g -= load(q_scale + v) * w;
      if constexpr (kMode == Mode::soft) g -= load(q_scale + v) * soft_q<T>(k, load(prob + c * pitch + v), splat(w));
      if constexpr (kTransform) g *= transform_slope(k, z);
      if constexpr (kMode != Mode::soft) {
        ivec<T> target;
        __builtin_memcpy(&target, lane_target + v, sizeof target);
        g = target == lane_int(c0 + c) ? load(target_grad + v) : g;
      }
      put(c, v, g);
    }
  }
}

template <class T>
struct Tiles {  // z, then its gradient; probabilities; the gradient once more, in the order of memory
  Tiles(const TileShape& shape, bool soft, bool staged)
      : shape(shape),
        tile(shape.classes * shape.pitch),
        prob(soft ? shape.classes * shape.pitch : 1),
        stage(staged ? shape.classes * shape.rows : 1) {}
  const TileShape shape;
  Scratch<T> tile, prob, stage;
};

template <Mode kMode, bool kTransform, class S>
inline void tile_path(const Call<accum_t<S>>& call, RowBatch<accum_t<S>>& s, Tiles<accum_t<S>>& tiles, int64_t first,
                      int64_t n, BlockSums* sums) {
  using T = accum_t<S>;
  const CrossEntropyArgs& a = call.a;
  const RowConstants<T>& k = call.k;
  const int64_t step = tiles.shape.classes, pitch = tiles.shape.pitch, lanes = round_up(n, kLanes<T>);
  const S* x = static_cast<const S*>(a.logits);
  T *const tile = tiles.tile.get(), *const prob = tiles.prob.get();
  s.logits = {first, n, a.inner, a.logits_strides};
  if constexpr (kMode == Mode::soft) s.prob = {first, n, a.inner, a.target_strides};

  auto load_classes = [&](int64_t c0, int64_t classes) {
    load_tile(x, s.logits, n, a.logits_strides.cls, c0, classes, tile, pitch);
    if constexpr (kTransform)
      for (int64_t c = 0; c < classes; ++c)
        for (int64_t v = 0; v < lanes; v += kLanes<T>) {
          T* p = tile + c * pitch + v;
          store(p, transform<kTransform, T>(k, load(p)));
        }
    if constexpr (kMode == Mode::soft)
      with_storage(a.prob_type, [&](auto* tag) {
        load_tile(static_cast<const decltype(tag)>(const_cast<void*>(a.target)), s.prob, n, a.target_strides.cls, c0,
                  classes, prob, pitch);
      });
  };

  auto next = [&](int64_t c0, int64_t classes) {
    return NextTile(x, s.logits, n, a.logits_strides.cls, c0, classes, a.classes);
  };
  auto next_prob = [&](int64_t c0, int64_t classes) {
    if constexpr (kMode != Mode::soft)
      return NextTile();
    else
      return with_storage(a.prob_type, [&](auto* tag) {
        return NextTile(static_cast<const decltype(tag)>(const_cast<void*>(a.target)), s.prob, n, a.target_strides.cls,
                        c0, classes, a.classes);
      });
  };
  const bool whole = step >= a.classes;
  // With a transform the gradient needs z itself once more; classes that come in parts are read again.
  const bool keep = whole && !kTransform && !call.backward && a.grad;
  s.set_targets(a, first, n);
  for (int64_t v = 0; v < lanes; v += kLanes<T>)
    store(s.picked + v, kMode == Mode::index ? splat(-kInf<T>) : vec<T>{});  // where there is no target
  if (whole) load_classes(0, a.classes);
  // z_t of the rows whose target is in the tile; -inf in its place adds nothing to the sum of the others.
  auto pick = [tile, pitch, n, target = s.target, picked = s.picked, apart = kMode == Mode::index && !call.backward](
                  int64_t c0, int64_t classes) {
    for (int64_t b = 0; b < n; ++b) {
      const int64_t c = target[b] - c0;
      if (target[b] < 0 || uint64_t(c) >= uint64_t(classes)) continue;
      T* const z = tile + c * pitch + b;
      picked[b] = *z;
      if (apart) *z = -kInf<T>;
    }
  };
  if (call.backward) {
    s.restore(call, first, n);
    if (whole) pick(0, a.classes);
    for (int64_t b = 0; b < n && !whole; ++b)
      if (s.target[b] >= 0)
        s.picked[b] =
            transform_scalar<kTransform, T>(k, T(to_accum(x[s.logits[b] + s.target[b] * a.logits_strides.cls])));
  } else {
    s.clear_statistics(lanes);
    for (int64_t c0 = 0; c0 < a.classes; c0 += step) {
      const int64_t classes = min_of(step, a.classes - c0);
      if (!whole) load_classes(c0, classes);
      pick(c0, classes);
      tile_reference<kMode, T>(s, lanes, tile, pitch, c0, classes);
      auto add = [&](auto kept) {
        tile_sums<kMode, decltype(kept)::value, T>(call, s, lanes, tile, prob, pitch, c0, classes, next(c0, classes),
                                                   next_prob(c0, classes));
      };
      keep ? add(constant<true>{}) : add(constant<false>{});
    }
    for (int64_t b = 0; b < lanes; ++b)
      s.others[b] += s.max[b] > -kInf<T> ? T(0) : kNan<T>;  // nothing but -inf (or nan): no softmax
  }
  finish_batch<kMode, kTransform, S, T>(call, s, first, n, sums);
  if (!a.grad) return;
  s.grad = {first, n, a.inner, a.grad_strides};
  for (int64_t c0 = 0; c0 < a.classes; c0 += step) {
    const int64_t classes = min_of(step, a.classes - c0);
    if (!whole) load_classes(c0, classes);
    auto gradient = [&](const auto& put) {
      auto from = [&](auto kept) {
        tile_gradient<kMode, kTransform, decltype(kept)::value, T>(call, s, lanes, tile, prob, pitch, c0, classes,
                                                                   next(c0, classes), next_prob(c0, classes), put);
      };
      keep ? from(constant<true>{}) : from(constant<false>{});
    };
    S* const grad = static_cast<S*>(a.grad);
    const int64_t stride = a.grad_strides.cls;
    if (s.grad.step == 1) {
      S* const base = grad + s.grad[0] + c0 * stride;
      const bool streamed = call.streamed;
      gradient([base, stride, n, streamed](int64_t c, int64_t v, vec<T> g) {
        S* const to = base + c * stride + v;
        if (v + kLanes<T> > n)
          store_tail(to, n - v, g);
        else
          streamed ? stream(to, g) : store(to, g);
      });
    } else {
      gradient([tile, pitch](int64_t c, int64_t v, vec<T> g) { store(tile + c * pitch + v, g); });
      if (call.streamed && whole && stride == 1 && s.grad.step == a.classes) {
        S* const stage = reinterpret_cast<S*>(tiles.stage.get());
        store_tile(stage, s.grad, n, stride, classes, tile, pitch);
        stream_bytes(grad + s.grad[0], stage, n * a.classes * int64_t(sizeof(S)));
      } else {
        store_tile(grad + s.grad[0] + c0 * stride, s.grad, n, stride, classes, tile, pitch);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------ driver

// D, Dn and the first bad index, from the targets alone, before anything is written.
template <class T>
inline Status denominators(const CrossEntropyArgs& a, ParallelFor parallel_for, Denominators* d) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* sample_weight = static_cast<const T*>(a.sample_weight);
  const int64_t rows = a.rows();
  if (a.soft && !sample_weight) {
    *d = {double(rows), double(rows), rows};
    return {};
  }
  constexpr int64_t kBlock = 4096;
  struct Part {
    double weight, count, counted;
    int64_t bad;
  };
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  Scratch<Part> parts(blocks > 0 ? blocks : 1);
  parallel(parallel_for, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kBlock, last = min_of(rows, first + kBlock);
      Part p{0, 0, double(last - first), -1};
      if (!a.soft)
        with_index(a.index_type, [&](auto* tag) {
          const auto* target = static_cast<decltype(tag)>(a.target);
          auto counts = [&](int64_t row) { return int64_t(target[row]) != a.ignore_index; };
          auto outside = [&](int64_t row) { return uint64_t(int64_t(target[row])) >= uint64_t(a.classes); };
          int64_t counted = 0, bad = 0;
          for (int64_t row = first; row < last; ++row) {
            counted += counts(row);
            bad += counts(row) & outside(row);
          }
          p.counted = double(counted);
          for (int64_t row = first; bad > 0 && p.bad < 0; ++row)
            if (counts(row) && outside(row)) p.bad = row;
        });
      if (!weight && !sample_weight) p.count = p.weight = p.counted;
      for (int64_t row = first; (weight || sample_weight) && p.bad < 0 && row < last; ++row) {
        const int64_t t = a.soft ? 0 : load_index(a.target, a.index_type, row);
        if (!a.soft && t == a.ignore_index) continue;
        const double s = sample_weight ? double(sample_weight[row]) : 1.0;
        p.count += s;
        p.weight += weight && !a.soft ? s * double(weight[t]) : s;
      }
      parts[i] = p;
    }
  });
  for (int64_t i = 0; i < blocks; ++i)
    if (parts[i].bad >= 0) return {Status::bad_target, parts[i].bad, load_index(a.target, a.index_type, parts[i].bad)};
  constexpr int64_t stride = sizeof(Part) / sizeof(double);
  *d = {pairwise_sum(&parts[0].weight, blocks, stride), pairwise_sum(&parts[0].count, blocks, stride),
        int64_t(pairwise_sum(&parts[0].counted, blocks, stride))};
  return {};
}

// dL/dp_c = u (1 - e) w_c (lse - z_c), for a probability target.
template <bool kTransform, class S>
inline void target_gradient(const Call<accum_t<S>>& call, int64_t begin, int64_t end) {
  using T = accum_t<S>;
  const CrossEntropyArgs& a = call.a;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t o = row / a.inner, i = row % a.inner;
    const S* x = static_cast<const S*>(a.logits) + o * a.logits_strides.outer + i * a.logits_strides.inner;
    const int64_t out = o * a.grad_target_strides.outer + i * a.grad_target_strides.inner;
    const T sample = call.sample_weight ? call.sample_weight[row] : T(1);
    const T scale = call.grad_output(row) * sample * call.per_d() * (T(1) - call.k.smoothing),
            log_sum = log_scalar(call.others[row]);
    with_storage(a.prob_type, [&](auto* tag) {
      auto* grad = static_cast<decltype(tag)>(a.grad_target) + out;
      for (int64_t c0 = 0; c0 < a.classes; c0 += kLanes<T>) {
        const int64_t n = min_of(kLanes<T>, a.classes - c0);
        T raw[kLanes<T>] = {};
        for (int64_t l = 0; l < n; ++l) raw[l] = T(to_accum(x[(c0 + l) * a.logits_strides.cls]));
        vec<T> z = transform<kTransform, T>(call.k, load(raw));
        vec<T> g = scale * (log_sum - (z - call.ref[row]));
        for (int64_t l = 0; l < n; ++l) {
          T w = call.weight ? call.weight[c0 + l] : T(1);
          grad[(c0 + l) * a.grad_target_strides.cls] =
              from_accum<typename strip_pointer<decltype(tag)>::type, T>(w * g[l]);
        }
      }
    });
  }
}

template <Mode kMode, bool kTransform, class S>
inline void run_batches(const Call<accum_t<S>>& call, ParallelFor parallel_for, BlockSums* total) {
  using T = accum_t<S>;
  const CrossEntropyArgs& a = call.a;
  const bool by_rows = takes_row_path(a);
  const bool keep = by_rows && a.grad && !call.backward && a.classes * int64_t(sizeof(T)) <= kKeptBytes;
  const TileShape shape = by_rows ? TileShape{clamp_to(8192 / a.classes, 1, 64), 0, 0} : tile_shape<T>(a);
  const int64_t batches = (a.rows() + shape.rows - 1) / shape.rows;
  Scratch<BlockSums> parts(batches > 0 ? batches : 1);
  parallel(parallel_for, batches, grain_for(shape.rows * a.classes), [&](int64_t begin, int64_t end) {
    RowBatch<T> s(shape.rows);
    Tiles<T> tiles(shape, a.soft, call.streamed);
    KeptRows<T> exps(keep ? shape.rows : 0, a.classes);
    for (int64_t i = begin; i < end; ++i) {
      parts[i] = BlockSums{};
      const int64_t first = i * shape.rows, n = min_of(shape.rows, a.rows() - first);
      if (keep)
        row_path<kMode, kTransform, true, S>(call, s, exps, first, n, &parts[i]);
      else if (by_rows)
        row_path<kMode, kTransform, false, S>(call, s, exps, first, n, &parts[i]);
      else
        tile_path<kMode, kTransform, S>(call, s, tiles, first, n, &parts[i]);
    }
    if (call.streamed) stream_fence();
  });
  constexpr int64_t stride = sizeof(BlockSums) / sizeof(double);
  *total = {pairwise_sum(&parts[0].nll, batches, stride), pairwise_sum(&parts[0].z, batches, stride),
            pairwise_sum(&parts[0].correct, batches, stride)};
}

template <class S>
inline void run(const Call<accum_t<S>>& call, ParallelFor parallel_for, BlockSums* total) {
  const CrossEntropyArgs& a = call.a;
  const bool transform = a.softcap > 0 || a.logit_scale != 1;
  const Mode mode = a.soft                  ? Mode::soft
                    : a.label_smoothing > 0 ? (a.weight ? Mode::smooth_weighted : Mode::smooth)
                                            : Mode::index;
  auto with_transform = [&](auto t) {
    constexpr bool kTransform = decltype(t)::value;
    switch (mode) {
      case Mode::index: run_batches<Mode::index, kTransform, S>(call, parallel_for, total); break;
      case Mode::smooth: run_batches<Mode::smooth, kTransform, S>(call, parallel_for, total); break;
      case Mode::smooth_weighted: run_batches<Mode::smooth_weighted, kTransform, S>(call, parallel_for, total); break;
      case Mode::soft: run_batches<Mode::soft, kTransform, S>(call, parallel_for, total); break;
    }
  };
  transform ? with_transform(constant<true>{}) : with_transform(constant<false>{});
}

template <class S>
inline Status forward(const CrossEntropyArgs& a, ParallelFor parallel_for) {
  using T = accum_t<S>;
  Call<T> call(a, /*is_backward=*/false);
  Status status = denominators<T>(a, parallel_for, &call.d);
  if (status.code != Status::ok) return status;
  BlockSums total;
  run<S>(call, parallel_for, &total);
  if (a.saved) {
    T* d = static_cast<T*>(a.saved) + a.saved_count() - 2;
    d[0] = T(call.d.weight);
    d[1] = T(call.d.count);
  }
  const bool nothing = a.all_ignored_zero && call.d.counted == 0;
  if (a.loss && a.reduction != Reduction::none) {
    double loss = total.nll, z = total.z;
    if (a.reduction == Reduction::mean) {
      // Weights of 0 alone: nan as in torch, also where smoothing leaves a loss to divide.
      const bool zero = call.d.weight == 0 && a.label_smoothing > 0;
      loss = nothing ? 0 : zero ? kNan<double> : loss / call.d.weight;
      z = nothing ? 0 : z / call.d.count;
    }
    store_scalar(a.loss, a.loss_type, 0, a.z_loss != 0 ? loss + z : loss);
  }
  if (a.accuracy) *a.accuracy = nothing ? 0.f : float(total.correct / double(call.d.counted));
  return {};
}

template <class S>
inline Status backward(const CrossEntropyArgs& a, ParallelFor parallel_for) {
  using T = accum_t<S>;
  Call<T> call(a, /*is_backward=*/true);
  const T* d = static_cast<const T*>(a.saved) + a.saved_count() - 2;
  call.d.weight = double(d[0]);
  call.d.count = double(d[1]);
  BlockSums unused;
  if (a.grad) run<S>(call, parallel_for, &unused);
  if (a.grad_target) {
    parallel(parallel_for, a.rows(), grain_for(a.classes), [&](int64_t begin, int64_t end) {
      if (a.softcap > 0 || a.logit_scale != 1)
        target_gradient<true, S>(call, begin, end);
      else
        target_gradient<false, S>(call, begin, end);
    });
  }
  return {};
}

inline Status cross_entropy_forward(const CrossEntropyArgs& a, ParallelFor parallel_for) {
  return with_storage(a.logits_type,
                      [&](auto* tag) { return forward<typename strip_pointer<decltype(tag)>::type>(a, parallel_for); });
}
inline Status cross_entropy_backward(const CrossEntropyArgs& a, ParallelFor parallel_for) {
  return with_storage(
      a.logits_type, [&](auto* tag) { return backward<typename strip_pointer<decltype(tag)>::type>(a, parallel_for); });
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
