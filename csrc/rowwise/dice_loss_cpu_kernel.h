// Dice loss on the CPU: see dice_loss.h. Included once per instruction set.
//
// A group is cut into blocks of rows, a block into tiles, by the shape alone. The rows of a tile lie as [classes, rows]
// in L1/L2, whatever the layout of the input, and vectors run along the rows: 1 read (+ 1 write). Sums are taken in
// floats over four vectors, in double from there; one set of sums per block, added pairwise.
//
// With a cross entropy the target's logit is taken out of the tile before the exponentials, as in
// cross_entropy_cpu_tile_path.h: what is O(1) per row is done apart, and the loops over the classes stay as they are.
#pragma once
#include "cross_entropy_cpu_tile_path.h"
#include "dice_loss_math.h"

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int64_t kDiceBlockElements = 65536;

struct DiceShape {
  int64_t tile, pitch;    // rows of a tile; from a class to the next
  int64_t block, blocks;  // rows of a block; blocks of a group
};
template <class T>
inline DiceShape dice_shape(const DiceLossArgs& a) {
  const int64_t classes = a.classes > 0 ? a.classes : 1, element = int64_t(sizeof(T));
  // Whole lines of memory, of every class; few rows where there are thousands of classes.
  const bool many = classes * 64 * element > kTileBytesMax;
  const int64_t tile = many ? 16 : clamp_to(kTileBytes / element / classes / 64 * 64, 64, 512);
  const int64_t block = round_up(clamp_to(kDiceBlockElements / classes, tile, kDiceBlockElements), tile);
  return {tile, tile + kLanes<T>, block, (a.rows_per_group() + block - 1) / block};
}

template <int kValue>
struct together {
  static constexpr int value = kValue;
};
// f(v, together) for the vectors of a tile: four, as long as there are four, then one by one.
template <class T, class F>
inline void by_fours(int64_t lanes, const F& f) {
  int64_t v = 0;
  for (; v + 4 * kLanes<T> <= lanes; v += 4 * kLanes<T>) f(v, together<4>{});
  for (; v < lanes; v += kLanes<T>) f(v, together<1>{});
}

// The sigmoid of x and its slope, without cancellation at either end.
template <class V>
struct SigmoidJet {
  V value, slope;
};
template <class V>
inline SigmoidJet<V> sigmoid_jet(V x) {
  using T = lane_t<V>;
  const V e = exp_of(x < T(0) ? x : -x), inverse = T(1) / (T(1) + e);
  return {x < T(0) ? e * inverse : inverse, e * inverse * inverse};
}

// What a cross entropy adds, from the weights of the classes.
template <class T>
struct CrossEntropyTerms {
  bool any;
  T smooth_share, all_weights;   // smoothing / classes, sum_c w_c
  CrossEntropySlopes<T> slopes;  // backward only
};
template <class T>
inline CrossEntropyTerms<T> cross_entropy_terms(const DiceLossArgs& a) {
  CrossEntropyTerms<T> r{};
  r.any = with_cross_entropy(a);
  if (!r.any) return r;
  double sum = 0;
  for (int64_t c = 0; c < a.classes; ++c) sum += dice_weight<T>(a, c);
  r.smooth_share = T(a.smoothing / double(a.classes));
  r.all_weights = T(sum);
  if (a.grad_output) r.slopes = cross_entropy_slopes<T>(a, load_scalar(a.grad_output, a.loss_type, 0), sum);
  return r;
}

// One tile of rows. tile[c][b] holds x, and for the softmax e^(x - max) once exponentials() has run.
template <bool kDense, class S>
class DiceTile {
 public:
  using T = accum_t<S>;
  using lane_int = typename bits_of<T>::type;
  const DiceLossArgs& a;
  const DiceShape shape;
  int64_t first = 0, n = 0, lanes = 0;  // its rows, and their number in whole vectors
  int64_t bad = -1;                     // the first row with a bad target that load() has met
  Rows rows, target_rows;

  DiceTile(const DiceLossArgs& args, const DiceShape& s)
      : a(args),
        shape(s),
        tile_(args.classes * s.pitch),
        target_tile_(kDense ? args.classes * s.pitch : 1),
        values_(kValues * s.pitch),
        index_(s.pitch),
        terms_(cross_entropy_terms<T>(args)) {}

  T* of_class(int64_t c) { return tile_.get() + c * shape.pitch; }
  const S* input() const { return static_cast<const S*>(a.input); }

  void load_rows(int64_t first_row, int64_t count) {
    first = first_row;
    n = count;
    lanes = round_up(n, kLanes<T>);
    rows = {first, n, a.inner, a.input_strides};
    load_tile(input(), rows, n, a.input_strides.cls, 0, a.classes, tile_.get(), shape.pitch);
    lane_int* const index = index_.get();
    if constexpr (kDense) {
      target_rows = {first, n, a.inner, a.target_strides};
      with_storage(a.target_type, [&](auto* tag) {
        load_tile(static_cast<const decltype(tag)>(const_cast<void*>(a.target)), target_rows, n, a.target_strides.cls,
                  0, a.classes, target_tile_.get(), shape.pitch);
      });
      for (int64_t b = 0; b < n; ++b) index[b] = 0;
    } else {
      with_index(a.index_type, [&](auto* tag) {
        const auto* t = static_cast<decltype(tag)>(a.target) + first;
        const int64_t ignored = a.ignore_index, classes = a.classes;
        bool any_bad = false;
        for (int64_t b = 0; b < n; b += kLineBytes / int64_t(sizeof *t)) __builtin_prefetch(t + n + b);  // the next
        for (int64_t b = 0; b < n; ++b) {
          const bool outside = uint64_t(int64_t(t[b])) >= uint64_t(classes), counts = int64_t(t[b]) != ignored;
          any_bad |= outside && counts;
          index[b] = outside || !counts ? lane_int(-1) : lane_int(t[b]);
        }
        for (int64_t b = 0; any_bad && bad < 0; ++b)
          if (int64_t(t[b]) != ignored && uint64_t(int64_t(t[b])) >= uint64_t(classes)) bad = first + b;
      });
    }
    for (int64_t b = n; b < lanes; ++b) index[b] = -1;
  }
  // The class of each row of a vector, -1 where it does not count; for dense targets 0 where it does.
  ivec<T> index(int64_t v) const {
    ivec<T> r;
    __builtin_memcpy(&r, index_.at(v), sizeof r);
    return r;
  }
  // t of a vector.
  vec<T> target(int64_t c, int64_t v) const {
    if constexpr (kDense)
      return load(target_tile_.at(c * shape.pitch + v));
    else
      return index(v) == lane_int(c) ? splat(T(1)) : vec<T>{};
  }

  // Of a cross entropy: takes the target's logit of each row out of the tile and leaves -inf; and, with the slopes,
  // notes those of the target's class.
  void take_targets(const DiceSlopes<T>* slopes) {
    if (a.smoothing != 0 && !slopes) add_up_all_classes();
    for (int64_t b = 0; b < lanes; ++b) {
      const int64_t c = index_.get()[b];
      const bool counts = c >= 0;
      T* const x = of_class(counts ? c : 0) + b;
      *at(kTarget, b) = counts ? *x : -kInf<T>;
      *at(kWeight, b) = !counts ? T(0) : T(dice_weight<T>(a, c));
      if (counts) *x = -kInf<T>;
      if (slopes) {
        *at(kSlope, b) = counts ? slopes[c].by_other + slopes[c].constant : T(0);
        *at(kOwnSlope, b) = counts ? slopes[c].by_own : T(0);
      }
    }
  }
  // Puts e^(x_t - max) there.
  void put_targets() {
    for (int64_t b = 0; b < lanes; ++b)
      if (index_.get()[b] >= 0) of_class(index_.get()[b])[b] = *at(kTarget, b);
  }
  // sum_c w_c (max - x_c) of each row.
  void add_up_all_classes() {
    for (int64_t v = 0; v < lanes; v += kLanes<T>) {
      vec<T> top = load(of_class(0) + v), sum{};
      for (int64_t c = 1; c < a.classes; ++c) top = max_of(load(of_class(c) + v), top);
      for (int64_t c = 0; c < a.classes; ++c) sum += T(dice_weight<T>(a, c)) * (top - load(of_class(c) + v));
      store(at(kAllClasses, v), sum);
    }
  }

  // Puts `fill` where rows do not count: into p nothing of what they hold may come.
  void clear_uncounted(T fill) {
    for (int64_t v = 0; v < lanes; v += kLanes<T>) {
      const auto counts = index(v) >= 0;
      bool all = true;
      for (int i = 0; i < kLanes<T>; ++i) all &= counts[i] != 0;
      for (int64_t c = 0; !all && c < a.classes; ++c)
        store(of_class(c) + v, counts ? load(of_class(c) + v) : splat(fill));
    }
  }

  // Softmax: x becomes e^(x - max), inverse() of a vector 1 / sum, or 0 where rows do not count. With slopes also
  // dot() of a vector, sum_c p dL/dp.
  template <bool kSlopes>
  void exponentials(const DiceSlopes<T>* slopes) {
    const bool with_targets = !kDense && terms_.any;
    if (with_targets) take_targets(slopes);
    NextTile next(input(), rows, n, a.input_strides.cls, 0, a.classes, a.classes);
    constexpr int64_t kBlock = 64;  // terms are added in blocks of classes
    by_fours<T>(lanes, [&](int64_t v0, auto count) {
      constexpr int k = decltype(count)::value;
      vec<T> ref[k], sum[k], linear[k], square[k];
      for (int i = 0; i < k; ++i) ref[i] = splat(-kInf<T>), sum[i] = linear[i] = square[i] = vec<T>{};
      for (int64_t c = 0; c < a.classes; ++c)
        for (int i = 0; i < k; ++i) ref[i] = max_of(load(of_class(c) + v0 + i * kLanes<T>), ref[i]);
      if (with_targets)
        for (int i = 0; i < k; ++i) ref[i] = max_of(load(at(kTarget, v0 + i * kLanes<T>)), ref[i]);
      for (int i = 0; i < k; ++i) ref[i] = ref[i] > -kInf<T> ? ref[i] : vec<T>{};
      for (int64_t c = 0; c < a.classes;) {
        vec<T> part[k];
        for (int i = 0; i < k; ++i) part[i] = vec<T>{};
        for (const int64_t end = min_of(c + kBlock, a.classes); c < end; ++c)
          for (int i = 0; i < k; ++i) {
            const int64_t v = v0 + i * kLanes<T>;
            next.fetch();
            const vec<T> e = exp_of(load(of_class(c) + v) - ref[i]);
            store(of_class(c) + v, e);
            part[i] += e;
            if constexpr (kSlopes) {
              linear[i] += e * (by_other(slopes[c], c, v) + slopes[c].constant);
              square[i] += e * (e * slopes[c].by_own);
            }
          }
        for (int i = 0; i < k; ++i) sum[i] += part[i];
      }
      for (int i = 0; i < k; ++i) {
        const int64_t v = v0 + i * kLanes<T>;
        const vec<T> others = sum[i];
        if (with_targets) sum[i] += exp_of(load(at(kTarget, v)) - ref[i]);
        const vec<T> inverse = index(v) >= 0 ? T(1) / sum[i] : vec<T>{};
        store(at(kInverse, v), inverse);
        vec<T> dot{};
        if constexpr (kSlopes) dot = inverse * linear[i] + inverse * (inverse * square[i]);
        if constexpr (kSlopes)
          with_targets ? finish_gradient(v, ref[i], others, inverse, dot) : store(at(kDot, v), dot);
        else if (with_targets)
          finish_nll(v, ref[i], others, sum[i]);
      }
    });
    if (with_targets && !kSlopes) put_targets();
  }
  vec<T> inverse(int64_t v) const { return load(at(kInverse, v)); }
  vec<T> dot(int64_t v) const { return load(at(kDot, v)); }

  // Of a vector of rows whose target's logit was taken out: the cross entropy, to kNll; e_t to kTarget. With
  // 1 - p_t = others / sum neither it nor the gradient loses digits where a row is nearly certain.
  void finish_nll(int64_t v, vec<T> ref, vec<T> others, vec<T> sum) {
    const vec<T> past = load(at(kTarget, v)) - ref, e = exp_of(past);
    const vec<T> log_sum = log1p_from(e == T(1) ? others : sum - T(1), sum);
    vec<T> nll = T(1 - a.smoothing) * load(at(kWeight, v)) * (log_sum - past);
    if (a.smoothing != 0) nll += terms_.smooth_share * (terms_.all_weights * log_sum + load(at(kAllClasses, v)));
    store(at(kNll, v), index(v) >= 0 ? nll : vec<T>{});
    store(at(kTarget, v), e);
  }
  // The gradient of the target's class, to kTarget; what the others subtract, to kDot. `dot` is that without the
  // target.
  void finish_gradient(int64_t v, vec<T> ref, vec<T> others, vec<T> inverse, vec<T> dot) {
    const CrossEntropySlopes<T> s = terms_.slopes;
    const vec<T> weight = load(at(kWeight, v)), up = s.target * weight, all = s.rest * s.all_weights + vec<T>{};
    const vec<T> p = exp_of(load(at(kTarget, v)) - ref) * inverse, miss = others * inverse;
    const vec<T> slope = load(at(kSlope, v)) + load(at(kOwnSlope, v)) * p;
    store(at(kTarget, v), p * (slope * miss - dot) - up * miss + (all * p - s.rest * weight));
    store(at(kDot, v), dot + p * slope - (up + all));
  }

  // slope.by_other times t.
  vec<T> by_other(const DiceSlopes<T>& slope, int64_t c, int64_t v) const {
    if constexpr (kDense)
      return slope.by_other * target(c, v);
    else
      return index(v) == lane_int(c) ? splat(slope.by_other) : vec<T>{};
  }

  // Adds the tile's I, P, T of every class to sums[3 c], sums[3 c + 1], sums[3 c + 2], its cross entropy behind them.
  template <bool kSoftmax>
  void add_sums(vec_double* sums) {
    const bool squared = a.squared;
    for (int64_t c = 0; c < a.classes; ++c) {
      const T* const x = of_class(c);
      vec_double intersection = sums[3 * c], prediction = sums[3 * c + 1], area = sums[3 * c + 2];
      by_fours<T>(lanes, [&](int64_t v0, auto count) {
        constexpr int k = decltype(count)::value;
        vec<T> i_sum[k], p_sum[k], t_sum[k];
        ivec<T> hits{};
        for (int i = 0; i < k; ++i) {
          const int64_t v = v0 + i * kLanes<T>;
          const vec<T> p = kSoftmax ? load(x + v) * inverse(v) : load(x + v);
          p_sum[i] = squared ? p * p : p;
          if constexpr (kDense) {
            const vec<T> t = target(c, v);
            i_sum[i] = p * t;
            t_sum[i] = squared ? t * t : t;
          } else {
            const ivec<T> hit = index(v) == lane_int(c);
            i_sum[i] = hit ? p : vec<T>{};
            hits -= hit;
          }
        }
        if constexpr (!kDense) t_sum[0] = __builtin_convertvector(hits, vec<T>);
        auto sum = [](const vec<T>* s) {
          if constexpr (k == 4)
            return widen((s[0] + s[1]) + (s[2] + s[3]));
          else
            return widen(s[0]);
        };
        intersection += sum(i_sum);
        prediction += sum(p_sum);
        area += kDense ? sum(t_sum) : widen(t_sum[0]);
      });
      sums[3 * c] = intersection;
      sums[3 * c + 1] = prediction;
      sums[3 * c + 2] = area;
    }
    if (!kDense && kSoftmax && terms_.any)
      for (int64_t v = 0; v < lanes; v += kLanes<T>) sums[3 * a.classes] += widen(load(at(kNll, v)));
  }

  // put(c, v, g) for every vector of the gradient by x, or by t; after exponentials().
  template <Activation kActivation, class F>
  void gradient(const DiceSlopes<T>* slopes, const F& put) {
    NextTile next(input(), rows, n, a.input_strides.cls, 0, a.classes, a.classes);
    for (int64_t c = 0; c < a.classes; ++c) {
      const T* const x = of_class(c);
      const DiceSlopes<T> slope = slopes[c];
      if (!kDense && kActivation == Activation::softmax && terms_.any) {
        const T smooth = terms_.slopes.rest * T(dice_weight<T>(a, c));
        for (int64_t v = 0; v < lanes; v += kLanes<T>) {
          const vec<T> p = load(x + v) * inverse(v);
          const vec<T> g = p * (slope.constant + p * slope.by_own - dot(v)) - smooth;
          put(c, v, index(v) == lane_int(c) ? load(at(kTarget, v)) : index(v) >= 0 ? g : vec<T>{});
        }
        continue;
      }
      for (int64_t v = 0; v < lanes; v += kLanes<T>) {
        vec<T> p = load(x + v), g;
        if constexpr (kActivation == Activation::softmax) {
          p *= inverse(v);
          g = p * (by_other(slope, c, v) + slope.constant + p * slope.by_own - dot(v));
        } else {
          next.fetch();
          vec<T> of_x = splat(T(1));
          if constexpr (kActivation == Activation::sigmoid) {
            const SigmoidJet<vec<T>> s = sigmoid_jet(p);
            p = s.value;
            of_x = s.slope;
          }
          g = of_x * (by_other(slope, c, v) + slope.constant + p * slope.by_own);
        }
        if constexpr (!kDense) g = index(v) >= 0 ? g : vec<T>{};
        put(c, v, g);
      }
    }
  }
  template <Activation kActivation, class F>
  void target_gradient(const DiceSlopes<T>* slopes, const F& put) {
    for (int64_t c = 0; c < a.classes; ++c)
      for (int64_t v = 0; v < lanes; v += kLanes<T>) {
        vec<T> p = load(of_class(c) + v);
        if constexpr (kActivation == Activation::softmax) p *= inverse(v);
        if constexpr (kActivation == Activation::sigmoid) p = sigmoid_jet(p).value;
        put(c, v, slopes[c].by_other * p + slopes[c].constant + slopes[c].by_own * target(c, v));
      }
  }

  // Writes a gradient: write(put) with the put that brings vectors to `to`, or to the tile and from there to `to`.
  template <class G, class F>
  void store_gradient(G* to, const Strides& strides, bool streamed, const F& write) {
    const Rows at(first, n, a.inner, strides);
    G* const base = to + at[0];
    const int64_t stride = strides.cls, count = n;
    if constexpr (sizeof(accum_t<G>) == sizeof(T)) {
      if (at.step == 1)
        return write([=](int64_t c, int64_t v, vec<T> g) {
          if (v + kLanes<T> > count)
            store_tail(base + c * stride + v, count - v, g);
          else
            streamed ? stream(base + c * stride + v, g) : store(base + c * stride + v, g);
        });
    }
    write([this](int64_t c, int64_t v, vec<T> g) { store(of_class(c) + v, g); });
    if constexpr (sizeof(accum_t<G>) == sizeof(T)) {
      store_tile(base, at, n, stride, a.classes, tile_.get(), shape.pitch);
    } else {
      for (int64_t c = 0; c < a.classes; ++c)
        for (int64_t b = 0; b < n; ++b)
          base[at[b] - at[0] + c * stride] = from_accum<G, accum_t<G>>(accum_t<G>(of_class(c)[b]));
    }
  }

 private:
  template <class V>
  struct Padded : Scratch<V> {
    using Scratch<V>::Scratch;
    V* at(int64_t i) const { return const_cast<Padded*>(this)->get() + i; }
  };
  // What there is of each row. Before a cross entropy's exponentials kTarget is x_t, after them e^(x_t - max), and in
  // backward the gradient of the target's class.
  enum Value { kInverse, kDot, kTarget, kWeight, kSlope, kOwnSlope, kAllClasses = kSlope, kNll = kOwnSlope, kValues };
  T* at(Value value, int64_t b) const { return values_.at(value * shape.pitch + b); }

  Padded<T> tile_, target_tile_, values_;
  Padded<lane_int> index_;
  const CrossEntropyTerms<T> terms_;
};

// body(tile, group, item) for all tiles; item numbers the block. Blocks go to threads; begin(group) and end(item) are
// called around those of a block.
template <bool kDense, class S, class Begin, class Body, class End>
inline void for_each_tile(const DiceLossArgs& a, int64_t begin, int64_t end, const DiceShape& shape,
                          const Begin& begin_block, const Body& body, const End& end_block) {
  DiceTile<kDense, S> tile(a, shape);
  const int64_t rows = a.rows_per_group();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / shape.blocks, from = item % shape.blocks * shape.block;
    begin_block(group);
    tile.bad = -1;
    for (int64_t at = from; at < min_of(rows, from + shape.block); at += shape.tile) {
      tile.load_rows(group * rows + at, min_of(shape.tile, min_of(rows, from + shape.block) - at));
      body(tile);
    }
    end_block(item, tile.bad);
  }
}

template <Activation kActivation, bool kDense, class S>
inline Status dice_forward(const DiceLossArgs& a, ParallelFor parallel_for) {
  using T = accum_t<S>;
  constexpr bool kSoftmax = kActivation == Activation::softmax;
  const DiceShape shape = dice_shape<T>(a);
  const int64_t items = a.groups * shape.blocks, sets = 3 * a.classes + with_cross_entropy(a);
  Scratch<double> parts(items * sets);  // [items, classes, 3] and the cross entropy
  Scratch<int64_t> bad(items);
  parallel(parallel_for, items, grain_for(min_of(shape.block, a.rows_per_group()) * a.classes),
           [&](int64_t begin, int64_t end) {
             Scratch<vec_double> sums(sets);
             for_each_tile<kDense, S>(
                 a, begin, end, shape,
                 [&](int64_t) {
                   for (int64_t i = 0; i < sets; ++i) sums[i] = vec_double{};
                 },
                 [&](auto& tile) {
                   // Uncounted rows: e^0, which inverse() takes out; a sigmoid of 0; 0.
                   tile.clear_uncounted(kActivation == Activation::sigmoid ? -kInf<T> : T(0));
                   if constexpr (kSoftmax) tile.template exponentials<false>(nullptr);
                   if constexpr (kActivation == Activation::sigmoid)
                     for (int64_t c = 0; c < a.classes; ++c)
                       for (int64_t v = 0; v < tile.lanes; v += kLanes<T>)
                         store(tile.of_class(c) + v, sigmoid_jet(load(tile.of_class(c) + v)).value);
                   tile.template add_sums<kSoftmax>(sums.get());
                 },
                 [&](int64_t item, int64_t bad_row) {
                   for (int64_t i = 0; i < sets; ++i) parts[item * sets + i] = sum_lanes<double>(sums[i]);
                   bad[item] = bad_row;
                 });
           });
  for (int64_t i = 0; i < items; ++i)
    if (bad[i] >= 0) return {Status::bad_target, bad[i], load_index(a.target, a.index_type, bad[i])};

  double total = 0, weights = 0;
  int64_t groups = 0;  // that count
  Scratch<double> of_group(sets);
  for (int64_t group = 0; group < a.groups; ++group) {
    const double* const first = parts.get() + group * shape.blocks * sets;
    double counted = a.dense || a.rows_per_group() == 0 ? 1 : 0;
    for (int64_t i = 0; i < sets; ++i) of_group[i] = pairwise_sum(first + i, shape.blocks, sets);
    for (int64_t c = 0; c < a.classes; ++c) counted += of_group[3 * c + 2];
    groups += counted > 0;
    for (int64_t c = 0; c < a.classes; ++c) {
      const double* const sum = &of_group[3 * c];
      const DiceTerm term = counted > 0 ? dice_term(a, sum[0], sum[1], sum[2]) : DiceTerm{0, 0, 0, 0};
      if (a.saved) {
        double* const saved = a.saved + 3 * (group * a.classes + c);
        saved[0] = term.per_intersection;
        saved[1] = term.per_prediction;
        saved[2] = term.per_target;
      }
      const double weight = dice_weight<T>(a, c);
      weights += weight * sum[2];
      if (c < a.first_class) continue;
      total += weight * term.loss;
      if (a.reduction == Reduction::none)
        store_scalar(a.loss, a.loss_type, dice_place(a, group, c), weight * term.loss);
    }
  }
  const double count = dice_count(a, groups);
  if (a.saved) {
    dice_divisors(a)[0] = count;
    dice_divisors(a)[1] = weights;
  }
  if (a.reduction == Reduction::none) return {};
  double loss = dice_reduced(a, total, count);
  if (with_cross_entropy(a))
    loss += cross_entropy_reduced(a, pairwise_sum(parts.get() + sets - 1, items, sets), weights);
  store_scalar(a.loss, a.loss_type, 0, loss);
  return {};
}

template <Activation kActivation, bool kDense, class S>
inline Status dice_backward(const DiceLossArgs& a, ParallelFor parallel_for) {
  using T = accum_t<S>;
  constexpr bool kSoftmax = kActivation == Activation::softmax;
  const DiceShape shape = dice_shape<T>(a);
  const int64_t elements = a.rows() * a.classes;
  const bool streamed = a.grad && elements * int64_t(sizeof(S)) >= kStreamBytes;
  const bool target_streamed = a.grad_target && elements * size_of(a.target_type) >= kStreamBytes;
  parallel(parallel_for, a.groups * shape.blocks, grain_for(min_of(shape.block, a.rows_per_group()) * a.classes),
           [&](int64_t begin, int64_t end) {
             Scratch<DiceSlopes<T>> slopes(a.classes);
             for_each_tile<kDense, S>(
                 a, begin, end, shape,
                 [&](int64_t group) {
                   for (int64_t c = 0; c < a.classes; ++c) {
                     const double up =
                         c < a.first_class ? 0 : load_scalar(a.grad_output, a.loss_type, dice_place(a, group, c));
                     slopes[c] = dice_slopes<T>(a, group, c, dice_weight<T>(a, c), up);
                   }
                 },
                 [&](auto& tile) {
                   if constexpr (kSoftmax) tile.template exponentials<true>(slopes.get());
                   if constexpr (kDense)
                     if (a.grad_target)
                       return with_storage(a.target_type, [&](auto* tag) {
                         using G = typename strip_pointer<decltype(tag)>::type;
                         tile.store_gradient(
                             static_cast<G*>(a.grad_target), a.grad_target_strides, target_streamed,
                             [&](const auto& put) { tile.template target_gradient<kActivation>(slopes.get(), put); });
                       });
                   tile.store_gradient(static_cast<S*>(a.grad), a.grad_strides, streamed, [&](const auto& put) {
                     tile.template gradient<kActivation>(slopes.get(), put);
                   });
                 },
                 [](int64_t, int64_t) {});
             if (streamed || target_streamed) stream_fence();
           });
  return {};
}

// f.run<activation, dense, storage>() for what a call is.
template <class F>
inline Status dice_dispatch(const DiceLossArgs& a, const F& f) {
  return with_storage(a.input_type, [&](auto* tag) {
    using S = typename strip_pointer<decltype(tag)>::type;
    switch (a.activation) {
      case Activation::softmax:
        return a.dense ? f.template run<Activation::softmax, true, S>()
                       : f.template run<Activation::softmax, false, S>();
      case Activation::sigmoid:
        return a.dense ? f.template run<Activation::sigmoid, true, S>()
                       : f.template run<Activation::sigmoid, false, S>();
      default:
        return a.dense ? f.template run<Activation::none, true, S>() : f.template run<Activation::none, false, S>();
    }
  });
}
struct DiceForward {
  const DiceLossArgs& a;
  ParallelFor parallel_for;
  template <Activation kActivation, bool kDense, class S>
  Status run() const {
    return dice_forward<kActivation, kDense, S>(a, parallel_for);
  }
};
struct DiceBackward {
  const DiceLossArgs& a;
  ParallelFor parallel_for;
  template <Activation kActivation, bool kDense, class S>
  Status run() const {
    return dice_backward<kActivation, kDense, S>(a, parallel_for);
  }
};
inline Status dice_loss_forward(const DiceLossArgs& a, ParallelFor f) { return dice_dispatch(a, DiceForward{a, f}); }
inline Status dice_loss_backward(const DiceLossArgs& a, ParallelFor f) { return dice_dispatch(a, DiceBackward{a, f}); }

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
