// Fewer and longer axes: the index space of a pointwise call in its simplest form. Pure, no torch.
#pragma once
#include "pointwise.h"

namespace fastloss {

template <class F>
void for_each_operand(PointwiseArgs& a, const F& f) {
  for (PointwiseOperand& o : a.operands)
    if (o.data) f(o);
  for (PointwiseOperand& o : a.grads)
    if (o.data) f(o);
  for (PointwiseOperand* o : {&a.weight, &a.mask, &a.loss_elements, &a.multiplier})
    if (o->data) f(*o);
}

// Axes in the order of the memory of the first two operands, axes of size 1 left out, adjacent ones that every operand
// walks as one merged. Rows keep their order, since results are numbered by them.
inline void coalesce(PointwiseArgs& a) {
  bool flat = true;  // the usual call, quickly
  for_each_operand(a, [&](PointwiseOperand& o) { flat = flat && is_flat(a, o); });
  if (flat) {
    a.dim = 1;
    a.sizes[0] = a.count();
    for_each_operand(a, [&](PointwiseOperand& o) { o.strides[0] = 1; });
    return;
  }
  auto swap_axes = [&](int i, int j) {
    const int64_t size = a.sizes[i];
    a.sizes[i] = a.sizes[j];
    a.sizes[j] = size;
    for_each_operand(a, [&](PointwiseOperand& o) {
      const int64_t stride = o.strides[i];
      o.strides[i] = o.strides[j];
      o.strides[j] = stride;
    });
  };
  auto step = [&](int i) {  // one of the two may be broadcast along the axis
    const int64_t x = a.operands[0].strides[i], t = a.operands[1].strides[i];
    return x > t ? x : t;
  };
  for (int i = a.row_dims + 1; i < a.dim; ++i)
    for (int j = i; j > a.row_dims && step(j) > step(j - 1); --j) swap_axes(j, j - 1);

  int kept = 0;
  for (int k = 0; k < a.dim; ++k) {
    const int64_t size = a.sizes[k];
    if (size == 1) continue;
    bool merges = kept > 0;
    for_each_operand(a, [&](PointwiseOperand& o) { merges = merges && o.strides[kept - 1] == o.strides[k] * size; });
    const int to = merges ? kept - 1 : kept++;
    a.sizes[to] = merges ? a.sizes[to] * size : size;
    for_each_operand(a, [&](PointwiseOperand& o) { o.strides[to] = o.strides[k]; });
  }
  a.dim = kept;
}

}  // namespace fastloss
