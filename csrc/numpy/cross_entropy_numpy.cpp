// cross_entropy_forward and cross_entropy_backward on numpy arrays; the contract is rowwise/cross_entropy.h.
#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"

namespace fastloss {
namespace {

// The keyword arguments that forward and backward share.
struct Problem {
  const py::array& logits;
  const py::array& target;
  std::optional<bool> soft;
  py::object weight, sample_weight;
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap, logit_scale;
  std::string reduction;
  bool all_ignored_zero, zero_times_inf;
  std::optional<std::string> loss_dtype;

  CrossEntropyArgs args() const {
    CrossEntropyArgs a;
    a.logits = logits.data();
    a.logits_type = float_type(logits, "logits");
    a.logits_strides = strides_of(logits, "logits");
    set_shape(a, logits);

    // uint16 may mean either: class indices, unless `soft` says bfloat16 probabilities.
    a.soft = soft.value_or(target.dtype().kind() == 'f');
    a.target = target.data();
    if (a.soft) {
      require_shape_of(target, logits, "target");
      a.prob_type = float_type(target, "target");
      a.target_strides = strides_of(target, "target");
    } else {
      a.index_type = index_type(target, "target");
      flat_input(target, a.rows(), target.dtype(), "target");
    }

    const py::dtype accum = numpy_dtype(accum_of(a.logits_type));
    a.weight = flat_input(weight, a.classes, accum, "weight");
    a.sample_weight = flat_input(sample_weight, a.rows(), accum, "sample_weight");
    a.ignore_index = ignore_index;
    a.label_smoothing = label_smoothing;
    a.z_loss = z_loss;
    a.softcap = softcap;
    a.logit_scale = logit_scale;
    a.reduction = reduction_of(reduction);
    a.all_ignored_zero = all_ignored_zero;
    a.zero_times_inf = zero_times_inf;
    a.loss_type = loss_dtype ? named_type(*loss_dtype) : a.logits_type;
    return a;
  }
};

std::vector<py::ssize_t> shape_of(const py::array& x) { return {x.shape(), x.shape() + x.ndim()}; }

py::dict forward(const Problem& problem, const py::object& loss, const py::object& saved, const py::object& lse,
                 const py::object& grad, const py::object& argmax, const py::object& accuracy) {
  CrossEntropyArgs a = problem.args();
  const py::dtype accum = numpy_dtype(accum_of(a.logits_type));
  std::vector<py::ssize_t> loss_shape;
  if (a.reduction == Reduction::none) loss_shape = {a.rows()};

  Output loss_out = Output(loss, numpy_dtype(a.loss_type), loss_shape, "loss").contiguous("loss");
  Output saved_out = Output(saved, accum, {a.saved_count()}, "saved").contiguous("saved");
  Output lse_out = Output(lse, accum, {a.rows()}, "lse").contiguous("lse");
  Output grad_out(grad, problem.logits.dtype(), shape_of(problem.logits), "grad");
  Output argmax_out = Output(argmax, py::dtype("int64"), {a.rows()}, "argmax").contiguous("argmax");
  Output accuracy_out = Output(accuracy, py::dtype("float32"), {}, "accuracy").contiguous("accuracy");
  a.loss = loss_out.data();
  a.saved = saved_out.data();
  a.lse = lse_out.data();
  a.grad = grad_out.data();
  a.grad_strides = grad_out.strides("grad");
  a.argmax = argmax_out.data<int64_t>();
  a.accuracy = accuracy_out.data<float>();
  run_core([&] { return run_cross_entropy_forward(a); });

  py::dict results;
  loss_out.put(results, "loss");
  saved_out.put(results, "saved");
  lse_out.put(results, "lse");
  grad_out.put(results, "grad");
  argmax_out.put(results, "argmax");
  accuracy_out.put(results, "accuracy");
  return results;
}

py::dict backward(const Problem& problem, const py::array& saved, const py::array& grad_output, const py::object& grad,
                  const py::object& grad_target) {
  CrossEntropyArgs a = problem.args();
  a.saved = const_cast<void*>(flat_input(saved, a.saved_count(), numpy_dtype(accum_of(a.logits_type)), "saved"));
  a.grad_output_per_row = grad_output.ndim() != 0;
  a.grad_output =
      flat_input(grad_output, a.grad_output_per_row ? a.rows() : 1, numpy_dtype(a.loss_type), "grad_output");
  Output grad_out(grad, problem.logits.dtype(), shape_of(problem.logits), "grad");
  Output grad_target_out(a.soft ? grad_target : py::none(), problem.target.dtype(), shape_of(problem.logits),
                         "grad_target");
  a.grad = grad_out.data();
  a.grad_strides = grad_out.strides("grad");
  a.grad_target = grad_target_out.data();
  a.grad_target_strides = grad_target_out.strides("grad_target");
  run_core([&] { return run_cross_entropy_backward(a); });

  py::dict results;
  grad_out.put(results, "grad");
  grad_target_out.put(results, "grad_target");
  return results;
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  const py::object none = py::none();
  m.def(
      "cross_entropy_forward",
      [](const py::array& logits, const py::array& target, std::optional<bool> soft, py::object weight,
         py::object sample_weight, int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
         double logit_scale, std::string reduction, bool all_ignored_zero, bool zero_times_inf,
         std::optional<std::string> loss_dtype, py::object loss, py::object saved, py::object lse, py::object grad,
         py::object argmax, py::object accuracy) {
        return forward({logits, target, soft, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap,
                        logit_scale, reduction, all_ignored_zero, zero_times_inf, loss_dtype},
                       loss, saved, lse, grad, argmax, accuracy);
      },
      py::arg("logits"), py::arg("target"), py::kw_only(), py::arg("soft") = none, py::arg("weight") = none,
      py::arg("sample_weight") = none, py::arg("ignore_index") = -100, py::arg("label_smoothing") = 0.0,
      py::arg("z_loss") = 0.0, py::arg("softcap") = 0.0, py::arg("logit_scale") = 1.0, py::arg("reduction") = "mean",
      py::arg("all_ignored_zero") = false, py::arg("zero_times_inf") = false, py::arg("loss_dtype") = none,
      py::arg("loss") = true, py::arg("saved") = none, py::arg("lse") = none, py::arg("grad") = none,
      py::arg("argmax") = none, py::arg("accuracy") = none,
      "A dict of the results asked for: each of loss, saved, lse, grad, argmax, accuracy may be None (not computed), "
      "True (allocated) or an array to write to. logits: [outer, classes] or [outer, classes, inner], any strides.");
  m.def(
      "cross_entropy_backward",
      [](const py::array& logits, const py::array& target, const py::array& saved, const py::array& grad_output,
         std::optional<bool> soft, py::object weight, py::object sample_weight, int64_t ignore_index,
         double label_smoothing, double z_loss, double softcap, double logit_scale, std::string reduction,
         bool all_ignored_zero, bool zero_times_inf, std::optional<std::string> loss_dtype, py::object grad,
         py::object grad_target) {
        return backward({logits, target, soft, weight, sample_weight, ignore_index, label_smoothing, z_loss, softcap,
                         logit_scale, reduction, all_ignored_zero, zero_times_inf, loss_dtype},
                        saved, grad_output, grad, grad_target);
      },
      py::arg("logits"), py::arg("target"), py::arg("saved"), py::arg("grad_output"), py::kw_only(),
      py::arg("soft") = none, py::arg("weight") = none, py::arg("sample_weight") = none, py::arg("ignore_index") = -100,
      py::arg("label_smoothing") = 0.0, py::arg("z_loss") = 0.0, py::arg("softcap") = 0.0, py::arg("logit_scale") = 1.0,
      py::arg("reduction") = "mean", py::arg("all_ignored_zero") = false, py::arg("zero_times_inf") = false,
      py::arg("loss_dtype") = none, py::arg("grad") = true, py::arg("grad_target") = none,
      "A dict of grad and, for probability targets, grad_target: None, True or an array as in the forward. "
      "grad_output: one element (0-d) or one per row, of the loss's dtype.");
}

}  // namespace fastloss
