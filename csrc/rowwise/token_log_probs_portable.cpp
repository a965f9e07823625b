#define FASTLOSS_ISA portable
#include "token_log_probs_cpu_kernel.h"

namespace fastloss {
Status token_log_probs_backward_portable(const TokenLogProbsArgs& a, ParallelFor f) {
  return portable::token_log_probs_backward(a, f);
}
}  // namespace fastloss
