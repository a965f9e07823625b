// How a kernel reports a bad target; see errors_cuda.h.
#pragma once
#include "errors_cuda.h"
#include "primitives.cuh"

namespace fastloss {

// The first one to come writes; the others find the record taken.
__device__ __forceinline__ void record_bad_target(BadTargetRecord* shared, int64_t row, int64_t value,
                                                  int32_t what = 0) {
  if (!shared || atomicCAS(&shared->state, 0, 1) != 0) return;
  volatile BadTargetRecord* record = shared;
  record->row = row;
  record->value = value;
  record->what = what;
  system_fence();  // the contents before the state that announces them
  record->state = 2;
}

}  // namespace fastloss
