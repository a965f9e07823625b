// Which instruction set the CPU kernels run with, chosen once at run time.
#pragma once
#include <cstdint>

namespace fastloss {

enum class Isa : int32_t { portable = 0, avx2 = 1, avx512 = 2 };

// The best that this machine has and this build contains.
Isa best_isa();
// What kernels use now: best_isa() unless FASTLOSS_ISA (portable, avx2, avx512) or set_isa asks for less.
Isa current_isa();
// Returns false, changing nothing, when the machine or the build lacks it.
bool set_isa(Isa isa);
const char* isa_name(Isa isa);

// The one of three functions that current_isa() calls for; a set that is not built falls back to the next lower.
template <class F>
F* choose_isa(F* portable, F* avx2, F* avx512) {
  const Isa isa = current_isa();
  if (isa == Isa::avx512 && avx512) return avx512;
  if (isa != Isa::portable && avx2) return avx2;
  return portable;
}

}  // namespace fastloss
