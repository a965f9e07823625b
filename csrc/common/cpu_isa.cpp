#include "cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace fastloss {

Isa best_isa() {
#if defined(__x86_64__) || defined(__i386__)
#if defined(FASTLOSS_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
#endif
#if defined(FASTLOSS_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
#endif
  return Isa::portable;
}

namespace {
Isa from_environment() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("FASTLOSS_ISA");
  if (wanted == nullptr) return best;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (isa <= best && std::strcmp(wanted, isa_name(isa)) == 0) return isa;
  return best;
}
std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{from_environment()};
  return isa;
}
}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

bool set_isa(Isa isa) {
  if (isa > best_isa()) return false;
  chosen().store(isa, std::memory_order_relaxed);
  return true;
}

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable"; }

}  // namespace fastloss
