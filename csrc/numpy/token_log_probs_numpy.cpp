// token_log_probs_backward on numpy arrays; the contract is rowwise/token_log_probs.h.
#include "arrays.h"

namespace fastloss {
namespace {

py::dict backward(const py::array& logits, const py::array& index, const py::array& saved, const py::object& entropy,
                  const py::object& grad_log_prob, const py::object& grad_entropy, const py::object& grad,
                  int64_t ignore_index, double softcap, double logit_scale) {
  TokenLogProbsArgs a;
  a.logits = logits.data();
  a.logits_type = float_type(logits, "logits");
  a.logits_strides = strides_of(logits, "logits");
  set_shape(a, logits);
  const int64_t rows = a.outer * a.inner;
  const py::dtype accum = numpy_dtype(accum_of(a.logits_type));
  a.index_type = index_type(index, "index");
  a.index = flat_input(index, rows, index.dtype(), "index");
  a.saved = flat_input(saved, 2 * rows + 2, accum, "saved");
  a.entropy = flat_input(entropy, rows, accum, "entropy");
  a.grad_log_prob = flat_input(grad_log_prob, rows, accum, "grad_log_prob");
  a.grad_entropy = flat_input(grad_entropy, rows, accum, "grad_entropy");
  a.ignore_index = ignore_index;
  a.softcap = softcap;
  a.logit_scale = logit_scale;
  Output out(grad, logits.dtype(), {logits.shape(), logits.shape() + logits.ndim()}, "grad");
  a.grad = out.data();
  a.grad_strides = out.strides("grad");
  run_core([&] { return run_token_log_probs_backward(a); });
  py::dict results;
  out.put(results, "grad");
  return results;
}

}  // namespace

void bind_token_log_probs(py::module_& m) {
  m.def("token_log_probs_backward", &backward, py::arg("logits"), py::arg("index"), py::arg("saved"),
        py::arg("entropy"), py::kw_only(), py::arg("grad_log_prob") = py::none(), py::arg("grad_entropy") = py::none(),
        py::arg("grad") = true, py::arg("ignore_index") = -100, py::arg("softcap") = 0.0, py::arg("logit_scale") = 1.0,
        "The gradient by the logits, from what cross_entropy_forward has saved and its entropies.");
}

}  // namespace fastloss
