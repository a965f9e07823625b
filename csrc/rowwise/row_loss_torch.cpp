// Binding of the row losses. input [N, C, d1, ...], target [N, d1, ...] integer, weight [C] accumulation dtype; a loss
// goes by its number, its place in row_losses().
#include "../torch/support.h"
#include "row_losses.h"
#if defined(FASTLOSS_HAVE_CUDA)
#include "row_loss_cuda.h"
#endif

#include <tuple>
#include <vector>

namespace fastloss {
namespace {

// Bits of `flags`.
constexpr int64_t kMeanOverRows = 1;    // mean divides by the number of rows that count, not by their weights
constexpr int64_t kIgnoresNothing = 2;  // ignore_index says nothing

// The options, in the order of the operators' trailing arguments.
struct Options {
  int64_t kind;
  const std::vector<double>& params;
  int64_t reduction, loss_dtype, ignore_index, flags;
};

const RowLoss& loss_of(int64_t kind) {
  int64_t count = 0;
  while (row_losses()[count].name) ++count;
  if (kind < 0 || kind >= count)
    throw std::invalid_argument("loss: expected the number of a row loss, 0 to " + std::to_string(count - 1) +
                                ", got " + std::to_string(kind));
  return row_losses()[kind];
}

// All but input, loss and gradient. `logits` has the shape, dtype and device of the input.
RowLossArgs arguments(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight, const Options& o,
                      const Collapsed& c) {
  RowLossArgs a;
  const RowLoss& loss = loss_of(o.kind);
  a.kind = int(o.kind);
  if (o.params.size() != size_t(loss.params))
    throw std::invalid_argument("params: " + std::string(loss.name) + " takes " + std::to_string(loss.params) +
                                ", got " + std::to_string(o.params.size()));
  for (int i = 0; i < loss.params; ++i) a.params[i] = o.params[size_t(i)];
  a.outer = c.outer;
  a.classes = c.classes;
  a.inner = c.inner;
  a.input_type = dtype_of(logits, "input");
  if (target.numel() != a.rows() || !target.is_contiguous() || target.is_cuda() != logits.is_cuda())
    throw std::invalid_argument("target: expected one contiguous class index per row on the device of the input");
  a.target = target.data_ptr();
  a.index_type = index_type_of(target);
  if (weight) {
    require_vector(*weight, "weight", a.classes, scalar_type_of(accum_of(a.input_type)), logits);
    a.weight = weight->data_ptr();
  }
  a.ignore_index = o.ignore_index;
  a.ignores = !(o.flags & kIgnoresNothing);
  if (o.reduction < 0 || o.reduction > int64_t(Reduction::sum)) throw std::invalid_argument("reduction: unknown");
  a.reduction = Reduction(o.reduction);
  a.mean_over_rows = o.flags & kMeanOverRows;
  if (o.loss_dtype < 0 || o.loss_dtype > int64_t(DType::bf16)) throw std::invalid_argument("loss_dtype: unknown");
  a.loss_type = DType(o.loss_dtype);
  return a;
}

void require_classes(const Tensor& input) {
  if (input.dim() < 2) throw std::invalid_argument("input: expected [N, C, ...]");
}

void run(const RowLossArgs& a, bool backward, const Tensor& input, const Tensor& target) {
  Status status;
#if defined(FASTLOSS_HAVE_CUDA)
  if (input.is_cuda()) {
    CudaCall call(input);
    status = backward ? row_loss_backward_cuda(a, call.context())
                      : row_loss_forward_cuda(a, call.with_workspace(row_loss_workspace_bytes_cuda(a, call.context())));
  } else
#endif
    status = backward ? row_loss_backward_cpu(a, torch_parallel) : row_loss_forward_cpu(a, torch_parallel);
  raise_if_failed(status, target, a.classes, a.ignores ? std::optional(a.ignore_index) : std::nullopt);
}

// The loss; D too, where there is a place for it.
Tensor compute(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight, const Options& o,
               std::optional<Tensor>* total_weight) {
  require_classes(input);
  std::optional<Tensor> copy;
  std::optional<Collapsed> c = try_collapse({&input});
  if (!c) c = collapse({&copy.emplace(torch::stable::contiguous(input))});
  RowLossArgs a = arguments(input, target, weight, o, *c);
  a.input = copy ? copy->data_ptr() : input.data_ptr();
  a.input_strides = c->strides[0];
  const int64_t dim = a.reduction == Reduction::none ? target.dim() : 0;
  Tensor loss = allocate(input, target.sizes().data(), dim, scalar_type_of(a.loss_type));
  a.loss = loss.data_ptr();
  if (total_weight)
    a.total_weight = total_weight->emplace(allocate_scalar(input, scalar_type_of(accum_of(a.input_type)))).data_ptr();
  run(a, /*backward=*/false, input, target);
  return loss;
}

Tensor value(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight, int64_t loss,
             std::vector<double> params, int64_t reduction, int64_t loss_dtype, int64_t ignore_index, int64_t flags) {
  return compute(input, target, weight, {loss, params, reduction, loss_dtype, ignore_index, flags}, nullptr);
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                                   int64_t loss, std::vector<double> params, int64_t reduction, int64_t loss_dtype,
                                   int64_t ignore_index, int64_t flags) {
  std::optional<Tensor> total_weight;
  const Options o{loss, params, reduction, loss_dtype, ignore_index, flags};
  Tensor result = compute(input, target, weight, o, &total_weight);
  return {result, *total_weight};
}

Tensor backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                const std::optional<Tensor>& weight, const Tensor& total_weight, int64_t loss,
                std::vector<double> params, int64_t reduction, int64_t loss_dtype, int64_t ignore_index,
                int64_t flags) {
  require_classes(input);
  const bool reads = !loss_of(loss).linear;
  Tensor grad = allocate_like(input), elements = reads ? input : grad;
  std::optional<Collapsed> c = try_collapse({&elements, &grad});
  if (!c) {
    int64_t strides[kMaxDims];
    set_contiguous_strides(input.sizes().data(), input.dim(), strides);
    const int64_t bytes = input.numel() * int64_t(input.element_size());
    grad = allocate_result(input, input.sizes().data(), strides, input.dim(), input.scalar_type(), bytes);
    elements = reads ? torch::stable::contiguous(input) : grad;
    c = collapse({&elements, &grad});
  }
  RowLossArgs a = arguments(input, target, weight, {loss, params, reduction, loss_dtype, ignore_index, flags}, *c);
  a.input = reads ? elements.data_ptr() : nullptr;
  a.input_strides = c->strides[0];
  const bool per_row = a.reduction == Reduction::none;
  require_vector(grad_output, "grad_output", per_row ? a.rows() : 1, scalar_type_of(a.loss_type), input);
  require_vector(total_weight, "total_weight", 1, scalar_type_of(accum_of(a.input_type)), input);
  a.grad_output = grad_output.data_ptr();
  a.grad_output_per_row = per_row;
  a.total_weight = total_weight.data_ptr();
  a.grad = grad.data_ptr();
  a.grad_strides = c->strides[1];
  run(a, /*backward=*/true, input, target);
  return grad;
}

std::string names() {
  std::string all;
  for (const RowLoss* l = row_losses(); l->name; ++l) all += (all.empty() ? "" : " ") + std::string(l->name);
  return all;
}

std::string regime(const Tensor& input, const Tensor&, const std::optional<Tensor>&, int64_t loss, std::vector<double>,
                   int64_t, int64_t, int64_t, int64_t) {
  require_classes(input);
  const std::string what = loss_of(loss).sums == 0 ? "one element per row" : "whole rows";
  return what + (try_collapse({&input}) ? "" : ", of a contiguous copy");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastloss, m) {
  // `loss` is a number: the place in row_losses(). total_weight is what a mean divides by.
  m.def(
      "row_loss_value(Tensor input, Tensor target, Tensor? weight, int loss, float[] params, int reduction, int "
      "loss_dtype, int ignore_index, int flags) -> Tensor");
  m.def(
      "row_loss_forward(Tensor input, Tensor target, Tensor? weight, int loss, float[] params, int reduction, int "
      "loss_dtype, int ignore_index, int flags) -> (Tensor loss, Tensor total_weight)");
  m.def(
      "row_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor total_weight, int "
      "loss, float[] params, int reduction, int loss_dtype, int ignore_index, int flags) -> Tensor");
  m.def(
      "row_loss_regime(Tensor input, Tensor target, Tensor? weight, int loss, float[] params, int reduction, int "
      "loss_dtype, int ignore_index, int flags) -> str");
  m.def("row_losses() -> str");  // the names, in the order of their numbers, with spaces between
}
STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("row_loss_value", TORCH_BOX(&value));
  m.impl("row_loss_forward", TORCH_BOX(&forward));
  m.impl("row_loss_backward", TORCH_BOX(&backward));
}
#if defined(FASTLOSS_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastloss, CUDA, m) {
  m.impl("row_loss_value", TORCH_BOX(&value));
  m.impl("row_loss_forward", TORCH_BOX(&forward));
  m.impl("row_loss_backward", TORCH_BOX(&backward));
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fastloss, CompositeExplicitAutograd, m) {
  m.impl("row_loss_regime", TORCH_BOX(&regime));
  m.impl("row_losses", TORCH_BOX(&names));
}

}  // namespace fastloss
