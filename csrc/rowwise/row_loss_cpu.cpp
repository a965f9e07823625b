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

// The loss of a row [classes] with target t, before its weight.
template <class Loss, class S>
FinishedRow finish_row(const RowLossArgs& a, const S* row, int64_t t) {
  using T = accum_t<S>;
  const int64_t stride = a.input_strides.cls;
  const T x_t = Loss::linear && !row ? T(0) : to_accum(row[t * stride]);
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

template <class Loss, class S>
Status row_loss_forward(const RowLossArgs& a, ParallelFor parallel_for) {
  using T = accum_t<S>;
  const S* x = static_cast<const S*>(a.input);
  const T* weight = static_cast<const T*>(a.weight);
  constexpr int64_t kRows = 4096, kElements = 65536;
  const int64_t block = Loss::sums == 0 ? kRows : clamp_to(kElements / (a.classes + 1), 1, kRows);
  const int64_t rows = a.rows(), blocks = (rows + block - 1) / block;
  Scratch<RowLossPart> parts(blocks > 0 ? blocks : 1);
  auto over_blocks = [&](const auto& row_body) {
    parallel(parallel_for, blocks, Loss::sums == 0 ? 4 : 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        RowLossPart p{0, 0, -1};
        for (int64_t row = i * block; row < min_of(rows, (i + 1) * block); ++row) row_body(row, p);
        parts[i] = p;
      }
    });
  };
  // First the targets alone, so that a bad one leaves nothing half done.
  over_blocks([&](int64_t row, RowLossPart& p) {
    const int64_t t = load_index(a.target, a.index_type, row);
    if (a.counts(t) && !a.has_class(t) && p.bad < 0) p.bad = row;
  });
  for (int64_t i = 0; i < blocks; ++i)
    if (parts[i].bad >= 0) return {Status::bad_target, parts[i].bad, load_index(a.target, a.index_type, parts[i].bad)};
  over_blocks([&](int64_t row, RowLossPart& p) {
    const int64_t t = load_index(a.target, a.index_type, row);
    double loss = 0;
    if (a.counts(t)) {
      const double w = weight ? double(weight[t]) : 1.0;
      loss = w * finish_row<Loss>(a, row_of(x, a.input_strides, row, a.inner), t).value;
      p.weight += a.mean_over_rows ? 1 : w;
      p.loss += loss;
    }
    if (a.reduction == Reduction::none) store_scalar(a.loss, a.loss_type, row, loss + 0.0);
  });
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
          const S* elements = Loss::linear ? nullptr : row_of(x, a.input_strides, row, a.inner);
          const double at = finish_row<Loss>(a, elements, t).at_target;
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
        const FinishedRow finished = finish_row<Loss>(a, elements, t);
        const T factor = T(scaled(finished.factor, t, row)), x_t = to_accum(elements[t * a.input_strides.cls]);
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
