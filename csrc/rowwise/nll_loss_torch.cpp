// Binding of nll_loss. input [N, C, d1, ...], target [N, d1, ...] integer, weight [C] accumulation dtype.
#include "../torch/support.h"
#include "nll_loss.h"
#if defined(FASTLOSS_HAVE_CUDA)
#include "nll_loss_cuda.h"
#endif

#include <tuple>

namespace fastloss {
namespace {

NllLossArgs arguments(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight, int64_t reduction,
                      int64_t loss_dtype, int64_t ignore_index, const Tensor& layout_of) {
  if (input.dim() < 2) throw std::invalid_argument("input: expected [N, C, ...]");
  NllLossArgs a;
  const Collapsed c = collapse({&input, &layout_of});
  a.outer = c.outer;
  a.classes = c.classes;
  a.inner = c.inner;
  a.input = input.data_ptr();
  a.input_type = dtype_of(input, "input");
  a.input_strides = c.strides[0];
  a.grad_strides = c.strides[1];
  if (target.numel() != a.rows() || !target.is_contiguous() || target.is_cuda() != input.is_cuda())
    throw std::invalid_argument("target: expected one contiguous class index per row on the device of the input");
  a.target = target.data_ptr();
  a.index_type = index_type_of(target);
  if (weight) {
    require_vector(*weight, "weight", a.classes, scalar_type_of(accum_of(a.input_type)), input);
    a.weight = weight->data_ptr();
  }
  a.reduction = Reduction(reduction);
  if (loss_dtype < 0 || loss_dtype > int64_t(DType::bf16)) throw std::invalid_argument("loss_dtype: unknown");
  a.loss_type = DType(loss_dtype);
  a.ignore_index = ignore_index;
  return a;
}

#if defined(FASTLOSS_HAVE_CUDA)
Status on_cuda(Status (*kernel)(const NllLossArgs&, const CudaContext&), const NllLossArgs& a, const Tensor& input) {
  CudaCall call(input);
  return kernel(a, call.with_workspace(nll_loss_workspace_bytes_cuda(a, call.context())));
}
#endif

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                                   int64_t reduction, int64_t loss_dtype, int64_t ignore_index) {
  NllLossArgs a = arguments(input, target, weight, reduction, loss_dtype, ignore_index, input);
  const int64_t dim = a.reduction == Reduction::none ? target.dim() : 0;
  Tensor loss = allocate(input, target.sizes().data(), dim, scalar_type_of(a.loss_type));
  Tensor total_weight = allocate_scalar(input, scalar_type_of(accum_of(a.input_type)));
  a.loss = loss.data_ptr();
  a.total_weight = total_weight.data_ptr();
  Status status;
#if defined(FASTLOSS_HAVE_CUDA)
  if (input.is_cuda())
    status = on_cuda(nll_loss_forward_cuda, a, input);
  else
#endif
    status = nll_loss_forward_cpu(a, torch_parallel);
  raise_if_failed(status, target, a.classes, ignore_index);
  return {loss, total_weight};
}

Tensor backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                const std::optional<Tensor>& weight, const Tensor& total_weight, int64_t reduction, int64_t loss_dtype,
                int64_t ignore_index) {
  Tensor grad = allocate_like(input);
  NllLossArgs a = arguments(input, target, weight, reduction, loss_dtype, ignore_index, grad);
  const bool per_row = a.reduction == Reduction::none;
  require_vector(grad_output, "grad_output", per_row ? a.rows() : 1, scalar_type_of(a.loss_type), input);
  require_vector(total_weight, "total_weight", 1, scalar_type_of(accum_of(a.input_type)), input);
  a.grad_output = grad_output.data_ptr();
  a.grad_output_per_row = per_row;
  a.total_weight = total_weight.data_ptr();
  a.grad = grad.data_ptr();
  Status status;
#if defined(FASTLOSS_HAVE_CUDA)
  if (input.is_cuda())
    status = on_cuda(nll_loss_backward_cuda, a, input);
  else
#endif
    status = nll_loss_backward_cpu(a, torch_parallel);
  raise_if_failed(status, target, a.classes, ignore_index);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastloss, m) {
  m.def(
      "nll_loss_forward(Tensor input, Tensor target, Tensor? weight, int reduction, int loss_dtype, int ignore_index) "
      "-> (Tensor, Tensor)");
  m.def(
      "nll_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor total_weight, int "
      "reduction, int loss_dtype, int ignore_index) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("nll_loss_forward", TORCH_BOX(&forward));
  m.impl("nll_loss_backward", TORCH_BOX(&backward));
}
#if defined(FASTLOSS_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastloss, CUDA, m) {
  m.impl("nll_loss_forward", TORCH_BOX(&forward));
  m.impl("nll_loss_backward", TORCH_BOX(&backward));
}
#endif

}  // namespace fastloss
