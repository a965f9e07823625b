// Binding of the pointwise losses: checks, allocates, hands raw pointers to the core. One set of operators for all of
// them; `loss` is the number in pointwise_losses(). The operators are private: their outputs carry no autograd, the
// Python face adds it.
//
//   operands       input, target and, of losses that have them, a third and a fourth, 1 where they are absent; all of
//                  one shape, any strides (expanded tensors have stride 0); float32, float64, float16, bfloat16
//   weight, mask   that shape too; any of these dtypes, bool
//   sample_weight  as weight, which it multiplies; broadcast (stride 0) where the weight is not
//   params         the loss's parameters
//   row_dims       leading axes that are not reduced
//   flags          bit k: the gradient of operand k is wanted. Results hold those wanted alone, in their order
//   loss           [], the leading axes, or for reduction none the shape of input; of loss_dtype (the value of DType)
//   factor         [*rows] or, of a loss with several sums, [*rows, sums], float64, see pointwise.h; [0] for reduction
//                  none
#include "../common/cpu_isa.h"
#include "../torch/domains.h"
#include "../torch/support.h"
#include "layout.h"
#if defined(FASTLOSS_HAVE_CUDA)
#include "pointwise_cuda.h"
#endif

#include <tuple>
#include <vector>

namespace fastloss {
namespace {

using OptionalTensor = std::optional<Tensor>;

const PointwiseLoss& loss_of(int64_t number) {
  static const int64_t count = [] {
    int64_t n = 0;
    while (pointwise_losses()[n].name) ++n;
    return n;
  }();
  if (number < 0 || number >= count) throw std::invalid_argument("loss: unknown");
  return pointwise_losses()[number];
}

// One operator call: the contract's arguments, for tensors of one shape.
class Call {
 public:
  PointwiseArgs args;

  Call(const Tensor& input, const Tensor& target, int64_t loss, int64_t reduction, int64_t loss_dtype,
       const std::vector<double>& params, const OptionalTensor& third = {}, const OptionalTensor& fourth = {},
       const OptionalTensor& weight = {}, const OptionalTensor& mask = {}, int64_t row_dims = 0,
       double weight_denominator = 0, const OptionalTensor& sample_weight = {})
      : operands_{&input, &target, third ? &*third : nullptr, fourth ? &*fourth : nullptr},
        is_cuda_(input.is_cuda()),
        device_(input.get_device_index()) {
    const PointwiseLoss& what = loss_of(loss);
    const auto sizes = input.sizes();
    const int64_t dim = int64_t(sizes.size());
    if (dim > kPointwiseDims) throw std::invalid_argument("input: too many dimensions");
    if (row_dims < 0 || row_dims > dim) throw std::invalid_argument("row_dims: more than there are");
    if (loss_dtype < 0 || loss_dtype > int64_t(DType::bf16)) throw std::invalid_argument("loss_dtype: unknown");
    if (int64_t(params.size()) != what.params)
      throw std::invalid_argument("params: " + std::string(what.name) + " takes " + std::to_string(what.params));
    args.set_loss(what);
    domains_ = what.domains;
    for (size_t i = 0; i < params.size(); ++i) args.params[i] = params[i];
    args.dim = int(dim);
    args.row_dims = int(row_dims);
    args.cols = 1;
    for (int d = 0; d < args.dim; ++d) {
      args.sizes[d] = sizes[size_t(d)];
      (d < args.row_dims ? args.rows : args.cols) *= args.sizes[d];
    }
    args.reduction = Reduction(reduction);
    if (what.finishes && args.reduction == Reduction::none)
      throw std::invalid_argument("reduction: " + std::string(what.name) +
                                  " has a value for a row, not for an element");
    args.weight_denominator = weight_denominator;
    args.loss_type = DType(loss_dtype);
    static constexpr const char* names[] = {"input", "target", "third operand", "fourth operand"};
    for (int k = 0; k < kPointwiseOperands; ++k) {
      if (!operands_[k]) continue;
      if (k >= what.operands) throw std::invalid_argument(std::string(names[k]) + ": " + what.name + " has none");
      set(args.operands[k], *operands_[k], names[k]);
    }
    if (weight) set(args.weight, *weight, "weight");
    if (sample_weight) set(args.multiplier, *sample_weight, "sample_weight");
    if (mask) {
      if (mask->scalar_type() != ScalarType::Bool) throw std::invalid_argument("mask: expected bool");
      set(args.mask, *mask, nullptr);
    }
  }

  Tensor allocate_loss() {
    const ScalarType type = scalar_type_of(args.loss_type);
    if (args.reduction == Reduction::none) return like(input(), &args.loss_elements, type);
    Tensor loss = allocate(input(), args.sizes, args.row_dims, type);
    args.loss_out = loss.data_ptr();
    return loss;
  }
  Tensor allocate_factor() {
    if (args.reduction == Reduction::none) return allocate(input(), int64_t(0), ScalarType::Double);
    int64_t shape[kPointwiseDims + 1];
    int64_t dim = 0;
    for (; dim < args.row_dims; ++dim) shape[dim] = args.sizes[dim];
    if (args.sums > 1) shape[dim++] = args.sums;
    Tensor factor = allocate(input(), shape, dim, ScalarType::Double);
    args.factor = static_cast<double*>(factor.data_ptr());
    return factor;
  }
  std::vector<Tensor> allocate_grads(int64_t flags) {
    std::vector<Tensor> grads;
    for (int k = 0; k < kPointwiseOperands; ++k) {
      if (!(flags >> k & 1)) continue;
      if (!operands_[k]) throw std::invalid_argument("flags: the gradient of an operand that is not there");
      grads.push_back(like(*operands_[k], &args.grads[k], operands_[k]->scalar_type()));
    }
    if (flags >> kPointwiseOperands) throw std::invalid_argument("flags: more bits than operands");
    return grads;
  }
  void set_factor(const Tensor& factor) {
    if (args.reduction == Reduction::none) return;
    require_vector(factor, "factor", args.rows * args.sums, ScalarType::Double, input());
    args.factor = static_cast<double*>(factor.data_ptr());
  }
  void set_grad_output(const Tensor& grad_output) {
    if (args.reduction == Reduction::none) {
      if (args.multiplier.data)
        throw std::invalid_argument("sample_weight: with reduction none a factor of grad_output");
      return set(args.multiplier, grad_output, "grad_output");
    }
    require_vector(grad_output, "grad_output", args.rows, grad_output.scalar_type(), input());
    args.grad_output = grad_output.data_ptr();
    args.grad_output_type = dtype_of(grad_output, "grad_output");
  }

  void forward() {
    coalesce(args);
#if defined(FASTLOSS_HAVE_CUDA)
    if (is_cuda_) return run_on_gpu(PointwisePass::forward);
#endif
    const Status status = pointwise_forward_cpu(args, torch_parallel);
    if (status.code == Status::bad_target) raise_outside_domain(domains_[status.row], int(status.row), status.value);
    raise_if_failed(status, input(), 0, 0);
  }
  void backward() {
    coalesce(args);
#if defined(FASTLOSS_HAVE_CUDA)
    if (is_cuda_) return run_on_gpu(PointwisePass::backward);
#endif
    raise_if_failed(pointwise_backward_cpu(args, torch_parallel), input(), 0, 0);
  }
  std::string regime() {
    coalesce(args);
#if defined(FASTLOSS_HAVE_CUDA)
    if (is_cuda_) return pointwise_regime_name(pointwise_config(args, PointwisePass::forward).regime);
#endif
    return std::string(isa_name(current_isa())) + ", elementwise";
  }

 private:
  const Tensor* operands_[kPointwiseOperands];
  const Domain* domains_ = nullptr;
  const bool is_cuda_;
  const int32_t device_;

  const Tensor& input() const { return *operands_[0]; }

  void set(PointwiseOperand& operand, const Tensor& t, const char* name) {
    const auto sizes = t.sizes(), strides = t.strides();
    bool same = int64_t(sizes.size()) == args.dim && t.is_cuda() == is_cuda_ && t.get_device_index() == device_;
    for (int d = 0; same && d < args.dim; ++d) same = sizes[size_t(d)] == args.sizes[d];
    if (!same)
      throw std::invalid_argument(std::string(name ? name : "mask") + ": expected the shape and device of the input");
    operand.data = t.data_ptr();
    if (operand.data == nullptr) operand.data = &args;  // empty: never read, but there
    if (name) {
      operand.type = dtype_of(t, name);
      if (operand.type == DType::f64) args.accum = DType::f64;
    }
    for (int d = 0; d < args.dim; ++d) operand.strides[d] = strides[size_t(d)];
  }

  // A result in the shape of `like`: its own layout where that is dense, else contiguous.
  Tensor like(const Tensor& like, PointwiseOperand* operand, ScalarType type) {
    int64_t order[kPointwiseDims], expected = 1, n = 0;
    const auto of_like = like.strides();
    for (int d = 0; d < args.dim; ++d) {
      operand->strides[d] = of_like[size_t(d)];
      if (args.sizes[d] == 1) continue;
      int64_t at = n++;
      for (; at > 0 && operand->strides[order[at - 1]] > operand->strides[d]; --at) order[at] = order[at - 1];
      order[at] = d;
    }
    bool dense = true;
    for (int64_t i = 0; i < n; ++i) {
      dense &= operand->strides[order[i]] == expected;
      expected *= args.sizes[order[i]];
    }
    if (!dense && args.count() > 0) set_contiguous_strides(args.sizes, args.dim, operand->strides);
    operand->type = type == ScalarType::Double  ? DType::f64
                    : type == ScalarType::Float ? DType::f32
                    : type == ScalarType::Half  ? DType::f16
                                                : DType::bf16;
    Tensor t =
        allocate_result(input(), args.sizes, operand->strides, args.dim, type, args.count() * size_of(operand->type));
    operand->data = t.data_ptr();
    if (operand->data == nullptr) operand->data = &args;
    if (operand->type == DType::f64) args.accum = DType::f64;
    return t;
  }

#if defined(FASTLOSS_HAVE_CUDA)
  void run_on_gpu(PointwisePass pass) {
    CudaCall call(input());
    const PointwiseConfig config = pointwise_config(args, pass);
    raise_if_failed(pointwise_cuda(args, config, call.with_workspace(config.workspace_bytes)), input(), 0, 0);
  }
#endif
};

Tensor value(const Tensor& input, const Tensor& target, int64_t loss, int64_t reduction, int64_t loss_dtype,
             int64_t flags, const std::vector<double>& params, const OptionalTensor& third,
             const OptionalTensor& fourth, const OptionalTensor& weight, const OptionalTensor& mask, int64_t row_dims,
             double weight_denominator, const OptionalTensor& sample_weight) {
  if (flags) throw std::invalid_argument("flags: a value has no gradients");
  Call call(input, target, loss, reduction, loss_dtype, params, third, fourth, weight, mask, row_dims,
            weight_denominator, sample_weight);
  Tensor result = call.allocate_loss();
  call.forward();
  return result;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> forward(const Tensor& input, const Tensor& target, int64_t loss,
                                                        int64_t reduction, int64_t loss_dtype, int64_t flags,
                                                        const std::vector<double>& params, const OptionalTensor& third,
                                                        const OptionalTensor& fourth, const OptionalTensor& weight,
                                                        const OptionalTensor& mask, int64_t row_dims,
                                                        double weight_denominator,
                                                        const OptionalTensor& sample_weight) {
  Call call(input, target, loss, reduction, loss_dtype, params, third, fourth, weight, mask, row_dims,
            weight_denominator, sample_weight);
  if (flags && (call.args.reduction == Reduction::none || call.args.sums > 1))
    throw std::invalid_argument("flags: a gradient in forward is for reductions of one sum");
  Tensor result = call.allocate_loss();
  Tensor factor = call.allocate_factor();
  std::vector<Tensor> grads = call.allocate_grads(flags);
  call.forward();
  return {result, factor, grads};
}

// Loss and the input's gradient of calls that leave the rest at its defaults, for the sake of small ones: the
// dispatcher takes 0.1 to 0.3 us for every argument, and 4 us more for three results of which one is a list. Where the
// gradient's factor is known at the end only (a root), the operands are read again at once, from the cache.
std::tuple<Tensor, Tensor> plain_grad(const Tensor& input, const Tensor& target, int64_t loss, int64_t reduction,
                                      int64_t loss_dtype, const std::vector<double>& params) {
  Call call(input, target, loss, reduction, loss_dtype, params);
  if (call.args.reduction == Reduction::none) throw std::invalid_argument("reduction: expected mean or sum");
  Tensor result = call.allocate_loss();
  if (factor_is_known(call.args)) {
    Tensor grad = call.allocate_grads(1)[0];
    call.forward();
    return {result, grad};
  }
  const Tensor factor = call.allocate_factor();
  call.forward();
  Call again(input, target, loss, reduction, loss_dtype, params);
  again.set_factor(factor);
  Tensor grad = again.allocate_grads(1)[0];
  again.backward();
  return {result, grad};
}

std::vector<Tensor> backward(const Tensor& grad_output, const Tensor& factor, const Tensor& input, const Tensor& target,
                             int64_t loss, int64_t reduction, int64_t loss_dtype, int64_t flags,
                             const std::vector<double>& params, const OptionalTensor& third,
                             const OptionalTensor& fourth, const OptionalTensor& weight, const OptionalTensor& mask,
                             int64_t row_dims, double weight_denominator, const OptionalTensor& sample_weight) {
  Call call(input, target, loss, reduction, loss_dtype, params, third, fourth, weight, mask, row_dims,
            weight_denominator, sample_weight);
  call.set_factor(factor);
  call.set_grad_output(grad_output);
  std::vector<Tensor> grads = call.allocate_grads(flags);
  if (flags) call.backward();
  return grads;
}

// Which kernel gives the value, in words.
std::string regime(const Tensor& input, const Tensor& target, int64_t loss, int64_t reduction, int64_t loss_dtype,
                   int64_t, const std::vector<double>& params, const OptionalTensor& third,
                   const OptionalTensor& fourth, const OptionalTensor& weight, const OptionalTensor& mask,
                   int64_t row_dims, double weight_denominator, const OptionalTensor& sample_weight) {
  Call call(input, target, loss, reduction, loss_dtype, params, third, fourth, weight, mask, row_dims,
            weight_denominator, sample_weight);
  return call.regime();
}

// "name:operands:sums:params" of each loss, in the order of their numbers.
std::string losses() {
  std::string all;
  for (const PointwiseLoss* loss = pointwise_losses(); loss->name; ++loss)
    all += std::string(all.empty() ? "" : " ") + loss->name + ":" + std::to_string(loss->operands) + ":" +
           std::to_string(loss->sums) + ":" + std::to_string(loss->params);
  return all;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastloss, m) {
  m.def("pointwise_losses() -> str");
  // What most calls leave at their defaults comes last, and is not passed.
  const std::string call =
      "Tensor input, Tensor target, int loss, int reduction, int loss_dtype, int flags, float[] params=[], Tensor? "
      "third=None, Tensor? fourth=None, Tensor? weight=None, Tensor? mask=None, int row_dims=0, float "
      "weight_denominator=0.0, Tensor? sample_weight=None) -> ";
  auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
  define("pointwise_value(" + call + "Tensor");
  define("pointwise_forward(" + call + "(Tensor, Tensor, Tensor[])");
  define(
      "pointwise_plain_grad(Tensor input, Tensor target, int loss, int reduction, int loss_dtype, float[] params=[]) "
      "-> "
      "(Tensor, Tensor)");
  define("pointwise_backward(Tensor grad_output, Tensor factor, " + call + "Tensor[]");
  define("pointwise_regime(" + call + "str");
}
STABLE_TORCH_LIBRARY_IMPL(fastloss, CompositeExplicitAutograd, m) { m.impl("pointwise_losses", TORCH_BOX(&losses)); }
STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("pointwise_value", TORCH_BOX(&value));
  m.impl("pointwise_forward", TORCH_BOX(&forward));
  m.impl("pointwise_plain_grad", TORCH_BOX(&plain_grad));
  m.impl("pointwise_backward", TORCH_BOX(&backward));
  m.impl("pointwise_regime", TORCH_BOX(&regime));
}
#if defined(FASTLOSS_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastloss, CUDA, m) {
  m.impl("pointwise_value", TORCH_BOX(&value));
  m.impl("pointwise_forward", TORCH_BOX(&forward));
  m.impl("pointwise_plain_grad", TORCH_BOX(&plain_grad));
  m.impl("pointwise_backward", TORCH_BOX(&backward));
  m.impl("pointwise_regime", TORCH_BOX(&regime));
}
#endif

}  // namespace fastloss
