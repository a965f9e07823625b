// One gathered element per row: nothing to vectorise in forward; backward is a fill and a scatter.
#define FASTLOSS_ISA portable
#include "../common/cpu_support.h"
#include "nll_loss.h"

namespace fastloss {
namespace portable {

struct NllPart {
  double loss, weight;
  int64_t bad;
};

template <class S>
Status nll_forward(const NllLossArgs& a, ParallelFor parallel_for) {
  using T = accum_t<S>;
  const S* x = static_cast<const S*>(a.input);
  const T* weight = static_cast<const T*>(a.weight);
  constexpr int64_t kBlock = 4096;
  const int64_t rows = a.rows(), blocks = (rows + kBlock - 1) / kBlock;
  Scratch<NllPart> parts(blocks > 0 ? blocks : 1);
  auto over_blocks = [&](const auto& row_body) {
    parallel(parallel_for, blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        NllPart p{0, 0, -1};
        for (int64_t row = i * kBlock; row < min_of(rows, (i + 1) * kBlock); ++row) row_body(row, p);
        parts[i] = p;
      }
    });
  };
  // First the targets alone, so that a bad one leaves nothing half done.
  over_blocks([&](int64_t row, NllPart& p) {
    const int64_t t = load_index(a.target, a.index_type, row);
    if (t != a.ignore_index && uint64_t(t) >= uint64_t(a.classes) && p.bad < 0) p.bad = row;
  });
  for (int64_t i = 0; i < blocks; ++i)
    if (parts[i].bad >= 0) return {Status::bad_target, parts[i].bad, load_index(a.target, a.index_type, parts[i].bad)};
  over_blocks([&](int64_t row, NllPart& p) {
    const int64_t t = load_index(a.target, a.index_type, row);
    double loss = 0;
    if (t != a.ignore_index) {
      const double w = weight ? double(weight[t]) : 1.0;
      loss = -w * double(to_accum(x[row / a.inner * a.input_strides.outer + row % a.inner * a.input_strides.inner +
                                    t * a.input_strides.cls]));
      p.weight += w;
      p.loss += loss;
    }
    if (a.reduction == Reduction::none) store_scalar(a.loss, a.loss_type, row, loss + 0.0);
  });
  constexpr int64_t stride = sizeof(NllPart) / sizeof(double);
  const double total = pairwise_sum(&parts[0].loss, blocks, stride);
  const double total_weight = pairwise_sum(&parts[0].weight, blocks, stride);
  if (a.total_weight) *static_cast<T*>(a.total_weight) = T(total_weight);
  if (a.reduction == Reduction::mean) store_scalar(a.loss, a.loss_type, 0, total / total_weight);
  if (a.reduction == Reduction::sum) store_scalar(a.loss, a.loss_type, 0, total);
  return {};
}

template <class S>
Status nll_backward(const NllLossArgs& a, ParallelFor parallel_for) {
  using T = accum_t<S>;
  const T* weight = static_cast<const T*>(a.weight);
  const double total = a.reduction == Reduction::mean ? double(*static_cast<const T*>(a.total_weight)) : 1.0;
  S* grad = static_cast<S*>(a.grad);
  const Strides g = a.grad_strides;
  const auto zero = [](S* p, int64_t n, int64_t stride) {
    if (stride == 1) {
      __builtin_memset(static_cast<void*>(p), 0, size_t(n) * sizeof(S));
    } else {
      for (int64_t i = 0; i < n; ++i) p[i * stride] = S{};
    }
  };
  // Zeros in memory order (the smaller stride innermost), then one element per row. In pieces of the inner axis: a
  // batch of one image is work for all threads too.
  constexpr int64_t kPiece = 4096;
  const int64_t pieces = (a.inner + kPiece - 1) / kPiece;
  const bool class_major = g.cls > g.inner && a.inner > 1;
  parallel(parallel_for, a.outer * pieces, grain_for(a.classes * min_of(a.inner, kPiece)),
           [&](int64_t begin, int64_t end) {
             for (int64_t item = begin; item < end; ++item) {
               const int64_t o = item / pieces, first = item % pieces * kPiece, last = min_of(first + kPiece, a.inner);
               S* p = grad + o * g.outer;
               if (class_major)
                 for (int64_t c = 0; c < a.classes; ++c) zero(p + c * g.cls + first * g.inner, last - first, g.inner);
               else
                 for (int64_t i = first; i < last; ++i) zero(p + i * g.inner, a.classes, g.cls);
               for (int64_t i = first; i < last; ++i) {
                 const int64_t row = o * a.inner + i, t = load_index(a.target, a.index_type, row);
                 // Out of range here only if somebody wrote to the targets after forward had looked: then without
                 // gradient.
                 if (t == a.ignore_index || uint64_t(t) >= uint64_t(a.classes)) continue;
                 const double w = weight ? double(weight[t]) : 1.0;
                 const double up = load_scalar(a.grad_output, a.loss_type, a.grad_output_per_row ? row : 0);
                 p[t * g.cls + i * g.inner] = from_accum<S, double>(-w * up / total);
               }
             }
           });
  return {};
}

}  // namespace portable

Status nll_loss_forward_cpu(const NllLossArgs& a, ParallelFor parallel_for) {
  return portable::with_storage(a.input_type, [&](auto* tag) {
    return portable::nll_forward<typename portable::strip_pointer<decltype(tag)>::type>(a, parallel_for);
  });
}
Status nll_loss_backward_cpu(const NllLossArgs& a, ParallelFor parallel_for) {
  return portable::with_storage(a.input_type, [&](auto* tag) {
    return portable::nll_backward<typename portable::strip_pointer<decltype(tag)>::type>(a, parallel_for);
  });
}

}  // namespace fastloss
