// Cross entropy on the CPU, row path: classes contiguous and not few, vectors along the classes. Every element is read
// once from memory, in chunks: 1 read (+ 1 write).
#pragma once
#include "cross_entropy_cpu_batch.h"

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int64_t kChunk = 1024;        // classes per chunk
constexpr int64_t kKeptBytes = 262144;  // exponentials of a row that are kept for its gradient

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
// With a margin z_target stands in the place of what is read of the target.
//
// Exponentials are taken relative to a running reference: the maximum of the first chunk, which is read twice (the
// second time from L1), until a chunk exceeds it by more than kHeadroom and is done again relative to its own maximum.
// At the end all is brought to the maximum of the row.
template <Mode kMode, bool kTransform, bool kKeep, class S, class T>
inline RowStats<T> row_stats(const CallConstants<T>& call, const S* x, int64_t prob_offset, int64_t target, T z_target,
                             int64_t* best, const KeptRow<T>& kept) {
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
  const bool margin = kTransform && call.margin.any;
  for (int64_t c0 = 0; c0 < classes; c0 += kChunk) {
    const int64_t c1 = min_of(classes, c0 + kChunk);
    const T fill = margin ? -kInf<T> : T(to_accum(x[c0]));
    auto logits_at = [&](int64_t i, int64_t n) {
      const vec<T> z = transform<kTransform, T>(k, load_n(x + i, n, fill));
      if constexpr (kTransform)
        if (margin && i == target_vector) return iota<T>() == T(target - i) ? splat(z_target) : z;
      return z;
    };
    if constexpr (kMode == Mode::soft) load_probabilities(call.a, prob_offset + c0, c1 - c0, prob);
    if (!(max > -kInf<T>)) {  // no reference yet
      vec<T> m0 = splat(-kInf<T>), m1 = m0, m2 = m0, m3 = m0;
      int64_t c = c0;
      for (; c + 4 * kLanes<T> <= c1; c += 4 * kLanes<T>) {
        m0 = max_of(logits_at(c, kLanes<T>), m0);
        m1 = max_of(logits_at(c + kLanes<T>, kLanes<T>), m1);
        m2 = max_of(logits_at(c + 2 * kLanes<T>, kLanes<T>), m2);
        m3 = max_of(logits_at(c + 3 * kLanes<T>, kLanes<T>), m3);
      }
      for_vectors<T>(c, c1, [&](int64_t i, int64_t n) { m0 = max_of(logits_at(i, n), m0); });
      const T first = max_lanes<T>(max_of(max_of(m1, m0), max_of(m3, m2)));
      if (first > -kInf<T>) rebase(first);
    }
    vec<T> s0, s1, max0, max1, chunk_dot, chunk_mass;
    auto add = [&](int64_t i, int64_t n, vec<T>& s, vec<T>& m) {
      const vec<T> z = logits_at(i, n);
      m = max_of(z, m);
      vec<T> d = z - ref;
      vec<T> e = exp_of(d);
      if constexpr (kKeep) store(kept.exps + i, e);
      if (n < kLanes<T>) {
        auto in_row = iota<T>() < T(n);
        e = in_row ? e : vec<T>{};
        d = in_row ? d : vec<T>{};
      }
      if (i == target_vector) e = iota<T>() == T(target - i) ? vec<T>{} : e;
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
        read_ahead(x + c);
        add(c, kLanes<T>, s0, max0);
        if constexpr (2 * kLanes<T> * sizeof(S) > size_t(kLineBytes)) read_ahead(x + c + kLanes<T>);
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
  if (call.a.stats) return {max, total, sum_lanes<T>(dot), sum_lanes<T>(mass)};
  return {ref, max > -kInf<T> ? total : total + kNan<T>, sum_lanes<T>(dot), sum_lanes<T>(mass)};
}

// sum of e^(z_c - ref) (z_c - ref) over the classes but the target; a second walk, for entropies alone.
template <bool kTransform, class S, class T>
inline T row_exp_dot(const CallConstants<T>& call, const S* x, T ref, int64_t target) {
  vec<T> sum{};
  for (int64_t c0 = 0; c0 < call.a.classes; c0 += kChunk) {
    vec<T> part{};
    for_vectors<T>(c0, min_of(call.a.classes, c0 + kChunk), [&](int64_t i, int64_t n) {
      const vec<T> d = transform<kTransform, T>(call.k, load_n(x + i, n, T(0))) - ref;
      const vec<T> e = exp_of(d), at = iota<T>();
      part += e == T(0) || at >= T(n) || at == T(target - i) ? vec<T>{} : e * d;
    });
    sum += part;
  }
  return sum_lanes<T>(sum);
}

// The gradient of one row from its coefficients and, if kKept, the exponentials that its statistics left;
// `target_grad` is the target's own, already complete (see finish_batch).
template <Mode kMode, bool kTransform, bool kKept, class S, class T>
inline void row_grad(const CallConstants<T>& call, const S* x, int64_t prob_offset, T ref, T softmax_scale, T q_scale,
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
      if constexpr (!kKept) read_ahead(x + i);
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

// The exponentials of a batch of rows, if they are kept.
template <class T>
class KeptRows {
  const int64_t rows_, chunks_, pitch_;
  Scratch<T> memory_;

 public:
  KeptRows(int64_t rows, int64_t classes)
      : rows_(rows),
        chunks_((classes + kChunk - 1) / kChunk),
        pitch_(round_up(classes, kLanes<T>)),
        memory_(rows * (pitch_ + chunks_)) {}
  KeptRow<T> row(int64_t b) { return {memory_.get() + b * pitch_, memory_.get() + rows_ * pitch_ + b * chunks_}; }
};

template <Mode kMode, bool kTransform, bool kKeep, class S>
inline void row_path(const CallConstants<accum_t<S>>& call, RowBatch<accum_t<S>>& s, KeptRows<accum_t<S>>& exps,
                     int64_t first, int64_t n, LossSums* sums) {
  using T = accum_t<S>;
  const CrossEntropyArgs& a = call.a;
  const S* logits = static_cast<const S*>(a.logits);
  s.logits = {first, n, a.inner, a.logits_strides};
  if constexpr (kMode == Mode::soft) s.prob = {first, n, a.inner, a.target_strides};
  s.set_targets(a, first, n);
  if (call.backward) s.restore(call, first, n);
  const bool ignored_matter = call.backward || a.grad || a.saved || a.lse || a.argmax || a.accuracy || a.stats;
  for (int64_t b = 0; b < n; ++b) {
    const S* x = logits + s.logits[b];
    s.picked[b] = s.target[b] >= 0 ? target_logit<kTransform, T>(call, T(to_accum(x[s.target[b]]))) : T(0);
    if (call.backward) continue;
    if (kMode != Mode::soft && s.target[b] < 0 && !ignored_matter) {  // nothing depends on this row
      s.ref[b] = s.others[b] = s.dot[b] = T(0);
      continue;
    }
    RowStats<T> st = row_stats<kMode, kTransform, kKeep, S, T>(call, x, s.prob[b], s.target[b], s.picked[b], &s.best[b],
                                                               exps.row(b));
    s.max[b] = s.ref[b] = st.ref;
    s.others[b] = st.others;
    s.dot[b] = st.dot;
    s.mass[b] = st.mass;
    if (a.entropy || a.stats_best)
      s.exp_dot[b] = row_exp_dot<kTransform, S, T>(call, x, st.ref > -kInf<T> ? st.ref : T(0), s.target[b]);
  }
  for (int64_t b = 0; call.backward && call.saved_target && b < n; ++b) s.picked[b] = call.saved_target[first + b];
  finish_batch<kMode, kTransform, S, T>(call, s, first, n, sums);
  if (!a.grad) return;
  s.grad = {first, n, a.inner, a.grad_strides};
  for (int64_t b = 0; b < n; ++b)
    row_grad<kMode, kTransform, kKeep, S, T>(call, logits + s.logits[b], s.prob[b], s.ref[b], s.softmax_scale[b],
                                             s.q_scale[b], s.target[b], s.target_grad[b], exps.row(b),
                                             static_cast<S*>(a.grad) + s.grad[b]);
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
