// row_loss_forward and row_loss_backward on numpy arrays; the contract is rowwise/row_loss.h.
#include <pybind11/stl.h>

#include <optional>

#include "../rowwise/row_losses.h"
#include "arrays.h"

namespace fastloss {
namespace {

RowLossArgs row_loss_args(const py::array& input, const py::array& target, const std::string& loss,
                          const std::vector<double>& params, const py::object& weight,
                          std::optional<int64_t> ignore_index, const std::string& reduction, bool mean_over_rows,
                          const std::optional<std::string>& loss_dtype) {
  RowLossArgs a;
  while (row_losses()[a.kind].name && row_losses()[a.kind].name != loss) ++a.kind;
  if (!row_losses()[a.kind].name) throw py::value_error("no row loss of the name " + loss);
  if (int(params.size()) != row_losses()[a.kind].params) throw py::value_error("params: wrong number of them");
  std::copy(params.begin(), params.end(), a.params);
  a.input = input.data();
  a.input_type = float_type(input, "input");
  a.input_strides = strides_of(input, "input");
  set_shape(a, input);
  a.index_type = index_type(target, "target");
  a.target = flat_input(target, a.rows(), target.dtype(), "target");
  a.weight = flat_input(weight, a.classes, numpy_dtype(accum_of(a.input_type)), "weight");
  a.ignores = ignore_index.has_value();
  a.ignore_index = ignore_index.value_or(0);
  a.reduction = reduction_of(reduction);
  a.mean_over_rows = mean_over_rows;
  a.loss_type = loss_dtype ? named_type(*loss_dtype) : a.input_type;
  return a;
}

py::dict forward(const py::array& input, const py::array& target, const std::string& loss,
                 const std::vector<double>& params, const py::object& weight, std::optional<int64_t> ignore_index,
                 const std::string& reduction, bool mean_over_rows, const std::optional<std::string>& loss_dtype,
                 const py::object& value, const py::object& total_weight) {
  RowLossArgs a =
      row_loss_args(input, target, loss, params, weight, ignore_index, reduction, mean_over_rows, loss_dtype);
  std::vector<py::ssize_t> loss_shape;
  if (a.reduction == Reduction::none) loss_shape = {a.rows()};
  Output loss_out = Output(value, numpy_dtype(a.loss_type), loss_shape, "value").contiguous("value");
  Output total_out(total_weight, numpy_dtype(accum_of(a.input_type)), {1}, "total_weight");
  a.loss = loss_out.data();
  a.total_weight = total_out.data();
  run_core([&] { return run_row_loss_forward(a); });
  py::dict results;
  loss_out.put(results, "loss");
  total_out.put(results, "total_weight");
  return results;
}

py::dict backward(const py::array& input, const py::array& target, const py::array& total_weight,
                  const py::array& grad_output, const std::string& loss, const std::vector<double>& params,
                  const py::object& weight, std::optional<int64_t> ignore_index, const std::string& reduction,
                  bool mean_over_rows, const std::optional<std::string>& loss_dtype, const py::object& grad) {
  RowLossArgs a =
      row_loss_args(input, target, loss, params, weight, ignore_index, reduction, mean_over_rows, loss_dtype);
  a.total_weight = const_cast<void*>(flat_input(total_weight, 1, numpy_dtype(accum_of(a.input_type)), "total_weight"));
  a.grad_output_per_row = grad_output.ndim() != 0;
  a.grad_output =
      flat_input(grad_output, a.grad_output_per_row ? a.rows() : 1, numpy_dtype(a.loss_type), "grad_output");
  Output grad_out(grad, input.dtype(), {input.shape(), input.shape() + input.ndim()}, "grad");
  a.grad = grad_out.data();
  a.grad_strides = grad_out.strides("grad");
  if (row_losses()[a.kind].linear) a.input = nullptr;  // as the binding for torch
  run_core([&] { return run_row_loss_backward(a); });
  py::dict results;
  grad_out.put(results, "grad");
  return results;
}

}  // namespace

void bind_row_loss(py::module_& m) {
  const py::object none = py::none();
  const std::vector<double> no_params;
  m.def("row_loss_forward", &forward, py::arg("input"), py::arg("target"), py::kw_only(), py::arg("loss") = "nll_loss",
        py::arg("params") = no_params, py::arg("weight") = none, py::arg("ignore_index") = -100,
        py::arg("reduction") = "mean", py::arg("mean_over_rows") = false, py::arg("loss_dtype") = none,
        py::arg("value") = true, py::arg("total_weight") = true,
        "A dict of loss and total_weight; as cross_entropy_forward. ignore_index None: every row counts.");
  m.def("row_loss_backward", &backward, py::arg("input"), py::arg("target"), py::arg("total_weight"),
        py::arg("grad_output"), py::kw_only(), py::arg("loss") = "nll_loss", py::arg("params") = no_params,
        py::arg("weight") = none, py::arg("ignore_index") = -100, py::arg("reduction") = "mean",
        py::arg("mean_over_rows") = false, py::arg("loss_dtype") = none, py::arg("grad") = true,
        "A dict of grad; as cross_entropy_backward.");
}

}  // namespace fastloss
