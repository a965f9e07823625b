#define FASTLOSS_ISA portable
#include "cpu_isa.h"
#include "cpu_support.h"
#include "scale_grad.h"

namespace fastloss {

using Scale = void(const void*, void*, DType, int64_t, double, ParallelFor);
Scale scale_grad_portable;
#if defined(FASTLOSS_HAVE_AVX2)
Scale scale_grad_avx2;
#else
constexpr Scale* scale_grad_avx2 = nullptr;
#endif
#if defined(FASTLOSS_HAVE_AVX512)
Scale scale_grad_avx512;
#else
constexpr Scale* scale_grad_avx512 = nullptr;
#endif

void scale_grad_cpu(const void* grad, void* out, DType type, int64_t count, const void* scale, DType scale_type,
                    ParallelFor parallel_for) {
  choose_isa<Scale>(scale_grad_portable, scale_grad_avx2, scale_grad_avx512)(
      grad, out, type, count, portable::load_scalar(scale, scale_type, 0), parallel_for);
}

}  // namespace fastloss
