// The pointwise losses on numpy arrays; the contract is pointwise/pointwise.h.
#include "../pointwise/layout.h"
#include "arrays.h"

namespace fastloss {
namespace {

void set_operand(PointwiseArgs& a, PointwiseOperand& o, const py::array& x, const char* name) {
  if (x.ndim() != a.dim || !std::equal(x.shape(), x.shape() + x.ndim(), a.sizes))
    throw py::value_error(std::string(name) + ": its shape is not that of the input");
  o.data = const_cast<void*>(x.data());
  if (x.dtype().kind() != 'b') o.type = float_type(x, name);
  if (o.type == DType::f64) a.accum = DType::f64;
  for (int k = 0; k < a.dim; ++k) o.strides[k] = x.strides(k) / x.itemsize();
}

// Sets an operand unless x is None. The array lives as long as x does.
void set_optional(PointwiseArgs& a, PointwiseOperand& o, const py::object& x, const char* name) {
  if (!x.is_none()) set_operand(a, o, x.cast<py::array>(), name);
}

PointwiseArgs pointwise_args(const py::array& input, const py::array& target, const std::string& loss, double param,
                             const std::string& reduction, int row_dims, const py::object& weight,
                             const py::object& mask, double weight_denominator) {
  PointwiseArgs a;
  while (pointwise_names()[a.loss] && loss != pointwise_names()[a.loss]) ++a.loss;
  if (!pointwise_names()[a.loss]) throw py::value_error("loss: there is no " + loss);
  if (input.ndim() > kPointwiseDims || row_dims > input.ndim()) throw py::value_error("input: wrong number of axes");
  a.param = param;
  a.dim = int(input.ndim());
  a.row_dims = row_dims;
  a.cols = 1;
  for (int k = 0; k < a.dim; ++k) {
    a.sizes[k] = input.shape(k);
    (k < row_dims ? a.rows : a.cols) *= a.sizes[k];
  }
  a.reduction = reduction_of(reduction);
  a.weight_denominator = weight_denominator;
  set_operand(a, a.input, input, "input");
  set_operand(a, a.target, target, "target");
  set_optional(a, a.weight, weight, "weight");
  set_optional(a, a.mask, mask, "mask");
  a.loss_type = a.accum;
  return a;
}

// What all three functions return: arrays of the accumulation dtype, gradients of their operand's own.
class Results {
 public:
  Results(PointwiseArgs& a, const py::array& input, const py::array& target) : a_(a) {
    shape_ = {input.shape(), input.shape() + input.ndim()};
    rows_ = {shape_.begin(), shape_.begin() + a.row_dims};
    input_ = input.dtype();
    target_ = target.dtype();
  }
  void want_loss() {
    const py::array loss(numpy_dtype(a_.loss_type), a_.reduction == Reduction::none ? shape_ : rows_);
    if (a_.reduction == Reduction::none)
      set_operand(a_, a_.loss_elements, loss, "loss");
    else
      a_.loss_out = const_cast<void*>(loss.data());
    results_["loss"] = loss;
  }
  void want_factor() {
    const py::array factor(py::dtype("float64"), rows_);
    a_.factor = static_cast<double*>(const_cast<void*>(factor.data()));
    results_["factor"] = factor;
  }
  void want_grads(const py::object& input, const py::object& target) {
    want_grad(input, a_.grad_input, input_, "grad_input");
    want_grad(target, a_.grad_target, target_, "grad_target");
  }
  template <class F>
  py::dict run(const F& f) {
    coalesce(a_);
    run_core(f);
    return results_;
  }

 private:
  void want_grad(const py::object& wanted, PointwiseOperand& o, const py::dtype& type, const char* name) {
    Output(wanted, type, shape_, name).put(results_, name);
    if (results_.contains(name)) set_operand(a_, o, results_[name], name);
  }

  PointwiseArgs& a_;
  std::vector<py::ssize_t> shape_, rows_;
  py::dtype input_, target_;
  py::dict results_;
};

void set_factor(PointwiseArgs& a, const py::array& factor) {
  if (a.reduction != Reduction::none)
    a.factor = static_cast<double*>(const_cast<void*>(flat_input(factor, a.rows, py::dtype("float64"), "factor")));
}
void set_grad_output(PointwiseArgs& a, const py::array& grad_output) {
  if (a.reduction == Reduction::none) return set_operand(a, a.grad_output_elements, grad_output, "grad_output");
  a.grad_output = flat_input(grad_output, a.rows, grad_output.dtype(), "grad_output");
  a.grad_output_type = float_type(grad_output, "grad_output");
}

py::dict forward(const py::array& input, const py::array& target, const std::string& loss, double param,
                 const std::string& reduction, int row_dims, const py::object& weight, const py::object& mask,
                 double weight_denominator, const py::object& grad_input, const py::object& grad_target) {
  PointwiseArgs a = pointwise_args(input, target, loss, param, reduction, row_dims, weight, mask, weight_denominator);
  Results results(a, input, target);
  results.want_loss();
  if (a.reduction != Reduction::none) results.want_factor();
  results.want_grads(grad_input, grad_target);
  return results.run([&] { return run_pointwise_forward(a); });
}

py::dict backward(const py::array& grad_output, const py::array& factor, const py::array& input,
                  const py::array& target, const std::string& loss, double param, const std::string& reduction,
                  int row_dims, const py::object& weight, const py::object& mask, double weight_denominator,
                  const py::object& grad_input, const py::object& grad_target) {
  PointwiseArgs a = pointwise_args(input, target, loss, param, reduction, row_dims, weight, mask, weight_denominator);
  set_factor(a, factor);
  set_grad_output(a, grad_output);
  Results results(a, input, target);
  results.want_grads(grad_input, grad_target);
  return results.run([&] { return run_pointwise_backward(a); });
}

py::dict second(const py::array& grad_output, const py::array& factor, const py::object& tangent_input,
                const py::object& tangent_target, const py::array& input, const py::array& target,
                const std::string& loss, double param, const std::string& reduction, int row_dims,
                const py::object& weight, const py::object& mask, double weight_denominator, bool gradients) {
  PointwiseArgs a = pointwise_args(input, target, loss, param, reduction, row_dims, weight, mask, weight_denominator);
  set_factor(a, factor);
  set_optional(a, a.tangent_input, tangent_input, "tangent_input");
  set_optional(a, a.tangent_target, tangent_target, "tangent_target");
  Results results(a, input, target);
  if (gradients) {
    set_grad_output(a, grad_output);
    results.want_grads(py::bool_(true), py::bool_(true));
  } else {
    results.want_loss();
  }
  return results.run([&] { return run_pointwise_second(a); });
}

py::list losses() {
  py::list names;
  for (const char* const* name = pointwise_names(); *name; ++name) names.append(*name);
  return names;
}

}  // namespace

void bind_pointwise(py::module_& m) {
  const py::object none = py::none();
  m.def("pointwise_losses", &losses);
  m.def("pointwise_forward", &forward, py::arg("input"), py::arg("target"), py::kw_only(), py::arg("loss"),
        py::arg("param") = 0.0, py::arg("reduction") = "mean", py::arg("row_dims") = 0, py::arg("weight") = none,
        py::arg("mask") = none, py::arg("weight_denominator") = 0.0, py::arg("grad_input") = false,
        py::arg("grad_target") = false,
        "A dict of loss, factor and the gradients wanted: False, True, or an array to write to.");
  m.def("pointwise_backward", &backward, py::arg("grad_output"), py::arg("factor"), py::arg("input"), py::arg("target"),
        py::kw_only(), py::arg("loss"), py::arg("param") = 0.0, py::arg("reduction") = "mean", py::arg("row_dims") = 0,
        py::arg("weight") = none, py::arg("mask") = none, py::arg("weight_denominator") = 0.0,
        py::arg("grad_input") = true, py::arg("grad_target") = true, "A dict of the gradients wanted.");
  m.def("pointwise_second", &second, py::arg("grad_output"), py::arg("factor"), py::arg("tangent_input"),
        py::arg("tangent_target"), py::arg("input"), py::arg("target"), py::kw_only(), py::arg("loss"),
        py::arg("param") = 0.0, py::arg("reduction") = "mean", py::arg("row_dims") = 0, py::arg("weight") = none,
        py::arg("mask") = none, py::arg("weight_denominator") = 0.0, py::arg("gradients") = false,
        "The derivative of the loss along the tangents, or that of the gradients.");
}

}  // namespace fastloss
