// See scale_grad.h. Included once per instruction set.
#pragma once
#include "cpu_support.h"

namespace fastloss {
namespace FASTLOSS_ISA {

inline void scale_grad(const void* grad, void* out, DType type, int64_t count, double scale, ParallelFor parallel_for) {
  if (scale == 1 && grad == out) return;
  with_storage(type, [&](auto* tag) {
    using S = typename strip_pointer<decltype(tag)>::type;
    using T = accum_t<S>;
    parallel(parallel_for, count, grain_for(1), [&](int64_t begin, int64_t end) {
      const S* in = static_cast<const S*>(grad);
      S* to = static_cast<S*>(out);
      const T factor = T(scale);
      if (!(scale - scale == 0)) {  // an infinite or nan scale leaves the zeros of ignored rows alone, as torch does
        for (int64_t i = begin; i < end; ++i)
          to[i] = to_accum(in[i]) == T(0) ? in[i] : from_accum<S, T>(to_accum(in[i]) * factor);
        return;
      }
      int64_t i = begin;
      constexpr int64_t kLine = kLineBytes / int64_t(sizeof(S)), kStep = kLanes<T> > kLine ? kLanes<T> : kLine;
      for (; i + kStep <= end; i += kStep) {
        read_ahead(in + i);
        for (int64_t v = i; v < i + kStep; v += kLanes<T>) store(to + v, load(in + v) * factor);
      }
      for (; i < end; ++i) to[i] = from_accum<S, T>(to_accum(in[i]) * factor);
    });
  });
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
