// Cross entropy on the GPU: the interface to the launchers. Torch-free, no CUDA headers.
#pragma once
#include "../common/cuda_context.h"
#include "cross_entropy.h"
#include "cross_entropy_policy.h"

namespace fastloss {

// A call with its axes merged, and the launch that takes it: made once, before the workspace is allocated.
struct CrossEntropyPlan {
  CrossEntropyArgs a;
  Pass pass;
  RowwiseConfig config;
  bool finish = false;  // the kernel sums something up over all rows
  bool totals = false;  // the totals kernel runs first
  // Scratch that the call needs on the device, 16-byte aligned; need not be initialised, may be reused by the next call
  // on the same stream.
  int64_t workspace_bytes = 0;
};
CrossEntropyPlan cross_entropy_plan_cuda(const CrossEntropyArgs& a, const CudaContext& context, bool backward);

// Launches and returns; nothing synchronises, everything can be captured into a CUDA graph. Bad targets go into the
// record of errors_cuda.h: nan loss and zero gradient for the row.
Status cross_entropy_run_cuda(const CrossEntropyPlan& plan, const CudaContext& context);

// Which kernel and launch a call takes, in words; for explain(). The result is static.
const char* cross_entropy_regime_cuda(const CrossEntropyPlan& plan);

}  // namespace fastloss
