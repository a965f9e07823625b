// Gradient of log-probabilities and entropies on the CPU: see token_log_probs.h. Included once per instruction set.
//
// Row path: classes contiguous and not few, vectors along the classes. Tile path: anything else, rows laid out as
// [classes, rows] in L1, a few classes at a time, vectors along the rows. Both as in cross entropy; 1 read and 1 write.
#pragma once
#include "cross_entropy_cpu_tile_path.h"
#include "token_log_probs.h"

namespace fastloss {
namespace FASTLOSS_ISA {

constexpr int64_t kTokenTileRows = 128, kTokenTileClasses = 32;

template <class T>
inline RowConstants<T> token_constants(const TokenLogProbsArgs& a) {
  RowConstants<T> k{};
  k.logit_scale = T(a.logit_scale);
  k.softcap = T(a.softcap);
  k.inv_softcap = T(a.softcap > 0 ? 1 / a.softcap : 0);
  return k;
}

// What the gradient of a row is made of; false where it is 0 whatever the logits are.
template <bool kTransform, class S>
inline bool token_row_of(const TokenLogProbsArgs& a, const RowConstants<accum_t<S>>& k, int64_t row, const S* x,
                         TokenRow<accum_t<S>>* r) {
  using T = accum_t<S>;
  const int64_t rows = a.outer * a.inner, given = load_index(a.index, a.index_type, row);
  const bool counts = given != a.ignore_index && uint64_t(given) < uint64_t(a.classes);
  const int64_t index = counts ? given : -1;
  const T u = counts && a.grad_log_prob ? static_cast<const T*>(a.grad_log_prob)[row] : T(0);
  const T v = a.grad_entropy ? static_cast<const T*>(a.grad_entropy)[row] : T(0);
  if (u == T(0) && v == T(0)) return false;
  const T *ref = static_cast<const T*>(a.saved), *others = ref + rows;
  const T z_t = counts ? transform_scalar<kTransform, T>(k, T(to_accum(x[index * a.logits_strides.cls]))) : -kInf<T>;
  const T d_t = z_t - ref[row], e_t = exp_of_scalar(d_t);
  const T log_sum = log_scalar(others[row] + e_t);
  const T entropy = a.entropy ? static_cast<const T*>(a.entropy)[row] : T(0);
  *r = token_row(index, ref[row], others[row], d_t, e_t, log_sum, entropy, u, v);
  if constexpr (kTransform) r->at_index *= transform_slope(k, splat(z_t))[0];
  return true;
}

// The gradient of a vector of logits, but for the index's own.
template <bool kTransform, class T>
inline vec<T> token_gradient(const RowConstants<T>& k, vec<T> x, vec<T> ref, vec<T> constant, vec<T> by_distance) {
  const vec<T> z = transform<kTransform, T>(k, x), d = z - ref, e = exp_of(d);
  vec<T> g = e == T(0) ? constant - constant : e * (constant + by_distance * d);
  if constexpr (kTransform) g *= transform_slope(k, z);
  return g;
}

template <bool kTransform, class S>
inline void token_row_path(const TokenLogProbsArgs& a, bool streamed, int64_t begin, int64_t end) {
  using T = accum_t<S>;
  const RowConstants<T> k = token_constants<T>(a);
  const Rows from(begin, end - begin, a.inner, a.logits_strides), to(begin, end - begin, a.inner, a.grad_strides);
  for (int64_t b = 0; b < end - begin; ++b) {
    const S* x = static_cast<const S*>(a.logits) + from[b];
    S* grad = static_cast<S*>(a.grad) + to[b];
    TokenRow<T> r{};
    const bool any = token_row_of<kTransform, S>(a, k, begin + b, x, &r);
    const vec<T> ref = splat(r.ref), constant = splat(r.constant), by_distance = splat(r.by_distance);
    auto gradient = [&](int64_t i, int64_t n) {
      if (!any) return vec<T>{};
      read_ahead(x + i);
      vec<T> g = token_gradient<kTransform, T>(k, load_n(x + i, n, T(0)), ref, constant, by_distance);
      if (uint64_t(r.index - i) < uint64_t(n)) g[r.index - i] = r.at_index;
      return g;
    };
    auto edge = [&](int64_t first, int64_t last) __attribute__((noinline)) {
      for_vectors<T>(first, last, [&](int64_t i, int64_t n) { store_n(grad + i, n, gradient(i, n)); });
    };
    // Stores past the caches take whole lines.
    const int64_t unit = streamed ? kLineBytes / int64_t(sizeof(S)) : kLanes<T>;
    const int64_t first = streamed ? min_of(int64_t(-uintptr_t(grad) % kLineBytes / sizeof(S)), a.classes) : 0;
    const int64_t last = first + (a.classes - first) / unit * unit;
    if (first > 0) edge(0, first);
    for (int64_t i = first; i < last; i += kLanes<T>)
      streamed ? stream(grad + i, gradient(i, kLanes<T>)) : store(grad + i, gradient(i, kLanes<T>));
    if (last < a.classes) edge(last, a.classes);
  }
  if (streamed) stream_fence();
}

template <bool kTransform, class S>
inline void token_tile_path(const TokenLogProbsArgs& a, int64_t begin, int64_t end) {
  using T = accum_t<S>;
  const RowConstants<T> k = token_constants<T>(a);
  constexpr int64_t pitch = kTokenTileRows + kLanes<T>;
  Scratch<T> tile(kTokenTileClasses * pitch), values(4 * pitch);
  Scratch<TokenRow<T>> row(kTokenTileRows);
  T *const ref = values.get(), *const constant = ref + pitch, *const by_distance = constant + pitch;
  T* const matters = by_distance + pitch;  // 0: the gradient of the row is 0, whatever its logits
  const int64_t rows = a.outer * a.inner;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * kTokenTileRows, n = min_of(kTokenTileRows, rows - first), lanes = round_up(n, kLanes<T>);
    const Rows from(first, n, a.inner, a.logits_strides), to(first, n, a.inner, a.grad_strides);
    const S* logits = static_cast<const S*>(a.logits);
    for (int64_t b = 0; b < lanes; ++b) {
      TokenRow<T> r{};
      r.index = -1;
      const bool any = b < n && token_row_of<kTransform, S>(a, k, first + b, logits + from[b], &r);
      matters[b] = T(any);
      ref[b] = r.ref;
      constant[b] = r.constant;
      by_distance[b] = r.by_distance;
      if (b < n) row[b] = r;
    }
    for (int64_t c0 = 0; c0 < a.classes; c0 += kTokenTileClasses) {
      const int64_t classes = min_of(kTokenTileClasses, a.classes - c0);
      load_tile(logits, from, n, a.logits_strides.cls, c0, classes, tile.get(), pitch);
      for (int64_t c = 0; c < classes; ++c)
        for (int64_t v = 0; v < lanes; v += kLanes<T>) {
          T* at = tile.get() + c * pitch + v;
          const vec<T> g =
              token_gradient<kTransform, T>(k, load(at), load(ref + v), load(constant + v), load(by_distance + v));
          store(at, load(matters + v) == T(0) ? vec<T>{} : g);
        }
      for (int64_t b = 0; b < n; ++b)
        if (uint64_t(row[b].index - c0) < uint64_t(classes)) tile[(row[b].index - c0) * pitch + b] = row[b].at_index;
      S* grad = static_cast<S*>(a.grad) + to[0] + c0 * a.grad_strides.cls;
      if (to.step == 1) {
        for (int64_t c = 0; c < classes; ++c)
          for_vectors<T>(0, n, [&](int64_t b, int64_t m) {
            store_n(grad + c * a.grad_strides.cls + b, m, load(tile.get() + c * pitch + b));
          });
      } else {
        store_tile(grad, to, n, a.grad_strides.cls, classes, tile.get(), pitch);
      }
    }
  }
}

template <bool kTransform, class S>
inline void token_backward(const TokenLogProbsArgs& a, ParallelFor parallel_for) {
  const int64_t rows = a.outer * a.inner, row_bytes = a.classes * int64_t(sizeof(S));
  const int64_t few = sizeof(S) == 8 ? kRowPathClassesF64 : kRowPathClasses;
  if (a.logits_strides.cls == 1 && a.grad_strides.cls == 1 && a.classes >= few) {
    const bool streamed = rows * row_bytes >= kStreamBytes && row_bytes >= kStreamRowBytes;
    parallel(parallel_for, rows, grain_for(a.classes),
             [&](int64_t begin, int64_t end) { token_row_path<kTransform, S>(a, streamed, begin, end); });
  } else {
    parallel(parallel_for, (rows + kTokenTileRows - 1) / kTokenTileRows, grain_for(a.classes * kTokenTileRows),
             [&](int64_t begin, int64_t end) { token_tile_path<kTransform, S>(a, begin, end); });
  }
}

inline Status token_log_probs_backward(const TokenLogProbsArgs& a, ParallelFor parallel_for) {
  with_storage(a.logits_type, [&](auto* tag) {
    using S = typename strip_pointer<decltype(tag)>::type;
    if (a.softcap > 0 || a.logit_scale != 1)
      token_backward<true, S>(a, parallel_for);
    else
      token_backward<false, S>(a, parallel_for);
  });
  return {};
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
