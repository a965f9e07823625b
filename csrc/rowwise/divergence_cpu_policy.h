// Which way through memory divergences take on the CPU: a pure function of the problem.
#pragma once
#include "cross_entropy_cpu_policy.h"
#include "divergence.h"

namespace fastloss {

// Row path or tile path, see divergence_cpu_kernel.h. Always inline, as cross entropy's.
[[gnu::always_inline]] inline bool takes_row_path(const DivergenceArgs& a) {
  const DivergenceOperand* operands[] = {&a.p, &a.q};
  for (const DivergenceOperand* o : operands)
    if (o->strides.cls != 1 || (o->grad && o->grad_strides.cls != 1)) return false;
  return a.classes >= (a.accum() == DType::f64 ? kRowPathClassesF64 : kRowPathClasses);
}

}  // namespace fastloss
