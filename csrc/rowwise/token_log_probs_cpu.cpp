// Chooses the instruction set; the kernel is in token_log_probs_cpu_kernel.h.
#include "../common/cpu_isa.h"
#include "token_log_probs.h"

namespace fastloss {

using Kernel = Status(const TokenLogProbsArgs&, ParallelFor);
Kernel token_log_probs_backward_portable;
#if defined(FASTLOSS_HAVE_AVX2)
Kernel token_log_probs_backward_avx2;
#else
constexpr Kernel* token_log_probs_backward_avx2 = nullptr;
#endif
#if defined(FASTLOSS_HAVE_AVX512)
Kernel token_log_probs_backward_avx512;
#else
constexpr Kernel* token_log_probs_backward_avx512 = nullptr;
#endif

Status token_log_probs_backward_cpu(const TokenLogProbsArgs& a, ParallelFor parallel_for) {
  return choose_isa<Kernel>(token_log_probs_backward_portable, token_log_probs_backward_avx2,
                            token_log_probs_backward_avx512)(a, parallel_for);
}

}  // namespace fastloss
