// Which way through memory cross entropy takes on the CPU: a pure function of the problem.
#pragma once
#include "cross_entropy.h"

namespace fastloss {

// Classes fewer than this go through tiles even when they are contiguous: a row of them is a few vectors, with a
// maximum, a sum and a tail each. Measured; rows of doubles are transposed one by one and leave tiles earlier.
constexpr int64_t kRowPathClasses = 96, kRowPathClassesF64 = 32;

// Row path (vectors along the classes) or tile path (vectors along the rows), see cross_entropy_cpu_kernel.h. Always
// inline: a copy that was compiled for AVX-512 could be linked for everybody.
[[gnu::always_inline]] inline bool takes_row_path(const CrossEntropyArgs& a) {
  const bool contiguous =
      a.logits_strides.cls == 1 && (!a.grad || a.grad_strides.cls == 1) && (!a.soft || a.target_strides.cls == 1);
  return contiguous && a.classes >= (a.logits_type == DType::f64 ? kRowPathClassesF64 : kRowPathClasses);
}

}  // namespace fastloss
