// scale_grad on numpy arrays; the contract is common/scale_grad.h.
#include "arrays.h"

namespace fastloss {
namespace {

py::array scale_grad(const py::array& grad, const py::array& scale, const py::object& out) {
  const DType type = float_type(grad, "grad");
  if (!(grad.flags() & py::array::c_style)) throw py::value_error("grad: expected a contiguous array");
  if (scale.size() != 1) throw py::value_error("scale: expected one element");
  py::array result = out.is_none()
                         ? py::array(grad.dtype(), std::vector<py::ssize_t>(grad.shape(), grad.shape() + grad.ndim()))
                         : out.cast<py::array>();
  if (float_type(result, "out") != type || result.size() != grad.size() || !(result.flags() & py::array::c_style))
    throw py::value_error("out: expected a contiguous array like grad");
  void* to = result.mutable_data();
  const DType scale_type = float_type(scale, "scale");
  run_core([&] { return run_scale_grad(grad.data(), to, type, grad.size(), scale.data(), scale_type); });
  return result;
}

}  // namespace

void bind_scale_grad(py::module_& m) {
  m.def("scale_grad", &scale_grad, py::arg("grad"), py::arg("scale"), py::kw_only(), py::arg("out") = py::none(),
        "grad * scale into a new array or `out`, which may be grad itself.");
}

}  // namespace fastloss
