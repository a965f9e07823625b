#define FASTLOSS_ISA avx512
#include "token_log_probs_cpu_kernel.h"

namespace fastloss {
Status token_log_probs_backward_avx512(const TokenLogProbsArgs& a, ParallelFor f) {
  return avx512::token_log_probs_backward(a, f);
}
}  // namespace fastloss
