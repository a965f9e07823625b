// cross_entropy_forward, cross_entropy_backward and row_stats on numpy arrays; the contract is rowwise/cross_entropy.h.
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

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
  std::optional<double> normalizer;
  int row_map;
  std::vector<double> map_params, margins;
  int64_t class_offset, total_classes;

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
    if (map_params.size() > 2) throw py::value_error("map_params: expected two at most");
    a.row_map = row_map;
    for (size_t i = 0; i < map_params.size(); ++i) a.map_params[i] = map_params[i];
    if (margins.size() == 2) a.margin_angle = margins[0], a.margin_cosine = margins[1];
    a.class_offset = class_offset;
    a.total_classes = total_classes;
    a.normalizer = normalizer ? &*normalizer : nullptr;
    a.weight = flat_input(weight, a.all_classes(), accum, "weight");
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
                 const py::object& grad, const py::object& argmax, const py::object& accuracy,
                 const py::object& entropy) {
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
  Output entropy_out = Output(entropy, accum, {a.rows()}, "entropy").contiguous("entropy");
  a.loss = loss_out.data();
  a.saved = saved_out.data();
  a.lse = lse_out.data();
  a.grad = grad_out.data();
  a.grad_strides = grad_out.strides("grad");
  a.argmax = argmax_out.data<int64_t>();
  a.accuracy = accuracy_out.data<float>();
  a.entropy = entropy_out.data();
  run_core([&] { return run_cross_entropy_forward(a); });

  py::dict results;
  loss_out.put(results, "loss");
  saved_out.put(results, "saved");
  lse_out.put(results, "lse");
  grad_out.put(results, "grad");
  argmax_out.put(results, "argmax");
  accuracy_out.put(results, "accuracy");
  entropy_out.put(results, "entropy");
  return results;
}

py::array row_stats(const Problem& problem, bool best, const py::object& stats) {
  CrossEntropyArgs a = problem.args();
  a.stats_best = best;
  Output out = Output(stats, numpy_dtype(accum_of(a.logits_type)), {a.stats_count(), a.rows()}, "stats");
  a.stats = out.contiguous("stats").data();
  run_core([&] { return run_cross_entropy_forward(a); });
  py::dict results;
  out.put(results, "stats");
  return results["stats"];
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

// m.def(name, f, positional..., the keyword arguments of a Problem, extra...).
template <class F, class... Positional, class... Extra>
void define(py::module_& m, const char* name, const F& f, const std::tuple<Positional...>& positional,
            const Extra&... extra) {
  const py::object none = py::none();
  std::apply(
      [&](const auto&... lead) {
        m.def(name, f, lead..., py::kw_only(), py::arg("soft") = none, py::arg("weight") = none,
              py::arg("sample_weight") = none, py::arg("ignore_index") = -100, py::arg("label_smoothing") = 0.0,
              py::arg("z_loss") = 0.0, py::arg("softcap") = 0.0, py::arg("logit_scale") = 1.0,
              py::arg("reduction") = "mean", py::arg("all_ignored_zero") = false, py::arg("zero_times_inf") = false,
              py::arg("loss_dtype") = none, py::arg("normalizer") = none, py::arg("row_map") = 0,
              py::arg("map_params") = std::vector<double>(), py::arg("margins") = std::vector<double>(),
              py::arg("class_offset") = 0, py::arg("total_classes") = 0, extra...);
      },
      positional);
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  const py::object none = py::none();
  const auto problem = std::make_tuple(py::arg("logits"), py::arg("target"));
  define(
      m, "cross_entropy_forward",
      [](const py::array& logits, const py::array& target, std::optional<bool> soft, py::object weight,
         py::object sample_weight, int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
         double logit_scale, std::string reduction, bool all_ignored_zero, bool zero_times_inf,
         std::optional<std::string> loss_dtype, std::optional<double> normalizer, int row_map,
         std::vector<double> map_params, std::vector<double> margins, int64_t class_offset, int64_t total_classes,
         py::object loss, py::object saved, py::object lse, py::object grad, py::object argmax, py::object accuracy,
         py::object entropy) {
        return forward({logits,     target,  soft,        weight,    sample_weight,    ignore_index,   label_smoothing,
                        z_loss,     softcap, logit_scale, reduction, all_ignored_zero, zero_times_inf, loss_dtype,
                        normalizer, row_map, map_params,  margins,   class_offset,     total_classes},
                       loss, saved, lse, grad, argmax, accuracy, entropy);
      },
      problem, py::arg("loss") = true, py::arg("saved") = none, py::arg("lse") = none, py::arg("grad") = none,
      py::arg("argmax") = none, py::arg("accuracy") = none, py::arg("entropy") = none,
      "A dict of the results asked for: each of loss, saved, lse, grad, argmax, accuracy, entropy may be None (not "
      "computed), True (allocated) or an array to write to. logits: [outer, classes] or [outer, classes, inner], any "
      "strides.");
  define(
      m, "cross_entropy_backward",
      [](const py::array& logits, const py::array& target, const py::array& saved, const py::array& grad_output,
         std::optional<bool> soft, py::object weight, py::object sample_weight, int64_t ignore_index,
         double label_smoothing, double z_loss, double softcap, double logit_scale, std::string reduction,
         bool all_ignored_zero, bool zero_times_inf, std::optional<std::string> loss_dtype,
         std::optional<double> normalizer, int row_map, std::vector<double> map_params, std::vector<double> margins,
         int64_t class_offset, int64_t total_classes, py::object grad, py::object grad_target) {
        return backward({logits,     target,  soft,        weight,    sample_weight,    ignore_index,   label_smoothing,
                         z_loss,     softcap, logit_scale, reduction, all_ignored_zero, zero_times_inf, loss_dtype,
                         normalizer, row_map, map_params,  margins,   class_offset,     total_classes},
                        saved, grad_output, grad, grad_target);
      },
      std::tuple_cat(problem, std::make_tuple(py::arg("saved"), py::arg("grad_output"))), py::arg("grad") = true,
      py::arg("grad_target") = none,
      "A dict of grad and, for probability targets, grad_target: None, True or an array as in the forward. "
      "grad_output: one element (0-d) or one per row, of the loss's dtype.");
  define(
      m, "row_stats",
      [](const py::array& logits, const py::array& target, std::optional<bool> soft, py::object weight,
         py::object sample_weight, int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
         double logit_scale, std::string reduction, bool all_ignored_zero, bool zero_times_inf,
         std::optional<std::string> loss_dtype, std::optional<double> normalizer, int row_map,
         std::vector<double> map_params, std::vector<double> margins, int64_t class_offset, int64_t total_classes,
         bool best, py::object stats) {
        return row_stats(
            {logits,     target,  soft,        weight,    sample_weight,    ignore_index,   label_smoothing,
             z_loss,     softcap, logit_scale, reduction, all_ignored_zero, zero_times_inf, loss_dtype,
             normalizer, row_map, map_params,  margins,   class_offset,     total_classes},
            best, stats);
      },
      problem, py::arg("best") = false, py::arg("stats") = true,
      "The statistics of a shard, [fields, rows], see Stat in rowwise/cross_entropy.h.");
}

}  // namespace fastloss
