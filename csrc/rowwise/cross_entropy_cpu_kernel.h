// Cross entropy on the CPU, generic over dtype, target and instruction set. Included by cross_entropy_<isa>.cpp.
//
// Two ways through memory, chosen by layout (see choose_path):
//   row path   classes contiguous and many: vectors along the classes. Chunks of 4 KiB are read once (maximum, then
//              exp-sum from L1); the gradient reads the row again from L2. 1 read (+ 1 write).
//   tile path  anything else (few classes, class axis strided, channels first or last): a tile of rows is laid out as
//              [classes, rows] in L1/L2 and vectors run along the rows. 1 read (+ 1 write) while all classes of a tile
//              fit, else one more read for the gradient.
// Work is cut into blocks by shape alone; each block adds its rows in order and blocks are added pairwise, so the
// result does not depend on the number of threads.
#pragma once
#include "../common/cpu_support.h"
#include "cross_entropy.h"
#include "cross_entropy_math.h"

namespace fastloss {
namespace FASTLOSS_ISA {

enum class Mode { index, smooth, smooth_weighted, soft };  // what q_c is: nothing, 1, w_c, w_c p'_c

constexpr int64_t kChunk = 1024;          // classes per chunk of the row path
constexpr int64_t kRowPathClasses = 32;  // fewer go through tiles
constexpr int64_t kTileBytes = 32768;
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

  explicit Call(const CrossEntropyArgs& args, bool is_backward)
      : a(args),
        weight(static_cast<const T*>(args.weight)),
        sample_weight(static_cast<const T*>(args.sample_weight)),
        ref(static_cast<T*>(args.saved)),
        others(ref ? ref + args.rows() : nullptr),
        mass(ref && args.soft ? others + args.rows() : nullptr),
        backward(is_backward) {
    double weight_sum = double(args.classes);
    if (weight) {
      weight_sum = 0;
      for (int64_t c = 0; c < args.classes; ++c) weight_sum += double(weight[c]);
    }
    k = {T(args.label_smoothing), T(args.label_smoothing / double(args.classes)),
         T(weight_sum),           T(args.z_loss),
         T(args.logit_scale),     T(args.softcap),
         T(args.softcap > 0 ? 1 / args.softcap : 0)};
  }
  bool ignored(int64_t row) const {
    return !a.soft && load_index(a.target, a.index_type, row) == a.ignore_index;
  }
  // How much the nll and the lse^2 of a row weigh in what is differentiated.
  void row_scale(int64_t row, T* u, T* uz) const {
    double g = 1;
    if (backward) g = load_scalar(a.grad_output, a.loss_type, a.grad_output_per_row ? row : 0);
    if (sample_weight) g *= double(sample_weight[row]);
    bool mean = a.reduction == Reduction::mean;
    *u = T(mean ? g / d.weight : g);
    *uz = k.z_loss != T(0) ? T(mean ? g / d.count : g) : T(0);
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

// q of a probability target; 0 * (-inf) becomes 0 on request (by dropping the term where q is 0).
template <class T>
inline vec<T> soft_q(const RowConstants<T>& k, vec<T> p, vec<T> w) {
  return w * (p * (T(1) - k.smoothing) + k.smooth_share);
}
template <class T>
inline vec<T> product(vec<T> q, vec<T> d, bool zero_times_inf) {
  vec<T> r = q * d;
  return zero_times_inf ? (q == T(0) ? vec<T>{} : r) : r;
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
    for (int64_t c = 0; c < n; ++c) out[c] = T(to_accum(p[c]));
  });
}

// Statistics of the row x[classes] in one pass over chunks; *best is the chunk that holds the maximum.
template <Mode kMode, bool kTransform, class S, class T>
inline RowStats<T> row_stats(const Call<T>& call, const S* x, int64_t prob_offset, int64_t target, int64_t* best) {
  const int64_t classes = call.a.classes;
  const bool zero_inf = call.a.zero_times_inf;
  const RowConstants<T>& k = call.k;
  alignas(64) T prob[kMode == Mode::soft ? kChunk + kLanes<T> : 1];
  T max = -kInf<T>, ref = 0;
  vec<T> sum{}, dot{}, mass{};
  T done = 0;  // smooth: mass of the chunks before this one
  const int64_t target_vector = target >= 0 ? target / kLanes<T> * kLanes<T> : -1;  // chunks hold whole vectors
  for (int64_t c0 = 0; c0 < classes; c0 += kChunk) {
    const int64_t c1 = min_of(classes, c0 + kChunk);
    vec<T> m0 = splat(-kInf<T>), m1 = m0, m2 = m0, m3 = m0;
    int64_t c = c0;
    for (; c + 4 * kLanes<T> <= c1; c += 4 * kLanes<T>) {
      m0 = max_of(transform<kTransform, T>(k, load(x + c)), m0);
      m1 = max_of(transform<kTransform, T>(k, load(x + c + kLanes<T>)), m1);
      m2 = max_of(transform<kTransform, T>(k, load(x + c + 2 * kLanes<T>)), m2);
      m3 = max_of(transform<kTransform, T>(k, load(x + c + 3 * kLanes<T>)), m3);
    }
    m0 = max_of(max_of(m1, m0), max_of(m3, m2));
    for_vectors<T>(c, c1, [&](int64_t i, int64_t n) {
      vec<T> z = transform<kTransform, T>(k, load_n(x + i, n, T(to_accum(x[c0]))));
      m0 = max_of(z, m0);
    });
    const T chunk_max = max_lanes<T>(m0);
    if (chunk_max > max) {
      if (max > -kInf<T>) {
        sum *= exp_nonpositive_scalar(ref - chunk_max);
      }
      if constexpr (kMode == Mode::smooth) dot[0] += done * (ref - chunk_max);
      if constexpr (kMode == Mode::smooth_weighted || kMode == Mode::soft) {
        if (c0 > 0) dot += mass * (ref - chunk_max);
      }
      max = ref = chunk_max;
      *best = c0;
    }
    if constexpr (kMode == Mode::soft) load_probabilities(call.a, prob_offset + c0, c1 - c0, prob);
    auto add = [&](int64_t i, int64_t n, vec<T>& s) {
      __builtin_prefetch(x + i + kChunk);  // the next chunk arrives while this one is computed
      vec<T> z = transform<kTransform, T>(k, load_n(x + i, n, T(0)));
      vec<T> d = z - ref;
      vec<T> e = exp_nonpositive(d);
      if (n < kLanes<T>) {
        auto in_row = iota<T>() < T(n);
        e = in_row ? e : vec<T>{};
        d = in_row ? d : vec<T>{};
      }
      if (i == target_vector) e[target - i] = T(0);
      s += e;
      if constexpr (kMode == Mode::smooth) dot += d;
      if constexpr (kMode == Mode::smooth_weighted) {
        vec<T> q = load_n(call.weight + i, n, T(0));
        dot += product<T>(q, d, zero_inf);
        mass += q;
      }
      if constexpr (kMode == Mode::soft) {
        vec<T> w = call.weight ? load_n(call.weight + i, n, T(0)) : splat(T(1));
        vec<T> q = soft_q<T>(k, load_n(prob + (i - c0), n, T(0)), w);
        if (n < kLanes<T>) q = iota<T>() < T(n) ? q : vec<T>{};
        dot += product<T>(q, d, zero_inf);
        mass += q;
      }
    };
    vec<T> s0{}, s1{};
    for (c = c0; c + 2 * kLanes<T> <= c1; c += 2 * kLanes<T>) {
      add(c, kLanes<T>, s0);
      add(c + kLanes<T>, kLanes<T>, s1);
    }
    for_vectors<T>(c, c1, [&](int64_t i, int64_t n) { add(i, n, s0); });
    sum += s0 + s1;
    done += T(c1 - c0);
  }
  // A row of nothing but -inf has no softmax: nan, as in torch.
  const T total = sum_lanes<T>(sum);
  return {ref, max > -kInf<T> ? total : total + kNan<T>, sum_lanes<T>(dot), sum_lanes<T>(mass)};
}

// The gradient of one row, see RowGrad.
template <Mode kMode, bool kTransform, class S, class T>
inline void row_grad(const Call<T>& call, const S* x, int64_t prob_offset, T ref, T others, T sum_exp, RowGrad<T> g,
                     int64_t target, S* grad) {
  const int64_t classes = call.a.classes;
  const RowConstants<T>& k = call.k;
  const T inv_sum = T(1) / sum_exp, softmax_scale = (g.target_scale + g.rest_scale) * inv_sum;
  alignas(64) T prob[kMode == Mode::soft ? kChunk + kLanes<T> : 1];
  T target_grad = T(0);
  if (target >= 0) {  // before it is overwritten, should grad be the logits
    const T z = transform_scalar<kTransform, T>(k, T(to_accum(x[target])));
    target_grad = (exp_nonpositive_scalar(z - ref) * g.rest_scale - g.target_scale * others) * inv_sum;
    if constexpr (kMode == Mode::smooth) target_grad -= g.q_scale;
    if constexpr (kMode == Mode::smooth_weighted) target_grad -= g.q_scale * call.weight[target];
    if constexpr (kTransform) target_grad *= transform_slope(k, z);
  }
  for (int64_t c0 = 0; c0 < classes; c0 += kChunk) {
    const int64_t c1 = min_of(classes, c0 + kChunk);
    if constexpr (kMode == Mode::soft) load_probabilities(call.a, prob_offset + c0, c1 - c0, prob);
    for_vectors<T>(c0, c1, [&](int64_t i, int64_t n) {
      vec<T> z = transform<kTransform, T>(k, load_n(x + i, n, T(0)));
      vec<T> r = exp_nonpositive(z - ref) * softmax_scale;
      if constexpr (kMode == Mode::smooth) r -= g.q_scale;
      if constexpr (kMode == Mode::smooth_weighted) r -= g.q_scale * load_n(call.weight + i, n, T(0));
      if constexpr (kMode == Mode::soft) {
        vec<T> w = call.weight ? load_n(call.weight + i, n, T(0)) : splat(T(1));
        r -= g.q_scale * soft_q<T>(k, load_n(prob + (i - c0), n, T(0)), w);
      }
      if constexpr (kTransform) r *= transform_slope(k, z);
      store_n(grad + i, n, r);
    });
  }
  if (target >= 0) grad[target] = from_accum<S, T>(target_grad);
}

// First index whose transformed logit equals the row's maximum; the first nan if there is one (torch.argmax).
template <bool kTransform, class S, class T>
inline int64_t row_argmax(const RowConstants<T>& k, const S* x, int64_t stride, int64_t classes, T max, bool has_nan,
                          int64_t from) {
  if (has_nan)
    for (int64_t c = 0; c < classes; ++c) {
      T v = T(to_accum(x[c * stride]));
      if (v != v) return c;
    }
  for (int64_t c = from; c < classes; ++c)
    if (transform_scalar<kTransform, T>(k, T(to_accum(x[c * stride]))) == max) return c;
  return 0;
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

// ---------------------------------------------------------------------------------------- one row's bookkeeping

struct BlockSums {  // of one block of rows; doubles so that rows can be added in order without loss
  double nll = 0, z = 0, correct = 0;
};

// Takes the statistics of a row and does all that is O(1): loss, saved values, gradient coefficients.
template <Mode kMode, class T>
inline RowGrad<T> finish_row(const Call<T>& call, int64_t row, const RowStats<T>& st, T log_sum, int64_t target, T nll_t,
                             BlockSums* sums) {
  const CrossEntropyArgs& a = call.a;
  const RowConstants<T>& k = call.k;
  const T lse = st.ref + log_sum;
  const bool counts = kMode == Mode::soft || target >= 0;
  const T w_t = kMode == Mode::soft ? T(1) : counts && call.weight ? call.weight[target] : T(1);
  RowGrad<T> g{T(0), T(0), T(0)};
  if (counts && a.grad) {
    T u, uz;
    call.row_scale(row, &u, &uz);
    if constexpr (kMode == Mode::soft)
      g = soft_row_grad(k, lse, st.mass, u, uz);
    else
      g = index_row_grad(k, lse, w_t, u, uz);
  }
  if (call.backward) return g;
  double nll = 0, z = 0;
  if (counts) {
    const T s = call.sample_weight ? call.sample_weight[row] : T(1);
    T n;
    if constexpr (kMode == Mode::soft)
      n = soft_row_nll(log_sum, st.dot, st.mass);
    else
      n = index_row_nll(k, nll_t, log_sum, st.dot, w_t);
    nll = double(s * n);
    if (k.z_loss != T(0)) z = double(s * (k.z_loss * lse * lse));
  }
  sums->nll += nll;
  sums->z += z;
  if (a.loss && a.reduction == Reduction::none) store_scalar(a.loss, a.loss_type, row, nll + z);
  if (call.ref) {
    call.ref[row] = st.ref;
    call.others[row] = st.others;
    if (call.mass) call.mass[row] = st.mass;
  }
  if (a.lse) static_cast<T*>(a.lse)[row] = lse;
  return g;
}

template <class T>
inline void count_correct(const Call<T>& call, int64_t row, int64_t argmax, int64_t wanted, BlockSums* sums) {
  if (call.a.argmax) call.a.argmax[row] = argmax;
  sums->correct += argmax == wanted;
}

template <Mode kMode, bool kTransform, class S>
inline void row_path(const Call<accum_t<S>>& call, int64_t begin, int64_t end, BlockSums* sums) {
  using T = accum_t<S>;
  const CrossEntropyArgs& a = call.a;
  const bool stats_wanted = a.argmax || a.accuracy;
  const bool forward_only = !call.backward && !a.grad;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t o = row / a.inner, i = row % a.inner;
    const S* x = static_cast<const S*>(a.logits) + o * a.logits_strides.outer + i * a.logits_strides.inner;
    const int64_t prob_offset = o * a.target_strides.outer + i * a.target_strides.inner;
    int64_t target = -1;
    if constexpr (kMode != Mode::soft) {
      target = load_index(a.target, a.index_type, row);
      if (target == a.ignore_index) {
        target = -1;
        if (forward_only && !a.saved && !a.lse && !stats_wanted) {  // nothing depends on this row
          if (a.reduction == Reduction::none) store_scalar(a.loss, a.loss_type, row, 0);
          continue;
        }
      }
    }
    int64_t best = 0;
    RowStats<T> st;
    if (call.backward)
      st = {call.ref[row], call.others[row], T(0), call.mass ? call.mass[row] : T(0)};
    else
      st = row_stats<kMode, kTransform, S, T>(call, x, prob_offset, target, &best);
    T e_t = 0, d_t = 0;
    if (target >= 0) {
      d_t = transform_scalar<kTransform, T>(call.k, T(to_accum(x[target]))) - st.ref;
      e_t = exp_nonpositive_scalar(d_t);
    }
    const T sum = st.others + e_t, log_sum = log_scalar(sum);
    const T ratio = st.others < e_t && !call.backward ? log1p_scalar(st.others / e_t) : T(0);
    const T nll_t = target_nll(st.others, e_t, log_sum, d_t, ratio);
    RowGrad<T> g = finish_row<kMode, T>(call, row, st, log_sum, target, nll_t, sums);
    if (stats_wanted && !call.backward) {
      int64_t top = row_argmax<kTransform, S, T>(call.k, x, 1, a.classes, st.ref, sum != sum, best);
      count_correct(call, row, top, kMode == Mode::soft ? prob_argmax(a, prob_offset) : target, sums);
    }
    if (a.grad) {
      S* grad = static_cast<S*>(a.grad) + o * a.grad_strides.outer + i * a.grad_strides.inner;
      row_grad<kMode, kTransform, S, T>(call, x, prob_offset, st.ref, st.others, sum, g, target, grad);
    }
  }
}

// --------------------------------------------------------------------------------------------------- tile path

// Rows of a tile and where they lie: element (row b, class c) of a tensor is at offset[b] + c * stride.
struct TileRows {
  int64_t first = 0, count = 0;
  bool consecutive = false;  // offset[b] == offset[0] + b
};
inline TileRows tile_rows(int64_t first, int64_t count, int64_t inner, Strides s, int64_t* offset) {
  int64_t o = first / inner, i = first % inner;
  bool consecutive = true;
  for (int64_t b = 0; b < count; ++b) {
    offset[b] = o * s.outer + i * s.inner;
    consecutive &= offset[b] == offset[0] + b;
    if (++i == inner) i = 0, ++o;
  }
  return {first, count, consecutive};
}

// tile[c][b], row pitch `pitch`; lanes past the last row hold 0.
template <class S, class T>
inline void load_tile(const S* x, const TileRows& r, const int64_t* offset, int64_t stride, int64_t c0, int64_t classes,
                      T* tile, int64_t pitch) {
  const int64_t padded = round_up(r.count, kLanes<T>);
  if (r.consecutive) {
    for (int64_t c = 0; c < classes; ++c) {
      const S* p = x + offset[0] + (c0 + c) * stride;
      T* d = tile + c * pitch;
      if constexpr (sizeof(accum_t<S>) == sizeof(T)) {
        for_vectors<T>(0, r.count, [&](int64_t b, int64_t n) { store(d + b, load_n(p + b, n, T(0))); });
      } else {
        for (int64_t b = 0; b < padded; ++b) d[b] = b < r.count ? T(to_accum(p[b])) : T(0);
      }
    }
    return;
  }
  for (int64_t b = 0; b < r.count; ++b) {
    const S* p = x + offset[b] + c0 * stride;
    for (int64_t c = 0; c < classes; ++c) tile[c * pitch + b] = T(to_accum(p[c * stride]));
  }
  for (int64_t c = 0; c < classes; ++c)
    for (int64_t b = r.count; b < padded; ++b) tile[c * pitch + b] = T(0);
}
template <class S, class T>
inline void store_tile(S* x, const TileRows& r, const int64_t* offset, int64_t stride, int64_t c0, int64_t classes,
                       const T* tile, int64_t pitch) {
  if (r.consecutive) {
    for (int64_t c = 0; c < classes; ++c) {
      S* p = x + offset[0] + (c0 + c) * stride;
      const T* d = tile + c * pitch;
      if constexpr (sizeof(accum_t<S>) == sizeof(T)) {
        for_vectors<T>(0, r.count, [&](int64_t b, int64_t n) { store_n(p + b, n, load(d + b)); });
      } else {
        for (int64_t b = 0; b < r.count; ++b) p[b] = from_accum<S, T>(d[b]);
      }
    }
    return;
  }
  for (int64_t b = 0; b < r.count; ++b) {
    S* p = x + offset[b] + c0 * stride;
    for (int64_t c = 0; c < classes; ++c) p[c * stride] = from_accum<S, T>(tile[c * pitch + b]);
  }
}

// How the tile path cuts a problem: rows per tile and classes held at a time. Depends on the shape alone.
struct TileShape {
  int64_t rows, pitch, classes;
};
template <class T>
inline TileShape tile_shape(const CrossEntropyArgs& a) {
  constexpr int64_t lanes = kLanes<T>, element = int64_t(sizeof(T));
  const int64_t fit = kTileBytes / element / (a.classes > 0 ? a.classes : 1) / lanes * lanes;
  const int64_t rows = clamp_to(fit, 64, 512);
  const int64_t pitch = rows + lanes;  // rows are powers of two times lanes: keep columns out of one cache set
  return {rows, pitch, clamp_to(kTileBytesMax / element / pitch, 1, a.classes > 0 ? a.classes : 1)};
}

template <class T>
struct TileState {  // one value per row of the tile
  explicit TileState(int64_t n)
      : max(n), ref(n), others(n), dot(n), mass(n), sum(n), log_sum(n), picked(n), nll(n), a(n), q(n), t(n), lane_target(n),
        target(n), offset(n) {}
  Scratch<T> max, ref, others, dot, mass;  // see RowStats
  Scratch<T> sum, log_sum, picked, nll;    // others + e_t, its logarithm, z_t, -log p_t
  Scratch<T> a, q, t;                      // gradient: softmax scale / sum, q_scale, the target's own
  Scratch<typename bits_of<T>::type> lane_target;
  Scratch<int64_t> target, offset;
};

template <Mode kMode, class T>
inline void tile_statistics(const Call<T>& call, TileState<T>& s, int64_t lanes, const T* tile, const T* prob,
                            int64_t pitch, int64_t c0, int64_t classes) {
  const RowConstants<T>& k = call.k;
  const bool zero_inf = call.a.zero_times_inf;
  for (int64_t v = 0; v < lanes; v += kLanes<T>) {
    const vec<T> old_max = load(&s.max[v]), old_ref = load(&s.ref[v]);
    vec<T> max = old_max;
    for (int64_t c = 0; c < classes; ++c) max = max_of(load(tile + c * pitch + v), max);
    const vec<T> ref = max > -kInf<T> ? max : vec<T>{};
    vec<T> others = load(&s.others[v]), dot = load(&s.dot[v]), mass = load(&s.mass[v]);
    ivec<T> target;
    __builtin_memcpy(&target, &s.lane_target[v], sizeof target);
    target -= typename bits_of<T>::type(c0);
    if (c0 > 0) {
      vec<T> shift = old_ref - ref;
      others = old_max > -kInf<T> ? others * exp_nonpositive(shift) : others;
      if constexpr (kMode != Mode::index) dot += mass * shift;
    }
    for (int64_t c = 0; c < classes; ++c) {
      vec<T> d = load(tile + c * pitch + v) - ref;
      vec<T> e = exp_nonpositive(d);
      if constexpr (kMode != Mode::soft) e = target == typename bits_of<T>::type(c) ? vec<T>{} : e;
      others += e;
      if constexpr (kMode == Mode::smooth) {
        dot += d;
        mass += T(1);
      }
      if constexpr (kMode == Mode::smooth_weighted) {
        vec<T> q = splat(call.weight[c0 + c]);
        dot += product<T>(q, d, zero_inf);
        mass += q;
      }
      if constexpr (kMode == Mode::soft) {
        vec<T> q =
            soft_q<T>(k, load(prob + c * pitch + v), splat(call.weight ? call.weight[c0 + c] : T(1)));
        dot += product<T>(q, d, zero_inf);
        mass += q;
      }
    }
    store(&s.max[v], max);
    store(&s.ref[v], ref);
    store(&s.others[v], others);
    store(&s.dot[v], dot);
    store(&s.mass[v], mass);
  }
}

// Turns z[c][b] into the gradient, in place.
template <Mode kMode, bool kTransform, class T>
inline void tile_gradient(const Call<T>& call, TileState<T>& s, int64_t lanes, T* tile, const T* prob, int64_t pitch,
                          int64_t c0, int64_t classes) {
  const RowConstants<T>& k = call.k;
  for (int64_t v = 0; v < lanes; v += kLanes<T>) {
    const vec<T> ref = load(&s.ref[v]), softmax_scale = load(&s.a[v]), q_scale = load(&s.q[v]);
    for (int64_t c = 0; c < classes; ++c) {
      vec<T> z = load(tile + c * pitch + v);
      vec<T> g = exp_nonpositive(z - ref) * softmax_scale;
      if constexpr (kMode == Mode::smooth) g -= q_scale;
      if constexpr (kMode == Mode::smooth_weighted) g -= q_scale * call.weight[c0 + c];
      if constexpr (kMode == Mode::soft)
        g -= q_scale * soft_q<T>(k, load(prob + c * pitch + v), splat(call.weight ? call.weight[c0 + c] : T(1)));
      if constexpr (kTransform) g *= transform_slope(k, z);
      store(tile + c * pitch + v, g);
    }
  }
}

template <Mode kMode, bool kTransform, class S>
inline void tile_path(const Call<accum_t<S>>& call, const TileShape& shape, int64_t begin, int64_t end, BlockSums* sums) {
  using T = accum_t<S>;
  const CrossEntropyArgs& a = call.a;
  const RowConstants<T>& k = call.k;
  const bool stats_wanted = !call.backward && (a.argmax || a.accuracy);
  const bool one_chunk = shape.classes >= a.classes;
  Scratch<T> tile(shape.classes * shape.pitch), prob(kMode == Mode::soft ? shape.classes * shape.pitch : 1);
  Scratch<int64_t> prob_offset(kMode == Mode::soft ? shape.rows : 1), grad_offset(a.grad ? shape.rows : 1);
  TileState<T> s(shape.rows);
  const S* x = static_cast<const S*>(a.logits);

  for (int64_t first = begin; first < end; first += shape.rows, ++sums) {
    const int64_t n = min_of(shape.rows, end - first), lanes = round_up(n, kLanes<T>);
    const TileRows rows = tile_rows(first, n, a.inner, a.logits_strides, s.offset.get());
    TileRows prob_rows, grad_rows;
    if constexpr (kMode == Mode::soft)
      prob_rows = tile_rows(first, n, a.inner, a.target_strides, prob_offset.get());
    if (a.grad) grad_rows = tile_rows(first, n, a.inner, a.grad_strides, grad_offset.get());

    auto load_chunk = [&](int64_t c0, int64_t classes) {
      load_tile(x, rows, s.offset.get(), a.logits_strides.cls, c0, classes, tile.get(), shape.pitch);
      if constexpr (kTransform)
        for (int64_t c = 0; c < classes; ++c)
          for (int64_t v = 0; v < lanes; v += kLanes<T>) {
            T* p = tile.get() + c * shape.pitch + v;
            store(p, transform<kTransform, T>(k, load(p)));
          }
      if constexpr (kMode == Mode::soft)
        with_storage(a.prob_type, [&](auto* tag) {
          load_tile(static_cast<const decltype(tag)>(const_cast<void*>(a.target)), prob_rows, prob_offset.get(),
                    a.target_strides.cls, c0, classes, prob.get(), shape.pitch);
        });
    };

    for (int64_t b = 0; b < n; ++b) {
      s.picked[b] = T(0);
      if constexpr (kMode != Mode::soft) {
        int64_t t = load_index(a.target, a.index_type, first + b);
        s.target[b] = t == a.ignore_index ? -1 : t;
      } else {
        s.target[b] = -1;
      }
    }
    for (int64_t b = 0; b < lanes; ++b)
      s.lane_target[b] = b < n ? typename bits_of<T>::type(s.target[b]) : -1;
    if (call.backward) {
      if (one_chunk) load_chunk(0, a.classes);
      for (int64_t b = 0; b < lanes; ++b) {
        const int64_t row = first + (b < n ? b : 0);
        s.ref[b] = call.ref[row];
        s.others[b] = call.others[row];
        s.mass[b] = call.mass ? call.mass[row] : T(0);
        s.dot[b] = T(0);
      }
      if constexpr (kMode != Mode::soft)
        for (int64_t b = 0; b < n; ++b)
          if (s.target[b] >= 0)
            s.picked[b] = transform_scalar<kTransform, T>(
                k, T(to_accum(x[s.offset[b] + s.target[b] * a.logits_strides.cls])));
    } else {
      for (int64_t b = 0; b < lanes; ++b) {
        s.max[b] = -kInf<T>;
        s.ref[b] = s.others[b] = s.dot[b] = s.mass[b] = T(0);
      }
      for (int64_t c0 = 0; c0 < a.classes; c0 += shape.classes) {
        const int64_t classes = min_of(shape.classes, a.classes - c0);
        load_chunk(c0, classes);
        tile_statistics<kMode, T>(call, s, lanes, tile.get(), prob.get(), shape.pitch, c0, classes);
        if constexpr (kMode != Mode::soft)
          for (int64_t b = 0; b < n; ++b) {
            const int64_t c = s.target[b] - c0;
            if (c >= 0 && c < classes) s.picked[b] = tile[c * shape.pitch + b];
          }
      }
      for (int64_t b = 0; b < n; ++b)
        if (!(s.max[b] > -kInf<T>)) s.others[b] += kNan<T>;  // nothing but -inf (or nan): no softmax
    }
    for (int64_t v = 0; v < lanes; v += kLanes<T>) {
      ivec<T> target;
      __builtin_memcpy(&target, &s.lane_target[v], sizeof target);
      const vec<T> others = load(&s.others[v]), d = load(&s.picked[v]) - load(&s.ref[v]);
      const vec<T> e = target >= 0 ? exp_nonpositive(d) : vec<T>{}, sum = others + e, log_sum = log_of(sum);
      store(&s.sum[v], sum);
      store(&s.log_sum[v], log_sum);
      if (!call.backward) store(&s.nll[v], target_nll(others, e, log_sum, d, log1p_of(others / e)));
    }
    for (int64_t b = 0; b < n; ++b) {
      const RowStats<T> st{s.ref[b], s.others[b], s.dot[b], s.mass[b]};
      RowGrad<T> g = finish_row<kMode, T>(call, first + b, st, s.log_sum[b], s.target[b], s.nll[b], sums);
      if (stats_wanted) {
        int64_t top = row_argmax<kTransform, S, T>(k, x + s.offset[b], a.logits_strides.cls, a.classes, s.max[b],
                                                   s.sum[b] != s.sum[b], 0);
        count_correct(call, first + b, top, kMode == Mode::soft ? prob_argmax(a, prob_offset[b]) : s.target[b], sums);
      }
      if (a.grad) {
        s.a[b] = (g.target_scale + g.rest_scale) / s.sum[b];
        s.q[b] = g.q_scale;
        if (s.target[b] >= 0) {
          T r = ((s.sum[b] - s.others[b]) * g.rest_scale - g.target_scale * s.others[b]) / s.sum[b];
          if constexpr (kMode == Mode::smooth) r -= g.q_scale;
          if constexpr (kMode == Mode::smooth_weighted) r -= g.q_scale * call.weight[s.target[b]];
          if constexpr (kTransform) r *= transform_slope(k, s.picked[b]);
          s.t[b] = r;
        }
      }
    }
    if (!a.grad) continue;
    for (int64_t c0 = 0; c0 < a.classes; c0 += shape.classes) {
      const int64_t classes = min_of(shape.classes, a.classes - c0);
      if (!one_chunk) load_chunk(c0, classes);
      tile_gradient<kMode, kTransform, T>(call, s, lanes, tile.get(), prob.get(), shape.pitch, c0, classes);
      if constexpr (kMode != Mode::soft)
        for (int64_t b = 0; b < n; ++b) {
          const int64_t c = s.target[b] - c0;
          if (s.target[b] >= 0 && c >= 0 && c < classes) tile[c * shape.pitch + b] = s.t[b];
        }
      store_tile(static_cast<S*>(a.grad), grad_rows, grad_offset.get(), a.grad_strides.cls, c0, classes, tile.get(),
                 shape.pitch);
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
      const int64_t last = min_of(rows, (i + 1) * kBlock);
      Part p{0, 0, 0, -1};
      int64_t counted = 0;
      for (int64_t row = i * kBlock; row < last; ++row) {
        int64_t t = a.soft ? 0 : load_index(a.target, a.index_type, row);
        const bool counts = a.soft || t != a.ignore_index;
        const bool bad = !a.soft && counts && uint64_t(t) >= uint64_t(a.classes);
        if (bad && p.bad < 0) p.bad = row;
        counted += counts;
        if (counts && !bad && (weight || sample_weight)) {
          double s = sample_weight ? double(sample_weight[row]) : 1.0;
          p.count += s;
          p.weight += weight && !a.soft ? s * double(weight[t]) : s;
        }
      }
      p.counted = double(counted);
      if (!weight && !sample_weight) p.count = p.weight = p.counted;
      parts[i] = p;
    }
  });
  for (int64_t i = 0; i < blocks; ++i)
    if (parts[i].bad >= 0)
      return {Status::bad_target, parts[i].bad, load_index(a.target, a.index_type, parts[i].bad)};
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
    T u, uz;
    call.row_scale(row, &u, &uz);
    const T scale = u * (T(1) - call.k.smoothing), log_sum = log_scalar(call.others[row]);
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
inline void run_blocks(const Call<accum_t<S>>& call, ParallelFor parallel_for, BlockSums* total) {
  using T = accum_t<S>;
  const CrossEntropyArgs& a = call.a;
  const bool contiguous = a.logits_strides.cls == 1 && (!a.grad || a.grad_strides.cls == 1) &&
                          (!a.soft || a.target_strides.cls == 1);
  const bool by_rows = contiguous && a.classes >= kRowPathClasses;
  const TileShape shape = tile_shape<T>(a);
  const int64_t block = by_rows ? clamp_to(8192 / a.classes, 1, 64) : shape.rows;
  const int64_t blocks = (a.rows() + block - 1) / block;
  Scratch<BlockSums> parts(blocks > 0 ? blocks : 1);
  parallel(parallel_for, blocks, grain_for(block * a.classes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) parts[i] = BlockSums{};
    if (by_rows) {
      for (int64_t i = begin; i < end; ++i)
        row_path<kMode, kTransform, S>(call, i * block, min_of(a.rows(), (i + 1) * block), &parts[i]);
    } else {
      tile_path<kMode, kTransform, S>(call, shape, begin * block, min_of(a.rows(), end * block), &parts[begin]);
    }
  });
  constexpr int64_t stride = sizeof(BlockSums) / sizeof(double);
  *total = {pairwise_sum(&parts[0].nll, blocks, stride), pairwise_sum(&parts[0].z, blocks, stride),
            pairwise_sum(&parts[0].correct, blocks, stride)};
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
      case Mode::index: run_blocks<Mode::index, kTransform, S>(call, parallel_for, total); break;
      case Mode::smooth: run_blocks<Mode::smooth, kTransform, S>(call, parallel_for, total); break;
      case Mode::smooth_weighted: run_blocks<Mode::smooth_weighted, kTransform, S>(call, parallel_for, total); break;
      case Mode::soft: run_blocks<Mode::soft, kTransform, S>(call, parallel_for, total); break;
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
      loss = nothing ? 0 : loss / call.d.weight;
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
  return with_storage(a.logits_type, [&](auto* tag) {
    return forward<typename strip_pointer<decltype(tag)>::type>(a, parallel_for);
  });
}
inline Status cross_entropy_backward(const CrossEntropyArgs& a, ParallelFor parallel_for) {
  return with_storage(a.logits_type, [&](auto* tag) {
    return backward<typename strip_pointer<decltype(tag)>::type>(a, parallel_for);
  });
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
