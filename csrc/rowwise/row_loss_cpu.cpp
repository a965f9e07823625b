// Row losses on the CPU: row_loss.h. Partial sums belong to blocks of rows that follow from the shape alone.
#define FASTLOSS_ISA portable
#include "../common/cpu_support.h"
#include "row_losses.h"

namespace fastloss {
namespace portable {

struct RowLossPart {
  double loss, weight;
  int64_t bad;
};

// Adds the terms of `count` elements to the sums.
template <class Loss, class S>
void add_terms(const S* x, int64_t stride, int64_t count, accum_t<S> x_t, const RowParams<accum_t<S>>& p,
               double* sums) {
  constexpr int kLanes = 8;  // sums that do not wait for each other
  double lanes[Loss::sums][kLanes] = {};
  const auto add = [&](int64_t c, int lane) {
    const auto terms = Loss::terms(to_accum(x[c * stride]), x_t, p);
    for (int k = 0; k < Loss::sums; ++k) lanes[k][lane] += double(terms.value[k]);
  };
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) add(c + lane, lane);
  for (; c < count; ++c) add(c, 0);
  for (int k = 0; k < Loss::sums; ++k) sums[k] += pairwise_sum(lanes[k], kLanes, 1);
}

// The loss of a row [classes] with target t, before its weight. The row is looked at where there are sums.
template <class Loss, class S>
FinishedRow finish_row(const RowLossArgs& a, const S* row, int64_t t, accum_t<S> x_t) {
  using T = accum_t<S>;
  const int64_t stride = a.input_strides.cls;
  double sums[Loss::sums + 1] = {};
  if constexpr (Loss::sums > 0) {
    const RowParams<T> p = row_params<T>(a);
    add_terms<Loss>(row, stride, t, x_t, p, sums);
    add_terms<Loss>(row + (t + 1) * stride, stride, a.classes - t - 1, x_t, p, sums);
  }
  return Loss::finish(sums, double(x_t), double(a.classes), row_params<double>(a));
}

template <class S>
S* row_of(S* x, const Strides& s, int64_t row, int64_t inner) {
  return x + row / inner * s.outer + row % inner * s.inner;
}

// The rows from `first` on, one after the other.
template <class S>
struct RowWalk {
  const S* at;
  int64_t place, inner;
  Strides strides;

  RowWalk(const S* x, const Strides& s, int64_t first, int64_t inner)
      : at(row_of(x, s, first, inner)), place(first % inner), inner(inner), strides(s) {}
  void next() {
    at += strides.inner;
    if (++place == inner) place = 0, at += strides.outer - inner * strides.inner;
  }
};

template <class Loss, class S>
Status row_loss_forward(const RowLossArgs& a, ParallelFor parallel_for) {
  using T = accum_t<S>;
  const S* x = static_cast<const S*>(a.input);
  const T* weight = static_cast<const T*>(a.weight);
  constexpr int64_t kRows = 4096, kElements = 65536;
  const int64_t block = Loss::sums == 0 ? kRows : clamp_to(kElements / (a.classes + 1), 1, kRows);
  const int64_t rows = a.rows(), blocks = (rows + block - 1) / block;
  Scratch<RowLossPart> parts(blocks > 0 ? blocks : 1);
  // What a block adds up. A bad target ends it: nobody will look at what has been stored.
  const RowLossArgs call = a;  // a copy, which no store can change
  const int64_t cls = call.input_strides.cls;
  const auto block_of = [&](const auto* target, int64_t first, int64_t last) {
    RowLossPart p{0, 0, -1};
    RowWalk<S> walk(x, call.input_strides, first, call.inner);
    for (int64_t row = first; row < last; ++row, walk.next()) {
      const int64_t t = int64_t(target[row]);
      double loss = 0;
      if (call.counts(t)) {
        if (!call.has_class(t)) {
          p.bad = row;
          return p;
        }
        const double w = weight ? double(weight[t]) : 1.0;
        loss = w * finish_row<Loss>(call, walk.at, t, to_accum(walk.at[t * cls])).value;
        p.weight += call.mean_over_rows ? 1 : w;
        p.loss += loss;
      }
      if (call.reduction == Reduction::none) store_scalar(call.loss, call.loss_type, row, loss + 0.0);
    }
    return p;
  };
  // The same of a loss of x_t alone that is summed up, in as few instructions as there can be: each element is a miss,
  // and the processor waits for as many of them at a time as there are rows in its window.
  const auto sums_of = [&](auto weighted, const auto* target, int64_t first, int64_t last) {
    const bool over_rows = call.mean_over_rows, ignores = call.ignores;
    const int64_t ignored = call.ignore_index, inner = call.inner;
    const uint64_t classes = uint64_t(call.classes);
    const int64_t step = inner == 1 ? call.input_strides.outer : call.input_strides.inner;
    double loss = 0, total = 0;
    for (int64_t begin = first, end; begin < last; begin = end) {
      end = inner == 1 ? last : min_of(last, (begin / inner + 1) * inner);
      const S* at = row_of(x, call.input_strides, begin, inner);
      for (int64_t row = begin; row < end; ++row, at += step) {
        const int64_t t = int64_t(target[row]);
        if (t == ignored && ignores) continue;
        if (uint64_t(t) >= classes) return RowLossPart{0, 0, row};
        const double w = decltype(weighted)::value ? double(weight[t]) : 1.0;
        loss += w * finish_row<Loss, S>(call, nullptr, t, to_accum(at[t * cls])).value;
        total += over_rows ? 1.0 : w;
      }
    }
    return RowLossPart{loss, total, -1};
  };
  const auto part_of = [&](const auto* target, int64_t first, int64_t last) {
    if constexpr (Loss::sums == 0)
      if (call.reduction != Reduction::none)
        return weight ? sums_of(constant<true>{}, target, first, last)
                      : sums_of(constant<false>{}, target, first, last);
    return block_of(target, first, last);
  };
  with_index(a.index_type, [&](auto* tag) {
    const auto* target = static_cast<decltype(tag)>(a.target);
    parallel(parallel_for, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) parts[i] = part_of(target, i * block, min_of(rows, (i + 1) * block));
    });
  });
  for (int64_t i = 0; i < blocks; ++i)
    if (parts[i].bad >= 0) return {Status::bad_target, parts[i].bad, load_index(a.target, a.index_type, parts[i].bad)};
  constexpr int64_t stride = sizeof(RowLossPart) / sizeof(double);
  const double total = pairwise_sum(&parts[0].loss, blocks, stride);
  const double total_weight = pairwise_sum(&parts[0].weight, blocks, stride);
  if (a.total_weight) *static_cast<T*>(a.total_weight) = T(total_weight);
  if (a.reduction == Reduction::mean) store_scalar(a.loss, a.loss_type, 0, total / total_weight);
  if (a.reduction == Reduction::sum) store_scalar(a.loss, a.loss_type, 0, total);
  return {};
}

template <class S>
void fill_zero(S* p, int64_t n, int64_t stride) {
  if (stride == 1) {
    __builtin_memset(static_cast<void*>(p), 0, size_t(n) * sizeof(S));
  } else {
    for (int64_t i = 0; i < n; ++i) p[i * stride] = S{};
  }
}

template <class Loss, class S>
Status row_loss_backward(const RowLossArgs& a, ParallelFor parallel_for) {
  using T = accum_t<S>;
  const S* x = static_cast<const S*>(a.input);
  const T* weight = static_cast<const T*>(a.weight);
  const double total = a.reduction == Reduction::mean ? double(*static_cast<const T*>(a.total_weight)) : 1.0;
  S* grad = static_cast<S*>(a.grad);
  const Strides g = a.grad_strides;
  // v w_t grad_output / D; 0 stays 0, whatever grad_output is.
  const auto scaled = [&](double v, int64_t t, int64_t row) {
    if (v == 0) return 0.0;
    const double w = weight ? double(weight[t]) : 1.0;
    return v * w * load_scalar(a.grad_output, a.loss_type, a.grad_output_per_row ? row : 0) / total;
  };
  // -1: without gradient. Out of range here only if somebody wrote to the targets after forward had looked.
  const auto target_of = [&](int64_t row) {
    const int64_t t = load_index(a.target, a.index_type, row);
    return a.counts(t) && a.has_class(t) ? t : -1;
  };
  if constexpr (Loss::sums == 0) {
    // Zeros in memory order (the smaller stride innermost), then one element per row. In pieces of the inner axis: a
    // batch of one image is work for all threads too.
    constexpr int64_t kPiece = 4096;
    const int64_t pieces = (a.inner + kPiece - 1) / kPiece;
    const bool class_major = g.cls > g.inner && a.inner > 1;
    const int64_t grain = grain_for(a.classes * min_of(a.inner, kPiece));
    parallel(parallel_for, a.outer * pieces, grain, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t o = item / pieces, first = item % pieces * kPiece, last = min_of(first + kPiece, a.inner);
        S* p = grad + o * g.outer;
        if (class_major)
          for (int64_t c = 0; c < a.classes; ++c) fill_zero(p + c * g.cls + first * g.inner, last - first, g.inner);
        else
          for (int64_t i = first; i < last; ++i) fill_zero(p + i * g.inner, a.classes, g.cls);
        for (int64_t i = first; i < last; ++i) {
          const int64_t row = o * a.inner + i, t = target_of(row);
          if (t < 0) continue;
          T x_t = 0;
          if constexpr (!Loss::linear)
            x_t = to_accum(row_of(x, a.input_strides, row, a.inner)[t * a.input_strides.cls]);
          const double at = finish_row<Loss, S>(a, nullptr, t, x_t).at_target;
          p[t * g.cls + i * g.inner] = from_accum<S, double>(scaled(at, t, row));
        }
      }
    });
  } else {
    const RowParams<T> p = row_params<T>(a);
    parallel(parallel_for, a.rows(), grain_for(a.classes), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t t = target_of(row);
        S* to = row_of(grad, g, row, a.inner);
        if (t < 0) {
          fill_zero(to, a.classes, g.cls);
          continue;
        }
        const S* elements = row_of(x, a.input_strides, row, a.inner);
        const T x_t = to_accum(elements[t * a.input_strides.cls]);
        const FinishedRow finished = finish_row<Loss>(a, elements, t, x_t);
        const T factor = T(scaled(finished.factor, t, row));
        for (int64_t c = 0; c < a.classes; ++c) {
          const T slope = Loss::slope(to_accum(elements[c * a.input_strides.cls]), x_t, p);
          to[c * g.cls] = from_accum<S, T>(slope == T(0) ? T(0) : slope * factor);
        }
        to[t * g.cls] = from_accum<S, double>(scaled(finished.at_target, t, row));
      }
    });
  }
  return {};
}

// run(loss, tag) for the loss and the storage type of the arguments.
template <class F>
Status dispatch(const RowLossArgs& a, const F& run) {
  Status status;
  with_row_loss(RowLosses{}, a.kind,
                [&](auto loss) { status = with_storage(a.input_type, [&](auto* tag) { return run(loss, tag); }); });
  return status;
}

}  // namespace portable

Status row_loss_forward_cpu(const RowLossArgs& a, ParallelFor parallel_for) {
  return portable::dispatch(a, [&](auto loss, auto* tag) {
    return portable::row_loss_forward<decltype(loss), typename portable::strip_pointer<decltype(tag)>::type>(
        a, parallel_for);
  });
}
Status row_loss_backward_cpu(const RowLossArgs& a, ParallelFor parallel_for) {
  return portable::dispatch(a, [&](auto loss, auto* tag) {
    return portable::row_loss_backward<decltype(loss), typename portable::strip_pointer<decltype(tag)>::type>(
        a, parallel_for);
  });
}

}  // namespace fastloss
