// Binding of the pointwise losses: checks, allocates, hands raw pointers to the core. One set of operators for all of
// them; `loss` is the number in pointwise_names(). The operators are private: their outputs carry no autograd, the
// Python face (losses/_pointwise.py) adds it.
//
//   input, target  the same shape, any strides (expanded tensors have stride 0); float32, float64, float16, bfloat16
//   weight, mask   that shape too; any of these dtypes, bool
//   row_dims       leading axes that are not reduced
//   loss           [], the leading axes, or for reduction none the shape of input; of loss_dtype (the value of DType)
//   factor         [rows] float64, see pointwise.h; empty for reduction none
#include "../torch/support.h"
#include "layout.h"
#if defined(FASTLOSS_HAVE_CUDA)
#include "pointwise_cuda.h"
#endif

#include <tuple>

namespace fastloss {
namespace {

enum Flags : int64_t { kGradInput = 1, kGradTarget = 2 };
using OptionalTensor = std::optional<Tensor>;

// One operator call: the contract's arguments, for tensors of one shape.
class Call {
 public:
  PointwiseArgs args;

  Call(const Tensor& input, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& mask,
       int64_t loss, double param, int64_t reduction, int64_t row_dims, double weight_denominator, int64_t loss_dtype)
      : input_(input) {
    if (input.dim() > kPointwiseDims) throw std::invalid_argument("input: too many dimensions");
    if (loss < 0 || loss >= count_losses()) throw std::invalid_argument("loss: unknown");
    if (row_dims < 0 || row_dims > input.dim()) throw std::invalid_argument("row_dims: more than there are");
    if (loss_dtype < 0 || loss_dtype > int64_t(DType::bf16)) throw std::invalid_argument("loss_dtype: unknown");
    args.loss = int(loss);
    args.param = param;
    args.dim = int(input.dim());
    args.row_dims = int(row_dims);
    args.cols = 1;
    for (int d = 0; d < args.dim; ++d) {
      args.sizes[d] = input.size(d);
      (d < args.row_dims ? args.rows : args.cols) *= args.sizes[d];
    }
    args.reduction = Reduction(reduction);
    args.weight_denominator = weight_denominator;
    args.loss_type = DType(loss_dtype);
    set(args.input, input, "input");
    set(args.target, target, "target");
    if (weight) set(args.weight, *weight, "weight");
    if (mask) {
      if (mask->scalar_type() != ScalarType::Bool) throw std::invalid_argument("mask: expected bool");
      set(args.mask, *mask, nullptr);
    }
  }

  // Results in the shape of `like`: its own layout where that is dense, else contiguous.
  Tensor like(const Tensor& like, PointwiseOperand* operand, ScalarType type) {
    int64_t strides[kPointwiseDims], order[kPointwiseDims], expected = 1, n = 0;
    for (int64_t d = 0; d < like.dim(); ++d) {
      strides[d] = like.stride(d);
      if (like.size(d) == 1) continue;
      int64_t at = n++;
      for (; at > 0 && like.stride(order[at - 1]) > strides[d]; --at) order[at] = order[at - 1];
      order[at] = d;
    }
    bool dense = true;
    for (int64_t i = 0; i < n; ++i) {
      dense &= strides[order[i]] == expected;
      expected *= like.size(order[i]);
    }
    if (!dense && like.numel() > 0) set_contiguous_strides(like.sizes().data(), like.dim(), strides);
    Tensor t = allocate_result(input_, like.sizes().data(), strides, like.dim(), type,
                               like.numel() * (type == ScalarType::Double  ? 8
                                               : type == ScalarType::Float ? 4
                                                                           : 2));
    set(*operand, t, nullptr);
    operand->type = dtype_of(t, "result");
    return t;
  }
  Tensor rows(ScalarType type) const {  // contiguous, the leading axes
    return allocate(input_, input_.sizes().data(), args.row_dims, type);
  }
  Tensor nothing(ScalarType type = ScalarType::Float) const { return allocate(input_, int64_t(0), type); }

  Tensor allocate_loss() {
    const ScalarType type = scalar_type_of(args.loss_type);
    if (args.reduction == Reduction::none) return like(input_, &args.loss_elements, type);
    Tensor loss = rows(type);
    args.loss_out = loss.data_ptr();
    return loss;
  }
  void set_factor(const Tensor& factor) {
    if (args.reduction == Reduction::none) return;
    require_vector(factor, "factor", args.rows, ScalarType::Double, input_);
    args.factor = static_cast<double*>(factor.data_ptr());
  }
  void set_grad_output(const Tensor& grad_output) {
    if (args.reduction == Reduction::none) return set(args.grad_output_elements, grad_output, "grad_output");
    require_vector(grad_output, "grad_output", args.rows, grad_output.scalar_type(), input_);
    args.grad_output = grad_output.data_ptr();
    args.grad_output_type = dtype_of(grad_output, "grad_output");
  }
  std::tuple<Tensor, Tensor> allocate_grads(const Tensor& target, int64_t flags) {
    return {flags & kGradInput ? like(input_, &args.grad_input, input_.scalar_type()) : nothing(),
            flags & kGradTarget ? like(target, &args.grad_target, target.scalar_type()) : nothing()};
  }
  void set(PointwiseOperand& operand, const Tensor& t, const char* name) {
    bool same = t.dim() == input_.dim() && t.is_cuda() == input_.is_cuda();
    for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == input_.size(d);
    if (!same || t.get_device_index() != input_.get_device_index())
      throw std::invalid_argument(std::string(name ? name : "mask") + ": expected the shape and device of the input");
    operand.data = t.data_ptr();
    if (operand.data == nullptr) operand.data = &args;  // empty: never read, but there
    if (name) {
      operand.type = dtype_of(t, name);
      if (operand.type == DType::f64) args.accum = DType::f64;
    }
    for (int64_t d = 0; d < t.dim(); ++d) operand.strides[d] = t.stride(d);
  }

  template <class Cpu, class Cuda>
  void run(Cpu* cpu, Cuda* cuda) {
    coalesce(args);
    Status status;
#if defined(FASTLOSS_HAVE_CUDA)
    if (input_.is_cuda()) {
      CudaCall call(input_);
      status = cuda(args, call.with_workspace(pointwise_workspace_bytes_cuda(args, call.context())));
    } else
#endif
      status = cpu(args, torch_parallel);
    (void)cuda;
    raise_if_failed(status, input_, 0, 0);
  }

 private:
  const Tensor& input_;

  static int64_t count_losses() {
    int64_t n = 0;
    while (pointwise_names()[n]) ++n;
    return n;
  }
};

#if !defined(FASTLOSS_HAVE_CUDA)
using NoCuda = Status(const PointwiseArgs&);
constexpr NoCuda *pointwise_forward_cuda = nullptr, *pointwise_backward_cuda = nullptr,
                 *pointwise_second_cuda = nullptr;
#endif

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& target,
                                                   const OptionalTensor& weight, const OptionalTensor& mask,
                                                   int64_t loss, double param, int64_t reduction, int64_t row_dims,
                                                   double weight_denominator, int64_t loss_dtype, int64_t flags) {
  Call call(input, target, weight, mask, loss, param, reduction, row_dims, weight_denominator, loss_dtype);
  if (flags && call.args.reduction == Reduction::none)
    throw std::invalid_argument("flags: a gradient in forward is for reductions");
  Tensor value = call.allocate_loss();
  Tensor factor =
      call.args.reduction == Reduction::none ? call.nothing(ScalarType::Double) : call.rows(ScalarType::Double);
  call.set_factor(factor);
  auto [grad_input, grad_target] = call.allocate_grads(target, flags);
  call.run(pointwise_forward_cpu, pointwise_forward_cuda);
  return {value, factor, grad_input, grad_target};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                    const OptionalTensor& weight, const OptionalTensor& mask, const Tensor& factor,
                                    int64_t loss, double param, int64_t reduction, int64_t row_dims,
                                    double weight_denominator, int64_t loss_dtype, int64_t flags) {
  Call call(input, target, weight, mask, loss, param, reduction, row_dims, weight_denominator, loss_dtype);
  call.set_factor(factor);
  call.set_grad_output(grad_output);
  auto grads = call.allocate_grads(target, flags);
  if (flags) call.run(pointwise_backward_cpu, pointwise_backward_cuda);
  return grads;
}

// Along tangents of input and target: the derivative of the loss (flags 0), or grad_output times that of the gradients.
std::tuple<Tensor, Tensor, Tensor> second(const OptionalTensor& grad_output, const Tensor& input, const Tensor& target,
                                          const OptionalTensor& weight, const OptionalTensor& mask,
                                          const Tensor& factor, const OptionalTensor& tangent_input,
                                          const OptionalTensor& tangent_target, int64_t loss, double param,
                                          int64_t reduction, int64_t row_dims, double weight_denominator,
                                          int64_t loss_dtype, int64_t flags) {
  Call call(input, target, weight, mask, loss, param, reduction, row_dims, weight_denominator, loss_dtype);
  if (pointwise_has_root(call.args.loss))
    throw std::invalid_argument("loss: one with a root is differentiated twice by composition");
  call.set_factor(factor);
  if (grad_output) call.set_grad_output(*grad_output);
  if (tangent_input) call.set(call.args.tangent_input, *tangent_input, "tangent_input");
  if (tangent_target) call.set(call.args.tangent_target, *tangent_target, "tangent_target");
  Tensor value = flags ? call.nothing() : call.allocate_loss();
  auto [grad_input, grad_target] = call.allocate_grads(target, flags);
  call.run(pointwise_second_cpu, pointwise_second_cuda);
  return {value, grad_input, grad_target};
}

std::string names() {
  std::string all;
  for (const char* const* name = pointwise_names(); *name; ++name)
    all += all.empty() ? *name : std::string(" ") + *name;
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastloss, m) {
  m.def("pointwise_losses() -> str");  // the names, in the order of the numbers
  m.def(
      "pointwise_forward(Tensor input, Tensor target, Tensor? weight, Tensor? mask, int loss, float param, int "
      "reduction, int row_dims, float weight_denominator, int loss_dtype, int flags) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "pointwise_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor? mask, Tensor "
      "factor, int loss, float param, int reduction, int row_dims, float weight_denominator, int loss_dtype, int "
      "flags) -> (Tensor, Tensor)");
  m.def(
      "pointwise_second(Tensor? grad_output, Tensor input, Tensor target, Tensor? weight, Tensor? mask, Tensor factor, "
      "Tensor? tangent_input, Tensor? tangent_target, int loss, float param, int reduction, int row_dims, float "
      "weight_denominator, int loss_dtype, int flags) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastloss, CompositeExplicitAutograd, m) { m.impl("pointwise_losses", TORCH_BOX(&names)); }
STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("pointwise_forward", TORCH_BOX(&forward));
  m.impl("pointwise_backward", TORCH_BOX(&backward));
  m.impl("pointwise_second", TORCH_BOX(&second));
}
#if defined(FASTLOSS_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastloss, CUDA, m) {
  m.impl("pointwise_forward", TORCH_BOX(&forward));
  m.impl("pointwise_backward", TORCH_BOX(&backward));
  m.impl("pointwise_second", TORCH_BOX(&second));
}
#endif

}  // namespace fastloss
