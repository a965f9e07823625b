// The pointwise losses on numpy arrays; the contract is pointwise/pointwise.h.
#include <pybind11/stl.h>

#include "../pointwise/layout.h"
#include "../pointwise/pointwise_policy.h"
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

// What all functions take.
struct Problem {
  std::vector<py::array> operands;
  std::string loss;
  std::vector<double> params;
  std::string reduction;
  int row_dims;
  py::object weight, multiplier, mask;
  double weight_denominator;
};

PointwiseArgs pointwise_args(const Problem& p) {
  PointwiseArgs a;
  const PointwiseLoss* all = pointwise_losses();
  while (all->name && p.loss != all->name) ++all;
  const PointwiseLoss& loss = *all;
  if (!loss.name) throw py::value_error("loss: there is no " + p.loss);
  if (p.operands.size() < 2 || int(p.operands.size()) > loss.operands || int(p.params.size()) > loss.params)
    throw py::value_error("operands, params: not as many as the loss has");
  const py::array& input = p.operands[0];
  if (input.ndim() > kPointwiseDims || p.row_dims > input.ndim()) throw py::value_error("input: wrong number of axes");
  a.set_loss(loss);
  std::copy(p.params.begin(), p.params.end(), a.params);
  a.dim = int(input.ndim());
  a.row_dims = p.row_dims;
  a.cols = 1;
  for (int k = 0; k < a.dim; ++k) {
    a.sizes[k] = input.shape(k);
    (k < p.row_dims ? a.rows : a.cols) *= a.sizes[k];
  }
  a.reduction = reduction_of(p.reduction);
  a.weight_denominator = p.weight_denominator;
  for (size_t k = 0; k < p.operands.size(); ++k) set_operand(a, a.operands[k], p.operands[k], "operand");
  set_optional(a, a.weight, p.weight, "weight");
  set_optional(a, a.multiplier, p.multiplier, "multiplier");
  set_optional(a, a.mask, p.mask, "mask");
  a.loss_type = a.accum;
  return a;
}

std::vector<py::ssize_t> shape_of(const PointwiseArgs& a, int dims) { return {a.sizes, a.sizes + dims}; }

// The gradients wanted, False, True or an array to write to for each operand: a list with None in the other places.
py::list want_grads(PointwiseArgs& a, const Problem& p, const std::vector<py::object>& wanted) {
  py::list grads;
  for (size_t k = 0; k < wanted.size(); ++k) {
    py::dict made;
    Output(wanted[k], p.operands.at(k).dtype(), shape_of(a, a.dim), "grad").put(made, "grad");
    const bool any = made.contains("grad");
    if (any) set_operand(a, a.grads[k], made["grad"], "grad");
    grads.append(any ? py::object(made["grad"]) : py::none());
  }
  return grads;
}

py::dict forward(const Problem& p, const std::vector<py::object>& grads, bool value_only) {
  PointwiseArgs a = pointwise_args(p);
  py::dict results;
  const bool none = a.reduction == Reduction::none;
  const py::array loss(numpy_dtype(a.loss_type), shape_of(a, none ? a.dim : a.row_dims));
  if (none)
    set_operand(a, a.loss_elements, loss, "loss");
  else
    a.loss_out = const_cast<void*>(loss.data());
  results["loss"] = loss;
  if (!none && !value_only) {
    std::vector<py::ssize_t> shape = shape_of(a, a.row_dims);
    if (a.sums > 1) shape.push_back(a.sums);
    const py::array factor(py::dtype("float64"), shape);
    a.factor = static_cast<double*>(const_cast<void*>(factor.data()));
    results["factor"] = factor;
  }
  results["grads"] = want_grads(a, p, grads);
  coalesce(a);
  run_core([&] { return run_pointwise_forward(a); });
  return results;
}

py::list backward(const py::array& grad_output, const py::array& factor, const Problem& p,
                  const std::vector<py::object>& wanted) {
  PointwiseArgs a = pointwise_args(p);
  if (a.reduction == Reduction::none) {
    set_operand(a, a.multiplier, grad_output, "grad_output");
  } else {
    const void* data = flat_input(factor, a.rows * a.sums, py::dtype("float64"), "factor");
    a.factor = static_cast<double*>(const_cast<void*>(data));
    a.grad_output = flat_input(grad_output, a.rows, grad_output.dtype(), "grad_output");
    a.grad_output_type = float_type(grad_output, "grad_output");
  }
  py::list grads = want_grads(a, p, wanted);
  coalesce(a);
  run_core([&] { return run_pointwise_backward(a); });
  return grads;
}

// The CUDA launch of a call on memory that is not there.
using Layout = std::tuple<std::string, std::vector<int64_t>, int>;  // dtype, strides, bytes past a multiple of 64
py::dict config(const std::vector<int64_t>& sizes, const std::vector<Layout>& operands,
                const std::vector<Layout>& grads, bool weight, bool mask, const std::string& reduction, int row_dims,
                int sums, bool streams, bool is_backward) {
  PointwiseArgs a;
  a.sums = sums;
  a.streams = streams;
  a.dim = int(sizes.size());
  a.row_dims = row_dims;
  a.cols = 1;
  for (int k = 0; k < a.dim; ++k) (k < row_dims ? a.rows : a.cols) *= a.sizes[k] = sizes[size_t(k)];
  a.reduction = reduction_of(reduction);
  const auto set = [&](PointwiseOperand& o, const Layout& layout) {
    const auto& [dtype, strides, offset] = layout;
    o.data = reinterpret_cast<void*>(uintptr_t(1 << 20) + uintptr_t(offset));
    o.type = named_type(dtype);
    if (o.type == DType::f64) a.accum = DType::f64;
    std::copy(strides.begin(), strides.end(), o.strides);
  };
  for (size_t k = 0; k < operands.size(); ++k) set(a.operands[k], operands[k]);
  for (size_t k = 0; k < grads.size(); ++k) set(a.grads[k], grads[k]);
  if (weight) a.weight = a.operands[0];
  if (mask) a.mask = a.operands[0];
  coalesce(a);
  const PointwiseConfig c = pointwise_config(a, is_backward ? PointwisePass::backward : PointwisePass::forward);
  py::dict d;
  d["regime"] = pointwise_regime_name(c.regime);
  d["wide"] = c.wide;
  d["parts"] = c.parts;
  d["grid"] = c.grid;
  d["workspace_bytes"] = c.workspace_bytes;
  return d;
}

py::list losses() {
  py::list all;
  for (const PointwiseLoss* loss = pointwise_losses(); loss->name; ++loss)
    all.append(py::make_tuple(loss->name, loss->operands, loss->sums, loss->params));
  return all;
}

}  // namespace

void bind_pointwise(py::module_& m) {
  using namespace py::literals;
  const py::object none = py::none();
  m.def("pointwise_losses", &losses, "(name, operands, sums, params) of every loss, in the order of their numbers.");
  m.def(
      "pointwise_forward",
      [](const std::vector<py::array>& operands, const std::string& loss, const std::vector<double>& params,
         const std::string& reduction, int row_dims, const py::object& weight, const py::object& multiplier,
         const py::object& mask, double weight_denominator, const std::vector<py::object>& grads, bool value_only) {
        return forward({operands, loss, params, reduction, row_dims, weight, multiplier, mask, weight_denominator},
                       grads, value_only);
      },
      "operands"_a, py::kw_only(), "loss"_a, "params"_a = std::vector<double>{}, "reduction"_a = "mean",
      "row_dims"_a = 0, "weight"_a = none, "multiplier"_a = none, "mask"_a = none, "weight_denominator"_a = 0.0,
      "grads"_a = std::vector<py::object>{}, "value_only"_a = false,
      "A dict of loss, factor and grads: for each operand False, True, or an array to write to.");
  m.def(
      "pointwise_backward",
      [](const py::array& grad_output, const py::array& factor, const std::vector<py::array>& operands,
         const std::string& loss, const std::vector<double>& params, const std::string& reduction, int row_dims,
         const py::object& weight, const py::object& multiplier, const py::object& mask, double weight_denominator,
         const std::vector<py::object>& grads) {
        return backward(grad_output, factor,
                        {operands, loss, params, reduction, row_dims, weight, multiplier, mask, weight_denominator},
                        grads);
      },
      "grad_output"_a, "factor"_a, "operands"_a, py::kw_only(), "loss"_a, "params"_a = std::vector<double>{},
      "reduction"_a = "mean", "row_dims"_a = 0, "weight"_a = none, "multiplier"_a = none, "mask"_a = none,
      "weight_denominator"_a = 0.0, "grads"_a = std::vector<bool>{true, true}, "A list of the gradients wanted.");
  m.def("pointwise_config", &config, "sizes"_a, "operands"_a, py::kw_only(), "grads"_a, "weight"_a = false,
        "mask"_a = false, "reduction"_a = "mean", "row_dims"_a = 0, "sums"_a = 1, "streams"_a = true,
        "is_backward"_a = false,
        "The CUDA launch of a call whose operands and gradients are (dtype, strides, bytes past a multiple of 64).");
}

}  // namespace fastloss
