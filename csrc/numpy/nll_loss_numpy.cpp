// nll_loss_forward and nll_loss_backward on numpy arrays; the contract is rowwise/nll_loss.h.
#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"

namespace fastloss {
namespace {

NllLossArgs nll_args(const py::array& input, const py::array& target, const py::object& weight, int64_t ignore_index,
                     const std::string& reduction, const std::optional<std::string>& loss_dtype) {
  NllLossArgs a;
  a.input = input.data();
  a.input_type = float_type(input, "input");
  a.input_strides = strides_of(input, "input");
  set_shape(a, input);
  a.index_type = index_type(target, "target");
  a.target = flat_input(target, a.rows(), target.dtype(), "target");
  a.weight = flat_input(weight, a.classes, numpy_dtype(accum_of(a.input_type)), "weight");
  a.ignore_index = ignore_index;
  a.reduction = reduction_of(reduction);
  a.loss_type = loss_dtype ? named_type(*loss_dtype) : a.input_type;
  return a;
}

py::dict forward(const py::array& input, const py::array& target, const py::object& weight, int64_t ignore_index,
                 const std::string& reduction, const std::optional<std::string>& loss_dtype, const py::object& loss,
                 const py::object& total_weight) {
  NllLossArgs a = nll_args(input, target, weight, ignore_index, reduction, loss_dtype);
  std::vector<py::ssize_t> loss_shape;
  if (a.reduction == Reduction::none) loss_shape = {a.rows()};
  Output loss_out = Output(loss, numpy_dtype(a.loss_type), loss_shape, "loss").contiguous("loss");
  Output total_out(total_weight, numpy_dtype(accum_of(a.input_type)), {1}, "total_weight");
  a.loss = loss_out.data();
  a.total_weight = total_out.data();
  run_core([&] { return run_nll_loss_forward(a); });
  py::dict results;
  loss_out.put(results, "loss");
  total_out.put(results, "total_weight");
  return results;
}

py::dict backward(const py::array& input, const py::array& target, const py::array& total_weight,
                  const py::array& grad_output, const py::object& weight, int64_t ignore_index,
                  const std::string& reduction, const std::optional<std::string>& loss_dtype, const py::object& grad) {
  NllLossArgs a = nll_args(input, target, weight, ignore_index, reduction, loss_dtype);
  a.total_weight = const_cast<void*>(flat_input(total_weight, 1, numpy_dtype(accum_of(a.input_type)), "total_weight"));
  a.grad_output_per_row = grad_output.ndim() != 0;
  a.grad_output =
      flat_input(grad_output, a.grad_output_per_row ? a.rows() : 1, numpy_dtype(a.loss_type), "grad_output");
  Output grad_out(grad, input.dtype(), {input.shape(), input.shape() + input.ndim()}, "grad");
  a.grad = grad_out.data();
  a.grad_strides = grad_out.strides("grad");
  run_core([&] { return run_nll_loss_backward(a); });
  py::dict results;
  grad_out.put(results, "grad");
  return results;
}

}  // namespace

void bind_nll_loss(py::module_& m) {
  const py::object none = py::none();
  m.def("nll_loss_forward", &forward, py::arg("input"), py::arg("target"), py::kw_only(), py::arg("weight") = none,
        py::arg("ignore_index") = -100, py::arg("reduction") = "mean", py::arg("loss_dtype") = none,
        py::arg("loss") = true, py::arg("total_weight") = true,
        "A dict of loss and total_weight; as cross_entropy_forward.");
  m.def("nll_loss_backward", &backward, py::arg("input"), py::arg("target"), py::arg("total_weight"),
        py::arg("grad_output"), py::kw_only(), py::arg("weight") = none, py::arg("ignore_index") = -100,
        py::arg("reduction") = "mean", py::arg("loss_dtype") = none, py::arg("grad") = true,
        "A dict of grad; as cross_entropy_backward.");
}

}  // namespace fastloss
