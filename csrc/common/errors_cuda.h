// Bad targets, and values outside the domain of an operand, found by kernels and reported without a synchronisation:
// the first one since the last take() writes its row and value into a record in host memory that the device sees.
// Torch-free, no CUDA headers.
#pragma once
#include "types.h"

namespace fastloss {

struct BadTargetRecord {
  int32_t state;  // 0 empty, 1 being written, 2 complete
  int32_t what;   // 0: a class index; else see outside_domain in pointwise.h
  int64_t row;
  int64_t value;
};

// The record as the device sees it, allocated on first use, one for the process (legal while a stream is being
// captured). Null when the allocation failed; *status says why.
BadTargetRecord* bad_target_record_cuda(Status* status);
// True when a complete record is there. Reads host memory, never waits for the device.
bool bad_target_peek_cuda();
// The record as Status::bad_target, and the record emptied; ok when there is none. *what, if wanted, is the record's.
Status bad_target_take_cuda(int32_t* what = nullptr);

}  // namespace fastloss
