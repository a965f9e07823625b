// Cross entropy on the CPU, generic over dtype, target and instruction set. Included by cross_entropy_<isa>.cpp.
//
// Two ways through memory, chosen by layout (cross_entropy_cpu_policy.h):
//   cross_entropy_cpu_row_path.h    classes contiguous and not few: vectors along the classes
//   cross_entropy_cpu_tile_path.h   anything else: vectors along the rows
// Both are bound by the exponentials as much as by memory, so that those of the statistics are kept (L1/L2) for the
// gradient, which then takes a multiplication per element.
//
// Work is cut into batches of rows by shape alone; each adds its rows in order and batches are added pairwise, so the
// result does not depend on the number of threads. What is O(1) per row is done for a batch at a time, in vectors.
#pragma once
#include "cross_entropy_cpu_row_path.h"
#include "cross_entropy_cpu_tile_path.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// D, Dn and the first bad index, from the targets alone, before anything is written.
template <class T>
inline Status denominators(const CrossEntropyArgs& a, ParallelFor parallel_for, Denominators* d) {
  const T* weight = static_cast<const T*>(a.weight);  // of all classes
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
          auto outside = [&](int64_t row) { return uint64_t(int64_t(target[row])) >= uint64_t(a.all_classes()); };
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

// dL/dp_c = u (1 - e) w_c (lse - z_c), for a probability target; with a row map see row_maps.h.
template <bool kTransform, class S>
inline void target_gradient(const CallConstants<accum_t<S>>& call, int64_t begin, int64_t end) {
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
        if (call.mapped) g = scale * (call.slope[row] * (log_sum - (z - call.ref[row])) + call.level[row]);
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
inline void run_batches(const CallConstants<accum_t<S>>& call, ParallelFor parallel_for, LossSums* total) {
  using T = accum_t<S>;
  const CrossEntropyArgs& a = call.a;
  const bool by_rows = takes_row_path(a);
  const bool keep = by_rows && a.grad && !call.backward && a.classes * int64_t(sizeof(T)) <= kKeptBytes;
  const TileShape shape = by_rows ? TileShape{clamp_to(8192 / a.classes, 1, 64), 0, 0} : tile_shape<T>(a);
  const int64_t batches = (a.rows() + shape.rows - 1) / shape.rows;
  Scratch<LossSums> parts(batches > 0 ? batches : 1);
  parallel(parallel_for, batches, grain_for(shape.rows * a.classes), [&](int64_t begin, int64_t end) {
    RowBatch<T> s(shape.rows);
    Tiles<T> tiles(shape, a.soft, call.streamed);
    KeptRows<T> exps(keep ? shape.rows : 0, a.classes);
    for (int64_t i = begin; i < end; ++i) {
      parts[i] = LossSums{};
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
  constexpr int64_t stride = sizeof(LossSums) / sizeof(double);
  auto sum = [&](const double* first) { return pairwise_sum(first, batches, stride); };
  *total = {sum(&parts[0].nll), sum(&parts[0].smooth), sum(&parts[0].z), sum(&parts[0].correct)};
}

template <class S>
inline void run(const CallConstants<accum_t<S>>& call, ParallelFor parallel_for, LossSums* total) {
  const CrossEntropyArgs& a = call.a;
  const bool transform = a.softcap > 0 || a.logit_scale != 1 || a.has_margin();
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
  CallConstants<T> call(a, /*is_backward=*/false);
  Status status = denominators<T>(a, parallel_for, &call.d);
  if (status.code != Status::ok) return status;
  if (a.normalizer) call.d.weight = call.d.count = *a.normalizer;
  LossSums total;
  run<S>(call, parallel_for, &total);
  if (a.stats) return {};
  if (a.saved) {
    T* d = static_cast<T*>(a.saved) + a.saved_count() - 2;
    d[0] = T(call.d.weight);
    d[1] = T(call.d.count);
  }
  const bool nothing = a.all_ignored_zero && call.d.counted == 0;
  // e / C sum_c ... over no classes is 0 inf, whether a row counts or not, as in torch.
  const bool without_classes = a.classes == 0 && a.label_smoothing > 0 && !a.soft;
  if (a.loss && a.reduction == Reduction::none && without_classes)
    for (int64_t row = 0; row < a.rows(); ++row) store_scalar(a.loss, a.loss_type, row, kNan<double>);
  if (a.loss && a.reduction != Reduction::none) {
    const bool mean = a.reduction == Reduction::mean;
    if (without_classes) total.smooth = kNan<double>;
    const double loss =
        reduced_loss(total, mean, a.label_smoothing > 0 && !a.soft, a.z_loss != 0, call.d.weight, call.d.count);
    store_scalar(a.loss, a.loss_type, 0, mean && nothing ? 0 : loss);
  }
  if (a.accuracy) *a.accuracy = nothing ? 0.f : float(total.correct / double(call.d.counted));
  return {};
}

template <class S>
inline Status backward(const CrossEntropyArgs& a, ParallelFor parallel_for) {
  using T = accum_t<S>;
  CallConstants<T> call(a, /*is_backward=*/true);
  const T* d = static_cast<const T*>(a.saved) + a.saved_count() - 2;
  call.d.weight = double(d[0]);
  call.d.count = double(d[1]);
  LossSums unused;
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
