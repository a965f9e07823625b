// divergence_forward and divergence_backward on numpy arrays; the contract is rowwise/divergence.h.
#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"

namespace fastloss {
namespace {

DivergenceArgs divergence_args(const py::array& p, const py::array& q, const std::string& kind, double beta,
                               double temperature, double scale, const py::object& weight, const py::object& total,
                               const std::string& reduction, const std::optional<std::string>& loss_dtype) {
  DivergenceArgs a;
  if (kind != "kl" && kind != "js") throw py::value_error("kind: expected kl or js, got " + kind);
  a.kind = kind == "kl" ? Divergence::kl : Divergence::js;
  a.beta = beta;
  a.temperature = temperature;
  a.scale = scale;
  require_shape_of(q, p, "q");
  a.p.logits = p.data();
  a.p.type = float_type(p, "p");
  a.p.strides = strides_of(p, "p");
  a.q.logits = q.data();
  a.q.type = float_type(q, "q");
  a.q.strides = strides_of(q, "q");
  set_shape(a, p);
  a.weight = flat_input(weight, a.rows(), numpy_dtype(a.accum()), "weight");
  a.total = flat_input(total, 1, numpy_dtype(a.accum()), "total");
  a.reduction = reduction_of(reduction);
  a.loss_type = loss_dtype ? named_type(*loss_dtype) : a.accum();
  return a;
}

// The gradient of an operand, if it is wanted.
Output gradient(const py::object& wanted, const py::array& x, DivergenceOperand& o, const char* name) {
  Output out(wanted, x.dtype(), {x.shape(), x.shape() + x.ndim()}, name);
  o.grad = out.data();
  o.grad_strides = out.strides(name);
  return out;
}

py::dict forward(const py::array& p, const py::array& q, const std::string& kind, double beta, double temperature,
                 double scale, const py::object& weight, const py::object& total, const std::string& reduction,
                 const std::optional<std::string>& loss_dtype, const py::object& save, const py::object& grad_p,
                 const py::object& grad_q) {
  DivergenceArgs a = divergence_args(p, q, kind, beta, temperature, scale, weight, total, reduction, loss_dtype);
  std::vector<py::ssize_t> loss_shape;
  if (a.reduction == Reduction::none) loss_shape = {a.rows()};
  Output loss(py::bool_(true), numpy_dtype(a.loss_type), loss_shape, "loss");
  Output saved = Output(save, numpy_dtype(a.accum()), {kDivergenceSaved, a.rows()}, "save").contiguous("save");
  Output by_p = gradient(grad_p, p, a.p, "grad_p"), by_q = gradient(grad_q, q, a.q, "grad_q");
  a.loss = loss.data();
  a.saved = saved.data();
  run_core([&] { return run_divergence_forward(a); });
  py::dict results;
  loss.put(results, "loss");
  saved.put(results, "saved");
  by_p.put(results, "grad_p");
  by_q.put(results, "grad_q");
  return results;
}

py::dict backward(const py::array& p, const py::array& q, const py::array& saved, const py::array& grad_output,
                  const std::string& kind, double beta, double temperature, double scale, const py::object& weight,
                  const py::object& total, const std::string& reduction, const std::optional<std::string>& loss_dtype,
                  const py::object& grad_p, const py::object& grad_q) {
  DivergenceArgs a = divergence_args(p, q, kind, beta, temperature, scale, weight, total, reduction, loss_dtype);
  a.saved = const_cast<void*>(flat_input(saved, kDivergenceSaved * a.rows(), numpy_dtype(a.accum()), "saved"));
  a.grad_output_per_row = grad_output.ndim() != 0;
  a.grad_output =
      flat_input(grad_output, a.grad_output_per_row ? a.rows() : 1, numpy_dtype(a.loss_type), "grad_output");
  Output by_p = gradient(grad_p, p, a.p, "grad_p"), by_q = gradient(grad_q, q, a.q, "grad_q");
  run_core([&] { return run_divergence_backward(a); });
  py::dict results;
  by_p.put(results, "grad_p");
  by_q.put(results, "grad_q");
  return results;
}

}  // namespace

void bind_divergence(py::module_& m) {
  const py::object none = py::none();
  m.def("divergence_forward", &forward, py::arg("p"), py::arg("q"), py::kw_only(), py::arg("kind") = "kl",
        py::arg("beta") = 0.5, py::arg("temperature") = 1.0, py::arg("scale") = 1.0, py::arg("weight") = none,
        py::arg("total") = none, py::arg("reduction") = "mean", py::arg("loss_dtype") = none, py::arg("save") = false,
        py::arg("grad_p") = false, py::arg("grad_q") = false,
        "A dict of loss and of saved, grad_p, grad_q where these are wanted; gradients of a grad_output of 1.");
  m.def("divergence_backward", &backward, py::arg("p"), py::arg("q"), py::arg("saved"), py::arg("grad_output"),
        py::kw_only(), py::arg("kind") = "kl", py::arg("beta") = 0.5, py::arg("temperature") = 1.0,
        py::arg("scale") = 1.0, py::arg("weight") = none, py::arg("total") = none, py::arg("reduction") = "mean",
        py::arg("loss_dtype") = none, py::arg("grad_p") = true, py::arg("grad_q") = true,
        "A dict of the gradients that are wanted.");
}

}  // namespace fastloss
