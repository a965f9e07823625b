// Cross entropy on the CPU, tile path: few classes, class axis strided, channels first. Rows are laid out as [classes,
// rows] in L1/L2 and vectors run along the rows: 1 read (+ 1 write) while all classes of a tile fit, else one more read
// for the gradient.
#pragma once
#include "cross_entropy_cpu_batch.h"

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int64_t kTileBytes = 8192;
constexpr int64_t kTileBytesMax = 262144;  // past this a tile holds only part of the classes

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
  const int64_t pitch = rows + lanes;  // rows are multiples of 64: keeps the classes of a row out of one cache set
  return {rows, pitch, clamp_to(kTileBytesMax / element / pitch, 1, a.classes > 0 ? a.classes : 1)};
}

// z[c][b] of a tile that is loaded. Of a class index z_t is not there but in `picked` (see tile_path): nothing need be
// compared with the target.
template <Mode kMode, class T>
struct Loaded {
  static constexpr bool kHasTarget = kMode != Mode::index;
  const T* tile;
  int64_t pitch;
  vec<T> operator()(int64_t c, int64_t v) const { return load(tile + c * pitch + v); }
};
// The same of a tile that is being loaded, of rows that are neighbours.
template <class S, class T>
struct Loading {
  static constexpr bool kHasTarget = true;
  const S* first;
  int64_t stride;
  T* tile;
  int64_t pitch;
  vec<T> operator()(int64_t c, int64_t v) const {
    const vec<T> z = load(first + c * stride + v);
    store(tile + c * pitch + v, z);
    return z;
  }
};

// Brings the maximum of a tile's rows, and what has been summed relative to it, up to date with further classes.
template <class T, class Z>
inline void tile_reference(RowBatch<T>& s, int64_t lanes, Z z, int64_t c0, int64_t classes) {
  constexpr int kTogether = 4;  // independent maxima: one alone would wait for itself
  for (int64_t v = 0; v < lanes; v += kTogether * kLanes<T>) {
    vec<T> top[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      top[i] = load(s.max + v + i * kLanes<T>);
      if constexpr (!Z::kHasTarget) top[i] = max_of(load(s.picked + v + i * kLanes<T>), top[i]);
    }
    for (int64_t c = 0; c < classes; ++c)
      for (int i = 0; i < kTogether; ++i) top[i] = max_of(z(c, v + i * kLanes<T>), top[i]);
    for (int i = 0; i < kTogether; ++i) {
      const int64_t at = v + i * kLanes<T>;
      const vec<T> max = top[i], ref = max > -kInf<T> ? max : vec<T>{};
      if (c0 > 0) {
        const vec<T> shift = load(s.ref + at) - ref, others = load(s.others + at);
        store(s.others + at, load(s.max + at) > -kInf<T> ? others * exp_of(shift) : others);
        store(s.dot + at, load(s.dot + at) + load(s.mass + at) * shift);
      }
      store(s.max + at, max);
      store(s.ref + at, ref);
    }
  }
}

// Adds classes to the sums of a tile's rows; with kKeep, e^(z - ref) is left in the tile. Terms are added in blocks of
// classes, blocks in the tile, tiles in the row: one long sum would lose a digit or two at 1e5 classes.
template <Mode kMode, bool kKeep, class T>
inline void tile_sums(const CallConstants<T>& call, RowBatch<T>& s, int64_t lanes, T* tile, const T* prob,
                      int64_t pitch, int64_t c0, int64_t classes, NextTile next, NextTile next_prob) {
  const RowConstants<T>& k = call.k;
  const bool zero_inf = call.a.zero_times_inf;
  constexpr int64_t kBlock = 64;
  for (int64_t v = 0; v < lanes; v += kLanes<T>) {
    const vec<T> ref = load(s.ref + v);
    vec<T> others{}, dot{}, mass{}, blocks_others{}, blocks_dot{}, blocks_mass{};
    const ivec<T> target = lane_targets(s, v) - typename bits_of<T>::type(c0);
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

// Adds classes to the sums of e^(z - ref) (z - ref), for entropies; z of the target is -inf.
template <class T>
inline void tile_exp_dots(RowBatch<T>& s, int64_t lanes, const T* tile, int64_t pitch, int64_t classes) {
  for (int64_t v = 0; v < lanes; v += kLanes<T>) {
    const vec<T> ref = load(s.ref + v);
    vec<T> sum{};
    for (int64_t c = 0; c < classes; ++c) {
      const vec<T> d = load(tile + c * pitch + v) - ref, e = exp_of(d);
      sum += e == T(0) ? vec<T>{} : e * d;
    }
    store(s.exp_dot + v, load(s.exp_dot + v) + sum);
  }
}

// The gradient from z[c][b], or with kKept from e^(z - ref): put(c, v, g) for the vector v of class c0 + c.
template <Mode kMode, bool kTransform, bool kKept, class T, class F>
inline void tile_gradient(const CallConstants<T>& call, const RowBatch<T>& s, int64_t lanes, const T* tile,
                          const T* prob, int64_t pitch, int64_t c0, int64_t classes, NextTile next, NextTile next_prob,
                          const F& put) {
  using lane_int = typename bits_of<T>::type;
  const RowConstants<T> k = call.k;
  constexpr int kTogether = 4;  // vectors of rows, whose coefficients stay in registers for all classes
  for (int64_t v0 = 0; v0 < lanes; v0 += kTogether * kLanes<T>) {
    vec<T> softmax[kTogether], q[kTogether], own[kTogether], refs[kTogether];
    ivec<T> target[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      const int64_t v = v0 + i * kLanes<T>;
      softmax[i] = load(s.softmax_scale + v);
      if constexpr (kMode != Mode::index) q[i] = load(s.q_scale + v);
      if constexpr (!kKept) refs[i] = load(s.ref + v);
      if constexpr (kMode != Mode::soft) {
        own[i] = load(s.target_grad + v);
        target[i] = lane_targets(s, v);
      }
    }
    for (int64_t c = 0; c < classes; ++c) {
      const T w = call.weight ? call.weight[c0 + c] : T(1);
      for (int i = 0; i < kTogether; ++i) {
        const int64_t v = v0 + i * kLanes<T>;
        if constexpr (!kKept) next.fetch();
        if constexpr (!kKept && kMode == Mode::soft) next_prob.fetch();
        const vec<T> z = load(tile + c * pitch + v);
        vec<T> g = (kKept ? z : exp_of(z - refs[i])) * softmax[i];
        if constexpr (kMode == Mode::smooth) g -= q[i];
        if constexpr (kMode == Mode::smooth_weighted) g -= q[i] * w;
        if constexpr (kMode == Mode::soft) g -= q[i] * soft_q<T>(k, load(prob + c * pitch + v), splat(w));
        if constexpr (kTransform) g *= transform_slope(k, z);
        if constexpr (kMode != Mode::soft) g = target[i] == lane_int(c0 + c) ? own[i] : g;
        put(c, v, g);
      }
    }
  }
}

template <class T>
class Tiles {  // z, then its gradient; probabilities; the gradient once more, in the order of memory
  Scratch<T> memory_;

 public:
  Tiles(const TileShape& shape, bool soft, bool staged)
      : memory_(shape.classes * (shape.pitch * (soft ? 2 : 1) + (staged ? shape.rows : 0))),
        shape(shape),
        tile(memory_.get()),
        prob(tile + (soft ? shape.classes * shape.pitch : 0)),
        stage(prob + shape.classes * shape.pitch) {}
  const TileShape shape;
  T *const tile, *const prob, *const stage;
};

template <Mode kMode, bool kTransform, class S>
inline void tile_path(const CallConstants<accum_t<S>>& call, RowBatch<accum_t<S>>& s, Tiles<accum_t<S>>& tiles,
                      int64_t first, int64_t n, LossSums* sums) {
  using T = accum_t<S>;
  const CrossEntropyArgs& a = call.a;
  const RowConstants<T>& k = call.k;
  const int64_t step = tiles.shape.classes, pitch = tiles.shape.pitch, lanes = round_up(n, kLanes<T>);
  const S* x = static_cast<const S*>(a.logits);
  T *const tile = tiles.tile, *const prob = tiles.prob;
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
  const bool wants_exp_dots = a.entropy || a.stats_best;
  const bool keep = whole && !kTransform && !call.backward && a.grad && !wants_exp_dots;
  // Rows of a full tile that are neighbours are brought to the tile as their maximum is looked for.
  constexpr bool kMayLoad = kMode != Mode::soft && !kTransform;
  const bool loading = kMayLoad && s.logits.step == 1 && n == tiles.shape.rows && !call.backward;
  s.set_targets(a, first, n);
  for (int64_t v = 0; v < lanes; v += kLanes<T>)
    store(s.picked + v, kMode == Mode::index ? splat(-kInf<T>) : vec<T>{});  // where there is no target
  if (whole && !loading) load_classes(0, a.classes);
  // z_t of the rows whose target is in the tile; -inf in its place adds nothing to the sum of the others.
  auto pick = [&call, &a, &s, x, tile, pitch, n, target = s.target, picked = s.picked](int64_t c0, int64_t classes,
                                                                                       bool apart) {
    for (int64_t b = 0; b < n; ++b) {
      const int64_t c = target[b] - c0;
      if (uint64_t(c) >= uint64_t(classes)) continue;  // that of no target, -1, too
      T* const z = tile + c * pitch + b;
      picked[b] = *z;
      if (apart) *z = -kInf<T>;
    }
    if constexpr (kTransform)
      for (int64_t b = 0; call.margin.any && b < n; ++b) {
        const int64_t c = target[b] - c0;
        if (uint64_t(c) >= uint64_t(classes)) continue;
        picked[b] = target_logit<kTransform, T>(call, T(to_accum(x[s.target_at(a, b)])));
        if (!apart) tile[c * pitch + b] = picked[b];
      }
  };
  if (call.backward) {
    s.restore(call, first, n);
    if (whole) pick(0, a.classes, false);
    for (int64_t b = 0; b < n && !whole; ++b)
      if (s.target[b] >= 0) s.picked[b] = target_logit<kTransform, T>(call, T(to_accum(x[s.target_at(a, b)])));
    for (int64_t b = 0; b < n && call.saved_target; ++b) s.picked[b] = call.saved_target[first + b];
  } else {
    s.clear_statistics(lanes);
    for (int64_t c0 = 0; c0 < a.classes; c0 += step) {
      const int64_t classes = min_of(step, a.classes - c0);
      const int64_t stride = a.logits_strides.cls;
      auto reference = [&](const auto& z) { tile_reference<T>(s, lanes, z, c0, classes); };
      if constexpr (kMayLoad)
        if (loading) reference(Loading<S, T>{x + s.logits[0] + c0 * stride, stride, tile, pitch});
      if (!whole && !loading) load_classes(c0, classes);
      pick(c0, classes, kMode == Mode::index);
      if (!loading) reference(Loaded<kMode, T>{tile, pitch});
      auto add = [&](auto kept) {
        tile_sums<kMode, decltype(kept)::value, T>(call, s, lanes, tile, prob, pitch, c0, classes, next(c0, classes),
                                                   next_prob(c0, classes));
      };
      keep ? add(constant<true>{}) : add(constant<false>{});
    }
    for (int64_t v = 0; v < lanes && wants_exp_dots; v += kLanes<T>) store(s.exp_dot + v, vec<T>{});
    for (int64_t c0 = 0; c0 < a.classes && wants_exp_dots; c0 += step) {
      const int64_t classes = min_of(step, a.classes - c0);
      if (!whole) load_classes(c0, classes);
      if (!whole || kMode != Mode::index) pick(c0, classes, true);
      tile_exp_dots<T>(s, lanes, tile, pitch, classes);
    }
    for (int64_t v = 0; v < lanes && !a.stats; v += kLanes<T>)  // nothing but -inf (or nan): no softmax
      store(s.others + v, load(s.max + v) > -kInf<T> ? load(s.others + v) : splat(kNan<T>));
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
        if (v + kLanes<T> <= n)
          streamed ? stream(to, g) : store(to, g);
        else if (v < n)
          store_tail(to, n - v, g);
      });
    } else {
      gradient([tile, pitch](int64_t c, int64_t v, vec<T> g) { store(tile + c * pitch + v, g); });
      if (call.streamed && whole && stride == 1 && s.grad.step == a.classes) {
        S* const stage = reinterpret_cast<S*>(tiles.stage);
        store_tile(stage, s.grad, n, stride, classes, tile, pitch);
        stream_bytes(grad + s.grad[0], stage, n * a.classes * int64_t(sizeof(S)));
      } else {
        store_tile(grad + s.grad[0] + c0 * stride, s.grad, n, stride, classes, tile, pitch);
      }
    }
  }
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
