// Declares the library. Loading it (torch.ops.load_library) registers the operators, one file per loss: *_torch.cpp.
// It is no Python module, so building it needs no Python headers and one file serves every Python.
#include "../common/cpu_isa.h"
#include "support.h"

namespace fastloss {
namespace {

std::string current_isa_name() { return isa_name(current_isa()); }
std::string best_isa_name() { return isa_name(best_isa()); }
bool set_isa_by_name(std::string name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (name == isa_name(isa)) return set_isa(isa);
  return false;
}

}  // namespace

STABLE_TORCH_LIBRARY(fastloss, m) {
  // grad * scale; the second form in place, without touching memory when scale is exactly 1.
  m.def("scale_grad(Tensor grad, Tensor scale) -> Tensor");
  m.def("scale_grad_(Tensor(a!) grad, Tensor scale) -> ()");
  // The instruction set of the CPU kernels: portable, avx2 or avx512; false when it is not to be had.
  m.def("current_isa() -> str");
  m.def("best_isa() -> str");
  m.def("set_isa(str name) -> bool");
#if defined(FASTLOSS_HAVE_CUDA)
  // Raises what a CUDA kernel has found; the caller synchronises first.
  m.def("check_errors() -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fastloss, CompositeExplicitAutograd, m) {
  m.impl("current_isa", TORCH_BOX(&current_isa_name));
  m.impl("best_isa", TORCH_BOX(&best_isa_name));
  m.impl("set_isa", TORCH_BOX(&set_isa_by_name));
#if defined(FASTLOSS_HAVE_CUDA)
  m.impl("check_errors", TORCH_BOX(&raise_deferred_error));
#endif
}

}  // namespace fastloss
