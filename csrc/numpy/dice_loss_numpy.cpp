// dice_loss_forward and dice_loss_backward on numpy arrays; the contract is rowwise/dice_loss.h.
#include "arrays.h"

namespace fastloss {

namespace {

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "softmax") return Activation::softmax;
  if (name == "sigmoid") return Activation::sigmoid;
  throw py::value_error("activation: expected none, softmax or sigmoid, got " + name);
}

DiceLossArgs dice_args(const py::array& input, const py::array& target, int64_t groups, const py::object& weight,
                       const py::dict& options) {
  DiceLossArgs a;
  a.input_strides = strides_of(input, "input");
  set_shape(a, input);
  a.groups = groups;
  a.input = input.data();
  a.input_type = a.loss_type = float_type(input, "input");
  const std::string kind(1, target.dtype().kind());
  a.dense = kind == "f" || (target.ndim() == input.ndim() && kind == "u");  // uint16 for bfloat16
  a.target = target.data();
  if (a.dense) {
    require_shape_of(target, input, "target");
    a.target_type = float_type(target, "target");
    a.target_strides = strides_of(target, "target");
  } else {
    a.index_type = index_type(target, "target");
    if (target.size() != a.rows() || !(target.flags() & py::array::c_style))
      throw py::value_error("target: expected one contiguous class index per row");
  }
  a.weight = flat_input(weight, a.classes, numpy_dtype(accum_of(a.input_type)), "weight");
  for (const auto& [key, value] : options) {
    const std::string name = key.cast<std::string>();
    if (name == "activation")
      a.activation = activation_of(value.cast<std::string>());
    else if (name == "squared")
      a.squared = value.cast<bool>();
    else if (name == "skip_absent")
      a.skip_absent = value.cast<bool>();
    else if (name == "first_class")
      a.first_class = value.cast<int64_t>();
    else if (name == "smooth_nr")
      a.smooth_nr = value.cast<double>();
    else if (name == "smooth_dr")
      a.smooth_dr = value.cast<double>();
    else if (name == "ignore_index")
      a.ignore_index = value.cast<int64_t>();
    else if (name == "reduction")
      a.reduction = reduction_of(value.cast<std::string>());
    else if (name == "tversky")
      a.tversky = value.cast<bool>();
    else if (name == "alpha")
      a.alpha = value.cast<double>();
    else if (name == "beta")
      a.beta = value.cast<double>();
    else if (name == "gamma")
      a.gamma = value.cast<double>();
    else if (name == "lambda_dice")
      a.lambda_dice = value.cast<double>();
    else if (name == "lambda_ce")
      a.lambda_ce = value.cast<double>();
    else if (name == "smoothing")
      a.smoothing = value.cast<double>();
    else if (name == "loss_dtype")
      a.loss_type = named_type(value.cast<std::string>());
    else
      throw py::type_error("unknown option " + name);
  }
  return a;
}

py::dict forward(const py::array& input, const py::array& target, int64_t groups, const py::object& weight,
                 const py::kwargs& options) {
  DiceLossArgs a = dice_args(input, target, groups, weight, options);
  std::vector<py::ssize_t> shape;
  if (a.reduction == Reduction::none) shape = {a.groups, a.classes - a.first_class};
  Output loss(py::bool_(true), numpy_dtype(a.loss_type), shape, "loss");
  Output saved(py::bool_(true), numpy_dtype(DType::f64), {a.saved_count()}, "saved");
  a.loss = loss.data();
  a.saved = saved.data<double>();
  run_core([&] { return run_dice_loss_forward(a); });
  py::dict results;
  loss.put(results, "loss");
  saved.put(results, "saved");
  return results;
}

// The gradient by the input, or by the target, written to `grad`: an array, or True for a new one.
py::dict backward(const py::array& input, const py::array& target, py::array saved, const py::object& grad_output,
                  int64_t groups, const py::object& weight, const py::object& grad, bool of_target,
                  const py::kwargs& options) {
  DiceLossArgs a = dice_args(input, target, groups, weight, options);
  a.saved = static_cast<double*>(saved.mutable_data());
  const py::ssize_t count = a.reduction == Reduction::none ? a.groups * (a.classes - a.first_class) : 1;
  a.grad_output = flat_input(grad_output, count, numpy_dtype(a.loss_type), "grad_output");
  const py::array& like = of_target ? target : input;
  Output out(grad, like.dtype(), {like.shape(), like.shape() + like.ndim()}, "grad");
  (of_target ? a.grad_target : a.grad) = out.data();
  (of_target ? a.grad_target_strides : a.grad_strides) = out.strides("grad");
  run_core([&] { return run_dice_loss_backward(a); });
  py::dict results;
  out.put(results, "grad");
  return results;
}

}  // namespace

void bind_dice_loss(py::module_& m) {
  m.def("dice_loss_forward", &forward, py::arg("input"), py::arg("target"), py::arg("groups") = 1, py::kw_only(),
        py::arg("weight") = py::none(),
        "Dice loss and what backward needs. Options by name, as in rowwise/dice_loss.h; results are loss, saved.");
  m.def("dice_loss_backward", &backward, py::arg("input"), py::arg("target"), py::arg("saved"), py::arg("grad_output"),
        py::arg("groups") = 1, py::kw_only(), py::arg("weight") = py::none(), py::arg("grad") = true,
        py::arg("of_target") = false, "The gradient by the input, or by a dense target; options as in forward.");
}

}  // namespace fastloss
