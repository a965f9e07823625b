#define FASTLOSS_ISA avx2
#include "token_log_probs_cpu_kernel.h"

namespace fastloss {
Status token_log_probs_backward_avx2(const TokenLogProbsArgs& a, ParallelFor f) {
  return avx2::token_log_probs_backward(a, f);
}
}  // namespace fastloss
