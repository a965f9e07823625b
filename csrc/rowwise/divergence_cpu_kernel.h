// Divergences of two softmaxes on the CPU: see divergence.h. Included once per instruction set.
//
// Row path: classes contiguous and not few, vectors along the classes. A row is walked in chunks: once for the maxima
// and the sums of exponentials, which brings it from memory into L2, once for the value, and the gradient by q's logits
// of kl at the same time, and once more for other gradients, whose sums the second walk has found. The exponentials of
// the first walk, of which there are two for each pair of logits, are kept for the others. Tile path: anything
// else, rows laid out as [classes, rows], a few classes at a time, vectors along the rows, the same walks.
//
// Logits of all dtypes become T on the way into a chunk or a tile, so the kernel is compiled for float and double
// alone.
#pragma once
#include "cross_entropy_cpu_tile_path.h"
#include "divergence_cpu_policy.h"
#include "divergence_math.h"

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int64_t kPairChunk = 1024, kPairTileRows = 64, kPairTileClasses = 128;
constexpr int64_t kPairKeptBytes = 131072;  // of either operand's exponentials in a row, at most

// What all rows of a call share beside PairCall.
template <class T>
struct PairPass {
  const DivergenceArgs& a;
  PairCall<T> k;
  const T* weight;
  T* saved;
  double per_row;  // scale / W
  bool backward, streamed;
  double* values;  // [rows], where they are to be summed

  T weight_of(int64_t row) const { return weight ? weight[row] : T(1); }
  // u of divergence.h
  T factor(int64_t row) const {
    const double g = backward ? load_scalar(a.grad_output, a.loss_type, a.grad_output_per_row ? row : 0) : 1.0;
    return T(g * per_row * double(weight_of(row)) * double(k.inv_temperature));
  }
  // Takes the divergence of a row.
  void put(int64_t row, double divergence) const {
    const double w = double(weight_of(row)), value = w == 0 ? 0.0 : w * divergence;
    if (values)
      values[row] = value;
    else
      store_scalar(a.loss, a.loss_type, row, a.scale * value);
  }
  T* field(int i) const { return saved ? saved + i * a.rows() : nullptr; }
};

// with_storage for an operand of a call in T: double is among the types only where T is.
template <class T, class F>
inline auto with_operand(DType type, const F& f) {
  if constexpr (sizeof(T) == 8)
    return with_storage(type, f);
  else
    switch (type) {
      case DType::f16: return f(static_cast<float16*>(nullptr));
      case DType::bf16: return f(static_cast<bfloat16*>(nullptr));
      default: return f(static_cast<float*>(nullptr));
    }
}
template <class S, class T>
constexpr bool kConverts = sizeof(accum_t<S>) == sizeof(T);  // load and store know the way from S to T

// Where element `at` of an operand lies.
inline const char* address_of(const DivergenceOperand& o, int64_t at) {
  return static_cast<const char*>(o.logits) + at * size_of(o.type);
}
// n logits from element `at` on: where they lie, if that is a run of T, else in `room`.
template <class T>
inline const T* load_chunk(const DivergenceOperand& o, int64_t at, int64_t n, T* room) {
  return with_operand<T>(o.type, [&](auto* tag) -> const T* {
    using S = typename strip_pointer<decltype(tag)>::type;
    const S* x = static_cast<const S*>(o.logits) + at;
    if constexpr (sizeof(S) == sizeof(T)) {
      return x;
    } else if constexpr (kConverts<S, T>) {
      for_vectors<T>(0, n, [&](int64_t i, int64_t m) { store(room + i, load_n(x + i, m, T(0))); });
    } else {
      for (int64_t i = 0; i < n; ++i) room[i] = T(to_accum(x[i]));
    }
    return room;
  });
}
// n values next to each other.
template <class S, class T>
inline void store_run(S* to, int64_t n, const T* values, bool streamed) {
  if constexpr (kConverts<S, T>) {
    for_vectors<T>(0, n, [&](int64_t i, int64_t m) {
      if (streamed && m == kLanes<T>)
        stream(to + i, load(values + i));
      else
        store_n(to + i, m, load(values + i));
    });
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from_accum<S, T>(values[i]);
  }
}
template <class T>
inline void store_chunk(const DivergenceOperand& o, int64_t at, int64_t n, const T* values, bool streamed) {
  with_operand<T>(o.type, [&](auto* tag) {
    using S = typename strip_pointer<decltype(tag)>::type;
    store_run(static_cast<S*>(o.grad) + at, n, values, streamed);
  });
}

// The largest of some logits and the sum of exp((x - max) / T).
template <class T>
struct PairSum {
  T max = -kInf<T>;
  double sum = 0;

  // `from`: where the logits came from, `size` bytes each. The exponentials go to `kept`, if it is given.
  __attribute__((flatten)) void add(const T* x, int64_t n, T inv_temperature, const char* from, int64_t size, T* kept) {
    vec<T> top = splat(max);
    for_vectors<T>(0, n, [&](int64_t i, int64_t m) {
      read_ahead(from + i * size);
      top = max_of(load_n(x + i, m, -kInf<T>), top);
    });
    const T above = max_lanes<T>(top), ref = above > -kInf<T> ? above : T(0);
    if (above > max) sum *= double(exp_of_scalar((max - ref) * inv_temperature));
    max = above;
    vec<T> part{};
    for_vectors<T>(0, n, [&](int64_t i, int64_t m) {
      const vec<T> e = exp_of((load_n(x + i, m, -kInf<T>) - ref) * inv_temperature);
      if (kept) store(kept + i, e);
      part += e;
    });
    sum += sum_lanes<double>(widen(part));
  }
};

struct PairPlace {
  int64_t row, p, q, grad_p, grad_q;  // where the row begins, in elements

  PairPlace(const DivergenceArgs& a, int64_t row) : row(row) {
    const int64_t o = row / a.inner, i = row % a.inner;
    const auto begin = [&](const Strides& s) { return o * s.outer + i * s.inner; };
    p = begin(a.p.strides), q = begin(a.q.strides);
    grad_p = begin(a.p.grad_strides), grad_q = begin(a.q.grad_strides);
  }
};
struct PairSums {
  double value = 0, by_p = 0, by_q = 0, excess = 0;
};
// The exponentials of a row, e^((x - ref[chunk]) / T), and the largest logit up to the end of each chunk.
template <class T>
struct PairKept {
  Scratch<T> exps, ref;

  explicit PairKept(int64_t classes)
      : exps(round_up(classes, kLanes<T>)), ref((classes + kPairChunk - 1) / kPairChunk) {}
  // What makes probabilities of those of the chunk that begins with class c.
  T scale(int64_t c, T max, T log_sum, T inv_temperature) {
    return exp_of_scalar((ref[c / kPairChunk] - max) * inv_temperature - log_sum);
  }
};
template <class T>
struct PairRooms {
  Scratch<T> p{kPairChunk}, q{kPairChunk}, grad_p{kPairChunk}, grad_q{kPairChunk};
  const bool keeps;
  PairKept<T> kept_p, kept_q;

  explicit PairRooms(const PairPass<T>& pass)
      : keeps(!pass.backward && pass.a.classes * int64_t(sizeof(T)) <= kPairKeptBytes),
        kept_p(keeps ? pass.a.classes : 0),
        kept_q(keeps ? pass.a.classes : 0) {}
};

// One walk along a row: the sums over its classes; the gradients that are asked for, with the sums that they lack.
template <class T>
__attribute__((flatten)) inline PairSums walk_pair(const PairPass<T>& pass, const PairPlace& at, const PairRow<T>& row,
                                                   T mean_p, T mean_q, bool sums, bool by_p, bool by_q,
                                                   PairRooms<T>& room) {
  const DivergenceArgs& a = pass.a;
  const PairCall<T> k = pass.k;
  const T factor = by_p || by_q ? pass.factor(at.row) : T(0);
  const PairRow<vec<T>> r = {splat(row.max_p), splat(row.max_q), splat(row.log_sum_p), splat(row.log_sum_q),
                             splat(row.log_ratio)};
  const int64_t size_p = size_of(a.p.type), size_q = size_of(a.q.type);
  PairSums all;
  for (int64_t c = 0; c < a.classes; c += kPairChunk) {
    const int64_t n = min_of(kPairChunk, a.classes - c);
    const T* x_p = load_chunk(a.p, at.p + c, n, room.p.get());
    const T* x_q = load_chunk(a.q, at.q + c, n, room.q.get());
    const char *from_p = address_of(a.p, at.p + c), *from_q = address_of(a.q, at.q + c);
    vec<T> value{}, sum_p{}, sum_q{}, excess{};
    const T scale_p = room.keeps ? room.kept_p.scale(c, row.max_p, row.log_sum_p, k.inv_temperature) : T(0);
    const T scale_q = room.keeps ? room.kept_q.scale(c, row.max_q, row.log_sum_q, k.inv_temperature) : T(0);
    const auto terms = [&](int64_t i, vec<T> p, vec<T> q) {
      if (!room.keeps) return pair_terms(p, q, r, k);
      const T *exp_p = room.kept_p.exps.get() + c + i, *exp_q = room.kept_q.exps.get() + c + i;
      return pair_terms(p, q, load(exp_p) * scale_p, load(exp_q) * scale_q, r, k);
    };
    for_vectors<T>(0, n, [&](int64_t i, int64_t m) {
      if (pass.backward) read_ahead(from_p + i * size_p), read_ahead(from_q + i * size_q);
      const PairTerms<vec<T>> t = terms(i, load_n(x_p + i, m, -kInf<T>), load_n(x_q + i, m, -kInf<T>));
      if (sums) value += t.value, sum_p += t.by_p, sum_q += t.by_q, excess += t.excess;
      if (by_p) store(room.grad_p.get() + i, factor * (t.by_p - t.p * mean_p));
      if (by_q) store(room.grad_q.get() + i, factor * (t.by_q - t.q * mean_q));
    });
    if (sums) {
      all.value += sum_lanes<double>(widen(value)), all.excess += sum_lanes<double>(widen(excess));
      all.by_p += sum_lanes<double>(widen(sum_p)), all.by_q += sum_lanes<double>(widen(sum_q));
    }
    if (by_p) store_chunk(a.p, at.grad_p + c, n, room.grad_p.get(), pass.streamed);
    if (by_q) store_chunk(a.q, at.grad_q + c, n, room.grad_q.get(), pass.streamed);
  }
  return all;
}

template <class T>
inline void fill_pair_row(const PairPass<T>& pass, const PairPlace& at, PairRooms<T>& room) {
  const DivergenceArgs& a = pass.a;
  for (int64_t i = 0; i < kPairChunk; ++i) room.p[i] = T(0);
  for (int64_t c = 0; c < a.classes; c += kPairChunk) {
    const int64_t n = min_of(kPairChunk, a.classes - c);
    if (a.p.grad) store_chunk(a.p, at.grad_p + c, n, room.p.get(), pass.streamed);
    if (a.q.grad) store_chunk(a.q, at.grad_q + c, n, room.p.get(), pass.streamed);
  }
}

template <class T>
inline void pair_row_path(const PairPass<T>& pass, int64_t begin, int64_t end) {
  const DivergenceArgs& a = pass.a;
  const bool by_p = a.p.grad, by_q = a.q.grad, soon = by_q && !pass.k.js && !pass.backward;
  PairRooms<T> room(pass);
  for (int64_t b = begin; b < end; ++b) {
    const PairPlace at(a, b);
    if (pass.weight_of(b) == T(0)) {
      if (!pass.backward) pass.put(b, 0);
      for (int i = 0; i < kDivergenceSaved && !pass.backward && pass.saved; ++i) pass.field(i)[b] = T(0);
      fill_pair_row(pass, at, room);
      continue;
    }
    if (pass.backward) {
      const auto field = [&](int i) { return pass.field(i)[b]; };
      walk_pair(pass, at, {field(0), field(1), field(2), field(3), field(4)}, field(5), field(6), false, by_p, by_q,
                room);
      continue;
    }
    PairSum<T> p, q;
    const int64_t size_p = size_of(a.p.type), size_q = size_of(a.q.type);
    for (int64_t c = 0; c < a.classes; c += kPairChunk) {
      const int64_t n = min_of(kPairChunk, a.classes - c);
      T* const exps_p = room.keeps ? room.kept_p.exps.get() + c : nullptr;
      T* const exps_q = room.keeps ? room.kept_q.exps.get() + c : nullptr;
      const T inv_t = pass.k.inv_temperature;
      p.add(load_chunk(a.p, at.p + c, n, room.p.get()), n, inv_t, address_of(a.p, at.p + c), size_p, exps_p);
      q.add(load_chunk(a.q, at.q + c, n, room.q.get()), n, inv_t, address_of(a.q, at.q + c), size_q, exps_q);
      if (room.keeps) room.kept_p.ref[c / kPairChunk] = p.max, room.kept_q.ref[c / kPairChunk] = q.max;
    }
    const PairRow<narrow<T>> wide =
        pair_row(p.max - narrow<T>{}, T(p.sum) - narrow<T>{}, q.max - narrow<T>{}, T(q.sum) - narrow<T>{});
    const PairRow<T> r = {p.max, q.max, wide.log_sum_p[0], wide.log_sum_q[0], wide.log_ratio[0]};
    const PairSums s = walk_pair(pass, at, r, T(0), T(0), true, false, soon, room);
    pass.put(b, row_divergence(s.value, s.excess, pass.k));
    if (pass.saved) {
      const T fields[] = {r.max_p, r.max_q, r.log_sum_p, r.log_sum_q, r.log_ratio, T(s.by_p), T(s.by_q)};
      for (int i = 0; i < kDivergenceSaved; ++i) pass.field(i)[b] = fields[i];
    }
    if (by_p || (by_q && !soon)) walk_pair(pass, at, r, T(s.by_p), T(s.by_q), false, by_p, by_q && !soon, room);
  }
  if (pass.streamed) stream_fence();
}

template <class T>
constexpr int64_t kPairPitch = kPairTileRows + kLanes<T>;

template <class T>
inline void load_pair_tile(const DivergenceOperand& o, const Rows& from, int64_t n, int64_t c0, int64_t classes,
                           T* tile) {
  with_operand<T>(o.type, [&](auto* tag) {
    using S = typename strip_pointer<decltype(tag)>::type;
    load_tile(static_cast<const S*>(o.logits), from, n, o.strides.cls, c0, classes, tile, kPairPitch<T>);
  });
}
template <class T>
inline void store_pair_tile(const DivergenceOperand& o, const Rows& to, int64_t n, int64_t c0, int64_t classes,
                            const T* tile) {
  with_operand<T>(o.type, [&](auto* tag) {
    using S = typename strip_pointer<decltype(tag)>::type;
    S* grad = static_cast<S*>(o.grad) + to[0] + c0 * o.grad_strides.cls;
    if (to.step != 1) return store_tile(grad, to, n, o.grad_strides.cls, classes, tile, kPairPitch<T>);
    for (int64_t c = 0; c < classes; ++c)
      store_run(grad + c * o.grad_strides.cls, n, tile + c * kPairPitch<T>, /*streamed=*/false);
  });
}

// Some adjacent rows, of which it holds a few classes at a time, or all.
template <class T>
class PairTile {
  // The numbers of the rows: what is saved, the sums of the exponentials, the sums over the classes, and u.
  enum { max_p, max_q, log_sum_p, log_sum_q, log_ratio, mean_p, mean_q, sum_p, sum_q, value, excess, factor, counts };
  static constexpr int kFields = counts + 1;
  static constexpr int64_t pitch = kPairPitch<T>;

  const PairPass<T>& pass_;
  const DivergenceArgs& a_;
  const int64_t held_;
  int64_t first_ = 0, n_ = 0, lanes_ = 0;
  bool loaded_ = false;
  Scratch<T> p_, q_, fields_;

  T* field(int i) { return fields_.get() + i * pitch; }
  PairRow<vec<T>> row_at(int64_t v) {
    return {load(field(max_p) + v), load(field(max_q) + v), load(field(log_sum_p) + v), load(field(log_sum_q) + v),
            load(field(log_ratio) + v)};
  }
  void add(int i, int64_t v, vec<T> x) { store(field(i) + v, load(field(i) + v) + x); }
  Rows rows_of(const Strides& s) const { return Rows(first_, n_, a_.inner, s); }

  // body(v, classes) with a vector of rows and the classes that the tiles hold, then after(first class, classes). Tiles
  // that hold all classes stay where they are.
  template <class F, class G>
  void over_classes(const F& body, const G& after) {
    for (int64_t c0 = 0; c0 < a_.classes; c0 += held_) {
      const int64_t classes = min_of(held_, a_.classes - c0);
      if (!loaded_) {
        load_pair_tile(a_.p, rows_of(a_.p.strides), n_, c0, classes, p_.get());
        load_pair_tile(a_.q, rows_of(a_.q.strides), n_, c0, classes, q_.get());
      }
      loaded_ = held_ == a_.classes;
      for (int64_t v = 0; v < lanes_; v += kLanes<T>) body(v, classes);
      after(c0, classes);
    }
  }
  template <class F>
  void over_classes(const F& body) {
    over_classes(body, [](int64_t, int64_t) {});
  }

  // Largest logits and sums of exponentials of one operand, brought up to date with further classes.
  void add_exponentials(const T* tile, int64_t classes, int64_t v, int max, int sum) {
    const T inv_temperature = pass_.k.inv_temperature;
    const vec<T> before = load(field(max) + v);
    vec<T> top = before;
    for (int64_t c = 0; c < classes; ++c) top = max_of(load(tile + c * pitch + v), top);
    const vec<T> ref = top > -kInf<T> ? top : vec<T>{};
    vec<T> part{};
    for (int64_t c = 0; c < classes; ++c) part += exp_of((load(tile + c * pitch + v) - ref) * inv_temperature);
    store(field(sum) + v, load(field(sum) + v) * exp_of((before - ref) * inv_temperature) + part);
    store(field(max) + v, top);
  }
  void find_rows() {
    for (int64_t v = 0; v < lanes_; v += kLanes<T>) {
      for (int i = 0; i < kFields; ++i) store(field(i) + v, vec<T>{});
      store(field(max_p) + v, splat(-kInf<T>));
      store(field(max_q) + v, splat(-kInf<T>));
    }
    over_classes([&](int64_t v, int64_t classes) {
      add_exponentials(p_.get(), classes, v, max_p, sum_p);
      add_exponentials(q_.get(), classes, v, max_q, sum_q);
    });
    for (int64_t v = 0; v < lanes_; v += kLanes<T>) {
      const PairRow<vec<T>> r =
          pair_row(load(field(max_p) + v), load(field(sum_p) + v), load(field(max_q) + v), load(field(sum_q) + v));
      store(field(log_sum_p) + v, r.log_sum_p);
      store(field(log_sum_q) + v, r.log_sum_q);
      store(field(log_ratio) + v, r.log_ratio);
    }
  }
  void find_sums() {
    over_classes([&](int64_t v, int64_t classes) {
      const PairRow<vec<T>> r = row_at(v);
      vec<T> values{}, by_p{}, by_q{}, excesses{};
      for (int64_t c = 0; c < classes; ++c) {
        const int64_t at = c * pitch + v;
        const PairTerms<vec<T>> t = pair_terms(load(p_.get() + at), load(q_.get() + at), r, pass_.k);
        values += t.value, by_p += t.by_p, by_q += t.by_q, excesses += t.excess;
      }
      add(value, v, values), add(excess, v, excesses), add(mean_p, v, by_p), add(mean_q, v, by_q);
    });
  }
  void write_gradients() {
    for (int64_t b = 0; b < n_; ++b) {
      field(factor)[b] = pass_.factor(first_ + b);
      field(counts)[b] = T(pass_.weight_of(first_ + b) != T(0));
    }
    const auto gradients = [&](int64_t v, int64_t classes) {
      const PairRow<vec<T>> r = row_at(v);
      const vec<T> by_p = load(field(mean_p) + v), by_q = load(field(mean_q) + v), u = load(field(factor) + v);
      const auto nothing = load(field(counts) + v) == T(0);
      for (int64_t c = 0; c < classes; ++c) {
        T *const p = p_.get() + c * pitch + v, *const q = q_.get() + c * pitch + v;
        const PairTerms<vec<T>> t = pair_terms(load(p), load(q), r, pass_.k);
        store(p, nothing ? vec<T>{} : u * (t.by_p - t.p * by_p));
        store(q, nothing ? vec<T>{} : u * (t.by_q - t.q * by_q));
      }
    };
    over_classes(gradients, [&](int64_t c0, int64_t classes) {
      if (a_.p.grad) store_pair_tile(a_.p, rows_of(a_.p.grad_strides), n_, c0, classes, p_.get());
      if (a_.q.grad) store_pair_tile(a_.q, rows_of(a_.q.grad_strides), n_, c0, classes, q_.get());
    });
  }

 public:
  explicit PairTile(const PairPass<T>& pass)
      : pass_(pass),
        a_(pass.a),
        held_(min_of(kPairTileClasses, a_.classes)),
        p_(held_ * pitch),
        q_(held_ * pitch),
        fields_(kFields * pitch) {}

  void run(int64_t tile) {
    first_ = tile * kPairTileRows;
    n_ = min_of(kPairTileRows, a_.rows() - first_);
    lanes_ = round_up(n_, kLanes<T>);
    loaded_ = false;
    if (pass_.backward) {
      for (int i = 0; i < kDivergenceSaved; ++i)
        __builtin_memcpy(field(i), pass_.field(i) + first_, size_t(n_) * sizeof(T));
    } else {
      find_rows();
      find_sums();
      for (int64_t b = 0; b < n_; ++b)
        pass_.put(first_ + b, row_divergence(double(field(value)[b]), double(field(excess)[b]), pass_.k));
      for (int i = 0; i < kDivergenceSaved && pass_.saved; ++i)
        __builtin_memcpy(pass_.field(i) + first_, field(i), size_t(n_) * sizeof(T));
    }
    if (a_.p.grad || a_.q.grad) write_gradients();
  }
};

template <class T>
inline void divergence_of(const DivergenceArgs& a, bool backward, ParallelFor parallel_for) {
  const int64_t rows = a.rows();
  const double total = a.total ? double(*static_cast<const T*>(a.total)) : double(rows);
  const bool mean = a.reduction == Reduction::mean, summed = !backward && a.reduction != Reduction::none;
  Scratch<double> values(summed ? rows : 0);
  const int64_t bytes_p = a.classes * size_of(a.p.type), bytes_q = a.classes * size_of(a.q.type);
  const int64_t shorter = min_of(bytes_p, bytes_q);
  const bool streamed = rows * shorter >= kStreamBytes && shorter >= kStreamRowBytes;
  const PairPass<T> pass = {a,
                            pair_call<T>(a),
                            static_cast<const T*>(a.weight),
                            static_cast<T*>(a.saved),
                            mean ? a.scale / total : a.scale,
                            backward,
                            streamed,
                            summed ? values.get() : nullptr};
  if (takes_row_path(a)) {
    parallel(parallel_for, rows, grain_for(a.classes),
             [&](int64_t begin, int64_t end) { pair_row_path(pass, begin, end); });
  } else {
    parallel(parallel_for, (rows + kPairTileRows - 1) / kPairTileRows, grain_for(a.classes * kPairTileRows),
             [&](int64_t begin, int64_t end) {
               PairTile<T> tile(pass);
               for (int64_t t = begin; t < end; ++t) tile.run(t);
             });
  }
  if (!summed) return;
  const double sum = a.scale * pairwise_sum(values.get(), rows, 1);
  store_scalar(a.loss, a.loss_type, 0, mean ? sum / total : sum);
}

inline Status divergence_forward(const DivergenceArgs& a, ParallelFor parallel_for) {
  a.accum() == DType::f64 ? divergence_of<double>(a, false, parallel_for)
                          : divergence_of<float>(a, false, parallel_for);
  return {};
}
inline Status divergence_backward(const DivergenceArgs& a, ParallelFor parallel_for) {
  a.accum() == DType::f64 ? divergence_of<double>(a, true, parallel_for) : divergence_of<float>(a, true, parallel_for);
  return {};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
