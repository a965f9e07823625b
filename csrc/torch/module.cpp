// The Python module fastloss._C. Importing it loads this library, whose static initialisers register the operators
// (one file per loss: *_torch.cpp); the module itself only says which instruction set the CPU kernels use.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>

#include "../common/cpu_isa.h"
#include "support.h"

namespace {

PyObject* current_isa(PyObject*, PyObject*) { return PyUnicode_FromString(isa_name(fastloss::current_isa())); }
PyObject* best_isa(PyObject*, PyObject*) { return PyUnicode_FromString(isa_name(fastloss::best_isa())); }

PyObject* set_isa(PyObject*, PyObject* argument) {
  PyObject* bytes = PyUnicode_AsUTF8String(argument);
  if (bytes == nullptr) return nullptr;
  const char* name = PyBytes_AsString(bytes);
  for (int i = 0; i <= 2; ++i) {
    const auto isa = static_cast<fastloss::Isa>(i);
    if (std::strcmp(name, isa_name(isa)) == 0 && fastloss::set_isa(isa)) {
      Py_DECREF(bytes);
      Py_RETURN_NONE;
    }
  }
  PyErr_Format(PyExc_ValueError, "instruction set %R is unknown, not in this build or not on this machine", argument);
  Py_DECREF(bytes);
  return nullptr;
}

PyMethodDef methods[] = {{"current_isa", current_isa, METH_NOARGS, "Instruction set that the CPU kernels use now."},
                         {"best_isa", best_isa, METH_NOARGS, "The best one of this machine and build."},
                         {"set_isa", set_isa, METH_O, "Use 'portable', 'avx2' or 'avx512' from now on."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "fastloss._C",
                      "Operators and CPU dispatch of fastloss.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }

STABLE_TORCH_LIBRARY(fastloss, m) {
  // grad * scale; the second form in place, without touching memory when scale is exactly 1.
  m.def("scale_grad(Tensor grad, Tensor scale) -> Tensor");
  m.def("scale_grad_(Tensor(a!) grad, Tensor scale) -> ()");
#if defined(FASTLOSS_HAVE_CUDA)
  // Raises what a CUDA kernel has found; the caller synchronises first.
  m.def("check_errors() -> ()");
#endif
}

#if defined(FASTLOSS_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastloss, CompositeExplicitAutograd, m) {
  m.impl("check_errors", TORCH_BOX(&fastloss::raise_deferred_error));
}
#endif
