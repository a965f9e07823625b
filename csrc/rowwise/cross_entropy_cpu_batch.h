// Cross entropy on the CPU: what both ways through memory share. A call, a batch of rows, and all that is O(1) per row
// (finish_batch): losses, saved values, gradient coefficients, for a batch at a time, in vectors.
#pragma once
#include "../common/cpu_support.h"
#include "cross_entropy_cpu_policy.h"
#include "cross_entropy_math.h"
#include "row_maps.h"

namespace fastloss {
namespace FASTLOSS_ISA {

enum class Mode { index, smooth, smooth_weighted, soft };  // what q_c is: nothing, 1, w_c, w_c p'_c

constexpr int64_t kStreamRowBytes = 2048;  // shorter rows are mostly parts of lines: not streamed

struct Denominators {
  double weight = 0;  // D
  double count = 0;   // Dn
  int64_t counted = 0;
};

// What all rows of a call share, in the accumulation type.
template <class T>
struct CallConstants {
  const CrossEntropyArgs& a;
  RowConstants<T> k;
  Margin<T> margin;
  Denominators d;
  const T* weight;         // [classes] or null; of a shard: from its first class on
  T local_weight_sum;      // sum of weight[classes]; of a shard
  const T* sample_weight;  // [rows] or null
  T *ref, *others;         // fields of saved, or null
  T *saved_target, *mass, *slope, *level;
  bool backward;
  bool mapped;    // there is a row map
  bool streamed;  // the gradient is stored past the caches

  explicit CallConstants(const CrossEntropyArgs& args, bool is_backward)
      : a(args),
        margin(Margin<T>::of(args.margin_angle, args.margin_cosine)),
        weight(args.weight ? static_cast<const T*>(args.weight) + args.class_offset : nullptr),
        local_weight_sum(T(args.classes)),
        sample_weight(static_cast<const T*>(args.sample_weight)),
        backward(is_backward),
        mapped(args.row_map != 0),
        streamed(args.grad && args.grad != args.logits &&
                 args.rows() * args.classes * size_of(args.logits_type) >= kStreamBytes &&
                 (!takes_row_path(args) || args.classes * size_of(args.logits_type) >= kStreamRowBytes)) {
    const SavedFields fields = args.saved_fields();
    auto field = [&args](int i) {
      return args.saved && i >= 0 ? static_cast<T*>(args.saved) + i * args.rows() : nullptr;
    };
    ref = field(0);
    others = field(1);
    saved_target = field(fields.target);
    mass = field(fields.mass);
    slope = field(fields.slope);
    level = field(fields.level);
    double weight_sum = double(args.all_classes());
    if (weight) {
      const T* all = static_cast<const T*>(args.weight);
      weight_sum = 0;
      for (int64_t c = 0; c < args.all_classes(); ++c) weight_sum += double(all[c]);
      double local = 0;
      for (int64_t c = 0; args.is_shard() && c < args.classes; ++c) local += double(weight[c]);
      local_weight_sum = T(local);
    }
    k = {T(args.label_smoothing),
         T(args.label_smoothing / double(args.all_classes())),
         T(weight_sum),
         T(args.z_loss),
         T(args.logit_scale),
         T(args.softcap),
         T(args.softcap > 0 ? 1 / args.softcap : 0)};
  }
  // 1 / D and 1 / Dn for mean, else 1.
  T per_d() const {
    if (a.reduction != Reduction::mean) return T(1);
    // With smoothing a row whose D is 0 has infinite coefficients of both signs.
    return d.weight == 0 && a.label_smoothing > 0 ? kNan<T> : T(1) / T(d.weight);
  }
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
// z of the target from its logit.
template <bool kTransform, class T>
inline T target_logit(const CallConstants<T>& call, T x) {
  if constexpr (kTransform)
    if (call.margin.any) x = with_margin(call.margin, x);
  return transform_scalar<kTransform, T>(call.k, x);
}
// dz/dx from z.
template <class V, class T>
inline V transform_slope(const RowConstants<T>& k, V z) {
  const V u = k.softcap > T(0) ? z * k.inv_softcap : V{};  // without a cap z may be infinite
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

// One value per row of a batch, in arrays padded to whole vectors.
template <class T>
class RowBatch {
  using lane_int = typename bits_of<T>::type;
  // The largest number, which is no class: the target of a row is one of another shard.
  static constexpr lane_int kElsewhere = lane_int(~uint64_t(0) >> (65 - 8 * sizeof(lane_int)));
  static constexpr int64_t kValues = 14, kIndices = 2;
  const int64_t pitch_;
  Scratch<unsigned char> memory_;  // all arrays: an allocation costs as much as some rows

 public:
  explicit RowBatch(int64_t rows)
      : pitch_(round_up(rows, kLanes<T>)),
        memory_(pitch_ * int64_t(kIndices * sizeof(int64_t) + kValues * sizeof(T) + sizeof(lane_int))) {}
  int64_t* index(int i) { return reinterpret_cast<int64_t*>(memory_.get()) + i * pitch_; }
  T* value(int i) { return reinterpret_cast<T*>(index(kIndices)) + i * pitch_; }

  T *const max = value(0), *const ref = value(1), *const others = value(2);  // statistics: see RowStats
  T *const dot = value(3), *const mass = value(4);
  T *const picked = value(5), *const target_exp = value(9);      // z_t, e^(z_t - ref)
  T* const weight = value(12);                                   // w_t; only with class weights
  T *const softmax_scale = value(6), *const q_scale = value(7);  // gradient: per e^(z - ref), per q
  T* const target_grad = value(8);                               // the target's own, complete
  T *const nll = value(10), *const slope = value(13);            // -log p_t; of a row map, value and slope
  T* const exp_dot = value(11);                                  // see Stat; only where entropy is wanted
  int64_t* const target = index(0);                              // class index, -1: ignored, none or elsewhere
  int64_t* const best = index(1);                                // where to look for the maximum
  Rows logits, prob, grad;
  lane_int* const lane_target =
      reinterpret_cast<lane_int*>(value(kValues));  // the same, but kElsewhere where a shard's target is elsewhere

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
    for (int64_t b = 0; a.is_shard() && b < n; ++b) {
      if (uint64_t(to[b]) >= uint64_t(a.total_classes)) {
        lanes[b] = lane_int(to[b] = -1);
      } else {
        const int64_t local = to[b] - a.class_offset;
        const bool here = uint64_t(local) < uint64_t(a.classes);
        to[b] = here ? local : -1;
        lanes[b] = here ? lane_int(local) : kElsewhere;
      }
    }
    for (int64_t b = n; b < pitch_; ++b)  // lanes that are computed and not used
      ref[b] = others[b] = dot[b] = mass[b] = picked[b] = exp_dot[b] = T(0);
  }
  void set_weights(const CallConstants<T>& call, int64_t first, int64_t n) {
    for (int64_t b = 0; b < pitch_; ++b) weight[b] = T(1);  // of rows without a target
    for (int64_t b = 0; b < n; ++b)
      if (lane_target[b] == kElsewhere)
        weight[b] = call.weight[load_index(call.a.target, call.a.index_type, first + b) - call.a.class_offset];
      else if (lane_target[b] >= 0)
        weight[b] = call.weight[lane_target[b]];
  }
  // Where the logit of a target is.
  int64_t target_at(const CrossEntropyArgs& a, int64_t b) const { return logits[b] + target[b] * a.logits_strides.cls; }
  bool target_is_here(int64_t b) const { return lane_target[b] >= 0 && lane_target[b] != kElsewhere; }
  void clear_statistics(int64_t lanes) {
    for (int64_t v = 0; v < lanes; v += kLanes<T>) {
      store(max + v, splat(-kInf<T>));
      T* const zeroed[] = {ref, others, dot, mass};
      for (T* p : zeroed) store(p + v, vec<T>{});
    }
  }
  void restore(const CallConstants<T>& call, int64_t first, int64_t n) {
    // Out of range here only if somebody wrote to the targets after forward had looked: then without gradient.
    for (int64_t b = 0; b < pitch_ && !call.a.is_shard(); ++b)
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

// The statistics of a batch of rows of a shard.
template <Mode kMode, bool kTransform, class S, class T>
inline void store_stats(const CallConstants<T>& call, const RowBatch<T>& s, int64_t first, int64_t n) {
  const CrossEntropyArgs& a = call.a;
  auto field = [&](Stat which) { return static_cast<T*>(a.stats) + a.stat_place(which) * a.rows() + first; };
  for (int64_t b = 0; b < n; ++b) {
    field(Stat::ref)[b] = s.max[b];
    field(Stat::others)[b] = s.others[b];
    field(Stat::target)[b] = s.target_is_here(b) ? s.picked[b] : -kInf<T>;
    if constexpr (kMode != Mode::index) {
      field(Stat::dot)[b] = s.dot[b];
      field(Stat::mass)[b] = kMode == Mode::soft ? s.mass[b] : call.local_weight_sum;
    }
    if (!a.stats_best) continue;
    const S* x = static_cast<const S*>(a.logits) + s.logits[b];
    const int64_t top = row_argmax<kTransform, S, T>(call.k, x, a.logits_strides.cls, a.classes, s.max[b],
                                                     s.others[b] != s.others[b], s.best[b]);
    field(Stat::best)[b] =
        a.classes > 0 ? transform_scalar<kTransform, T>(call.k, T(to_accum(x[top * a.logits_strides.cls]))) : -kInf<T>;
    field(Stat::best_at)[b] = T(a.class_offset + top);
    field(Stat::exp_dot)[b] = s.exp_dot[b];
  }
}

// What is O(1) per row goes in loops over the batch, a few vectors each: one long chain of operations per vector would
// leave the processor waiting. Those that all kinds of calls share are flattened: their functions are inlined, which
// the compiler does not do in a kernel of this size.

template <class T>
inline ivec<T> lane_targets(const RowBatch<T>& s, int64_t v) {
  ivec<T> target;
  __builtin_memcpy(&target, s.lane_target + v, sizeof target);
  return target;
}
// Whether a row has a part in the loss.
template <Mode kMode, class T>
inline auto counted(ivec<T> target, int64_t lanes) {
  return kMode == Mode::soft ? iota<T>() < T(lanes) : target >= 0;
}
// w_t of a batch whose weights are set.
template <Mode kMode, class T>
inline vec<T> target_weights(const CallConstants<T>& call, const RowBatch<T>& s, int64_t v) {
  return kMode != Mode::soft && call.weight ? load(s.weight + v) : splat(T(1));
}
template <class T>
inline vec<T> sample_weights(const CallConstants<T>& call, int64_t row, int64_t m) {
  return call.sample_weight ? load_n(call.sample_weight + row, m, T(0)) : splat(T(1));
}

// e^(z_t - ref), of rows without a target 0.
template <class T>
[[gnu::flatten, gnu::noinline]] void target_exponentials(RowBatch<T>& s, int64_t n) {
  for (int64_t v = 0; v < n; v += kLanes<T>) {
    const vec<T> e = exp_of(load(s.picked + v) - load(s.ref + v));
    store(s.target_exp + v, lane_targets(s, v) >= 0 ? e : vec<T>{});
  }
}

// -log p_t, either form of target_nll from one logarithm.
template <class T>
[[gnu::flatten, gnu::noinline]] void target_nlls(const CallConstants<T>& call, RowBatch<T>& s, int64_t n) {
  const bool zero_inf = call.a.zero_times_inf && call.weight;
  for (int64_t v = 0; v < n; v += kLanes<T>) {
    const vec<T> others = load(s.others + v), e = load(s.target_exp + v), d = load(s.picked + v) - load(s.ref + v);
    const vec<T> ratio = others / e, sum = others + e;
    const vec<T> log_w = log1p_from(others < e ? ratio : sum - T(1), others < e ? T(1) + ratio : sum);
    const vec<T> nll = target_nll(others, e, log_w, d, log_w);
    store(s.nll + v, zero_inf && load(s.weight + v) == T(0) ? vec<T>{} : nll);
  }
}

// What the row map makes of the nll of each row, in its place, with its slope and level.
template <Mode kMode, class T>
[[gnu::flatten, gnu::noinline]] void map_rows(const CallConstants<T>& call, RowBatch<T>& s, int64_t first, int64_t n) {
  const RowConstants<T> k = call.k;
  const RowMap map = RowMap(call.a.row_map);
  const T map_a = T(call.a.map_params[0]), map_b = T(call.a.map_params[1]);
  T *const slopes = call.slope, *const levels = call.level;
  for (int64_t v = 0; v < n; v += kLanes<T>) {
    const int64_t row = first + v, m = min_of(kLanes<T>, n - v);
    const vec<T> w_t = target_weights<kMode, T>(call, s, v);
    vec<T> mass, mean;
    if constexpr (kMode == Mode::index) {
      mass = w_t;
      mean = load(s.nll + v);
    } else {
      const vec<T> log_sum = log_of(load(s.others + v) + load(s.target_exp + v)), dot = load(s.dot + v);
      vec<T> nll;
      if constexpr (kMode == Mode::soft) {
        mass = load(s.mass + v);
        nll = spread_nll(mass, log_sum, dot);
      } else {
        mass = (T(1) - k.smoothing) * w_t + k.smooth_share * k.weight_sum;
        nll = index_row_nll(k, load(s.nll + v), w_t) + smooth_row_nll(k, log_sum, dot);
      }
      mean = nll / mass;
    }
    const MappedRow<vec<T>> g = mapped_row(map, mass, mean, map_a, map_b);
    const vec<T> slope = counted<kMode, T>(lane_targets(s, v), m) ? g.slope : splat(T(1));
    store(s.nll + v, g.nll);
    store(s.slope + v, slope);
    if (slopes) store_n(slopes + row, m, slope);
    if (levels) store_n(levels + row, m, g.level);
  }
}

// Losses of a batch of rows, and whatever else is wanted of them.
template <Mode kMode, bool kTransform, class S, class T>
inline void row_losses(const CallConstants<T>& call, const RowBatch<T>& s, int64_t first, int64_t n, LossSums* sums) {
  const CrossEntropyArgs& a = call.a;
  const RowConstants<T>& k = call.k;
  const bool wants_log_sum = (kMode != Mode::index && !call.mapped) || k.z_loss != T(0) || a.lse || a.entropy;
  vec_double nll_sum{}, smooth_sum{}, z_sum{};
  for (int64_t v = 0; v < n; v += kLanes<T>) {
    const int64_t row = first + v, m = min_of(kLanes<T>, n - v);
    const auto counts = counted<kMode, T>(lane_targets(s, v), m);
    const vec<T> ref = load(s.ref + v), others = load(s.others + v), dot = load(s.dot + v), mass = load(s.mass + v);
    const vec<T> e = load(s.target_exp + v), sum = others + e, sample = sample_weights(call, row, m);
    const vec<T> log_sum = wants_log_sum ? log_of(sum) : vec<T>{}, lse = ref + log_sum;

    vec<T> nll, smooth{}, z{};
    if (call.mapped)
      nll = load(s.nll + v);
    else if (kMode == Mode::soft)
      nll = spread_nll(mass, log_sum, dot);
    else
      nll = index_row_nll(k, load(s.nll + v), target_weights<kMode, T>(call, s, v));
    if constexpr (kMode == Mode::smooth || kMode == Mode::smooth_weighted)
      if (!call.mapped) {
        smooth = counts ? sample * smooth_row_nll(k, log_sum, dot) : vec<T>{};
        smooth_sum += widen(smooth);
      }
    nll = counts ? nll * sample : vec<T>{};
    if (k.z_loss != T(0)) z = counts ? sample * (k.z_loss * lse * lse) : vec<T>{};
    nll_sum += widen(nll);
    z_sum += widen(z);
    if (a.loss && a.reduction == Reduction::none)
      for (int64_t b = 0; b < m; ++b)
        store_scalar(a.loss, a.loss_type, row + b, double(nll[b]) + double(smooth[b]) + double(z[b]));
    if (call.ref) {
      store_n(call.ref + row, m, ref);
      store_n(call.others + row, m, others);
      if (call.mass) store_n(call.mass + row, m, mass);
    }
    if (a.lse) store_n(static_cast<T*>(a.lse) + row, m, lse);
    if (a.entropy) {
      const vec<T> own = e > T(0) ? e * (load(s.picked + v) - ref) : vec<T>{};
      store_n(static_cast<T*>(a.entropy) + row, m, log_sum - (load(s.exp_dot + v) + own) / sum);
    }
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
  sums->nll += sum_lanes<double>(nll_sum);
  sums->smooth += sum_lanes<double>(smooth_sum);
  sums->z += sum_lanes<double>(z_sum);
}

// The coefficients of the gradient of a batch of rows, and the target's own gradient.
template <Mode kMode, bool kTransform, class S, class T>
inline void row_gradients(const CallConstants<T>& call, RowBatch<T>& s, int64_t first, int64_t n) {
  const CrossEntropyArgs& a = call.a;
  const RowConstants<T>& k = call.k;
  const T per_d = call.per_d(), per_dn = call.per_dn();
  for (int64_t v = 0; v < n; v += kLanes<T>) {
    const int64_t row = first + v, m = min_of(kLanes<T>, n - v);
    const auto counts = counted<kMode, T>(lane_targets(s, v), m);
    const vec<T> others = load(s.others + v), e = load(s.target_exp + v), sum = others + e;
    vec<T> up = sample_weights(call, row, m);  // what the row's loss weighs in the result that is differentiated
    if (call.backward)
      for (int64_t b = 0; b < m; ++b) up[b] *= call.grad_output(row + b);
    vec<T> u = counts ? up * per_d : vec<T>{}, uz{}, lse{};
    if (call.mapped) u *= call.backward ? load_n(call.slope + row, m, T(1)) : load(s.slope + v);
    if (k.z_loss != T(0)) {
      uz = counts ? up * per_dn : vec<T>{};
      lse = load(s.ref + v) + log_of(sum);
    }
    const vec<T> w_t = target_weights<kMode, T>(call, s, v);
    RowGrad<vec<T>> g;
    if constexpr (kMode == Mode::soft)
      g = soft_row_grad(k, lse, load(s.mass + v), u, uz);
    else
      g = index_row_grad(k, lse, w_t, u, uz);
    const vec<T> per_sum = T(1) / sum;
    store(s.softmax_scale + v, (g.target_scale + g.rest_scale) * per_sum);
    store(s.q_scale + v, g.q_scale);
    vec<T> own = target_grad(g, others, e, per_sum);
    if constexpr (kMode == Mode::smooth) own -= g.q_scale;
    if constexpr (kMode == Mode::smooth_weighted) own -= g.q_scale * w_t;
    if constexpr (kTransform) {
      own *= transform_slope(k, load(s.picked + v));
      if (call.margin.any)
        for (int64_t b = 0; b < m; ++b)
          if (s.target[v + b] >= 0)
            own[b] *= margin_slope(call.margin, T(to_accum(static_cast<const S*>(a.logits)[s.target_at(a, v + b)])));
    }
    store(s.target_grad + v, own);
  }
}

// All that is O(1) per row, from the statistics of a batch: losses, saved values, gradient coefficients.
template <Mode kMode, bool kTransform, class S, class T>
inline void finish_batch(const CallConstants<T>& call, RowBatch<T>& s, int64_t first, int64_t n, LossSums* sums) {
  if (call.a.stats) return store_stats<kMode, kTransform, S, T>(call, s, first, n);
  if (kMode != Mode::soft && call.weight) s.set_weights(call, first, n);
  target_exponentials(s, n);
  if (!call.backward) {
    if (kMode != Mode::soft) target_nlls(call, s, n);
    if (call.mapped) map_rows<kMode, T>(call, s, first, n);
    row_losses<kMode, kTransform, S, T>(call, s, first, n, sums);
  }
  if (call.a.grad) row_gradients<kMode, kTransform, S, T>(call, s, first, n);
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
