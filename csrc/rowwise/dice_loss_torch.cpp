// Binding of dice_loss and its family. The operators are private: their outputs carry no autograd.
//
//   input     [N, C, d1, ...] float32, float64, float16, bfloat16
//   target    [N, d1, ...] any integer dtype, contiguous; or floating, of the input's shape
//   weight    [C], accumulation dtype (float64 for a float64 input, else float32)
//   loss      [], or for reduction none [C'] with `batch`, else [N, C']; of loss_dtype (the value of DType). C' is C,
//   or
//             C - 1 without the background
//   saved     [3 C N + 2], with `batch` [3 C + 2], float64: what backward needs
#include "../common/cpu_isa.h"
#include "../torch/support.h"
#include "dice_loss.h"
#if defined(FASTLOSS_HAVE_CUDA)
#include "dice_loss_cuda.h"
#endif

#include <tuple>
#include <vector>

namespace fastloss {
namespace {

using OptionalTensor = std::optional<Tensor>;

// What an operator takes beside its tensors. `loss`: 0 dice, no params; 1 tversky, with alpha, beta, gamma; 2 dice and
// cross entropy, with lambda_dice, lambda_ce, label_smoothing.
struct Options {
  int64_t loss;
  const std::vector<double>& params;
  int64_t activation;
  bool batch, squared, include_background, skip_absent;
  double smooth_nr, smooth_dr;
  int64_t ignore_index, reduction, loss_dtype;
};

// One operator call: the contract's arguments, and the tensors whose storage they point into.
struct Call {
  DiceLossArgs args;
  Tensor input, target;
  bool batch;

  Call(const Tensor& input, const Tensor& target, const OptionalTensor& weight, const Options& o)
      : input(input), target(target), batch(o.batch) {
    if (input.dim() < 2) throw std::invalid_argument("input: expected [N, C, ...]");
    args.input_type = dtype_of(input, "input");
    args.dense = is_floating(target);
    args.groups = batch ? 1 : input.size(0);
    if (args.dense) {
      if (target.numel() != input.numel() || target.dim() != input.dim())
        throw std::invalid_argument("target: a floating one needs the shape of the input");
      args.target_type = dtype_of(target, "target");
    } else {
      if (!target.is_contiguous()) throw std::invalid_argument("target: expected contiguous class indices");
      args.index_type = index_type_of(target);
    }
    if (target.is_cuda() != input.is_cuda() || target.get_device_index() != input.get_device_index())
      throw std::invalid_argument("target: expected the device of the input");
    if (weight) {
      require_vector(*weight, "weight", input.size(1), scalar_type_of(accum_of(args.input_type)), input);
      args.weight = weight->data_ptr();
    }
    if (o.activation < 0 || o.activation > int64_t(Activation::sigmoid))
      throw std::invalid_argument("activation: unknown");
    if (o.loss_dtype < 0 || o.loss_dtype > int64_t(DType::bf16)) throw std::invalid_argument("loss_dtype: unknown");
    if (o.loss < 0 || o.loss > 2 || o.params.size() != (o.loss == 0 ? 0 : 3))
      throw std::invalid_argument("loss: expected 0 without params, 1 or 2 with three");
    args.activation = Activation(o.activation);
    args.squared = o.squared;
    args.skip_absent = o.skip_absent;
    args.first_class = o.include_background ? 0 : 1;
    args.smooth_nr = o.smooth_nr;
    args.smooth_dr = o.smooth_dr;
    args.ignore_index = o.ignore_index;
    args.reduction = Reduction(o.reduction);
    args.loss_type = DType(o.loss_dtype);
    if (o.loss == 1) {
      args.tversky = true;
      args.alpha = o.params[0];
      args.beta = o.params[1];
      args.gamma = o.params[2];
    } else if (o.loss == 2) {
      args.lambda_dice = o.params[0];
      args.lambda_ce = o.params[1];
      args.smoothing = o.params[2];
    }
    if (!args.consistent())
      throw std::invalid_argument("loss: a cross entropy expected a softmax, class indices and a reduction");
  }

  // Fixes the [outer, classes, inner] view of input, dense target and gradient, if there is one. Where no view suits
  // them all, contiguous tensors take their place, *grad's too.
  void set_layout(Tensor* grad) {
    auto view = [&] { return collapse({&input, args.dense ? &target : &input, grad ? grad : &input}); };
    Collapsed c;
    try {
      c = view();
    } catch (const std::invalid_argument&) {
      input = torch::stable::contiguous(input);
      if (args.dense) target = torch::stable::contiguous(target);
      if (grad) *grad = allocate(*grad, grad->sizes().data(), grad->dim(), grad->scalar_type());
      c = view();
    }
    args.input = input.data_ptr();
    args.target = target.data_ptr();
    args.outer = c.outer;
    args.classes = c.classes;
    args.inner = c.inner;
    args.input_strides = c.strides[0];
    args.target_strides = c.strides[1];
    args.grad_strides = args.grad_target_strides = c.strides[2];
    if (!args.dense && target.numel() != args.rows())
      throw std::invalid_argument("target: expected one class index per row");
  }
  int64_t losses() const { return args.classes > args.first_class ? args.classes - args.first_class : 0; }

  Tensor forward(bool save, Tensor* saved) {
    set_layout(nullptr);
    const int64_t sizes[] = {args.groups, losses()}, skipped = batch ? 1 : 0;
    const int64_t dim = args.reduction == Reduction::none ? 2 - skipped : 0;
    Tensor loss = allocate(input, sizes + skipped, dim, scalar_type_of(args.loss_type));
    args.loss = loss.data_ptr();
    if (save) {
      const int64_t saved_size = args.saved_count();
      *saved = allocate(input, &saved_size, 1, ScalarType::Double);
      args.saved = static_cast<double*>(saved->data_ptr());
    }
    Status status;
#if defined(FASTLOSS_HAVE_CUDA)
    if (input.is_cuda())
      status = on_cuda(dice_loss_forward_cuda);
    else
#endif
      status = dice_loss_forward_cpu(args, torch_parallel);
    raise_if_failed(status, target, args.classes, args.ignore_index);
    return loss;
  }

  Tensor backward(bool of_target, const Tensor& grad_output, const Tensor& saved) {
    if (of_target && !args.dense) throw std::invalid_argument("target: class indices have no gradient");
    Tensor grad = allocate_like(of_target ? target : input);
    Tensor to = grad;
    set_layout(&to);
    (of_target ? args.grad_target : args.grad) = to.data_ptr();
    require_vector(saved, "saved", args.saved_count(), ScalarType::Double, input);
    args.saved = static_cast<double*>(saved.data_ptr());
    const int64_t count = args.reduction == Reduction::none ? args.groups * losses() : 1;
    require_vector(grad_output, "grad_output", count, scalar_type_of(args.loss_type), input);
    args.grad_output = grad_output.data_ptr();
    Status status;
#if defined(FASTLOSS_HAVE_CUDA)
    if (input.is_cuda())
      status = on_cuda(dice_loss_backward_cuda);
    else
#endif
      status = dice_loss_backward_cpu(args, torch_parallel);
    raise_if_failed(status, target, args.classes, args.ignore_index);
    if (to.get() != grad.get()) torch::stable::copy_(grad, to);
    return grad;
  }

#if defined(FASTLOSS_HAVE_CUDA)
 private:
  Status on_cuda(Status (*kernel)(const DiceLossArgs&, const CudaContext&)) {
    CudaCall call(input);
    return kernel(args, call.with_workspace(dice_loss_workspace_bytes_cuda(args, call.context())));
  }
#endif
};

Tensor value(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t loss,
             std::vector<double> params, int64_t activation, bool batch, bool squared, bool include_background,
             bool skip_absent, double smooth_nr, double smooth_dr, int64_t ignore_index, int64_t reduction,
             int64_t loss_dtype) {
  Call call(input, target, weight,
            {loss, params, activation, batch, squared, include_background, skip_absent, smooth_nr, smooth_dr,
             ignore_index, reduction, loss_dtype});
  return call.forward(/*save=*/false, nullptr);
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                   int64_t loss, std::vector<double> params, int64_t activation, bool batch,
                                   bool squared, bool include_background, bool skip_absent, double smooth_nr,
                                   double smooth_dr, int64_t ignore_index, int64_t reduction, int64_t loss_dtype) {
  Call call(input, target, weight,
            {loss, params, activation, batch, squared, include_background, skip_absent, smooth_nr, smooth_dr,
             ignore_index, reduction, loss_dtype});
  Tensor saved;
  Tensor result = call.forward(/*save=*/true, &saved);
  return {result, saved};
}

Tensor backward(const Tensor& grad_output, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                const Tensor& saved, int64_t loss, std::vector<double> params, int64_t activation, bool batch,
                bool squared, bool include_background, bool skip_absent, double smooth_nr, double smooth_dr,
                int64_t ignore_index, int64_t reduction, int64_t loss_dtype) {
  Call call(input, target, weight,
            {loss, params, activation, batch, squared, include_background, skip_absent, smooth_nr, smooth_dr,
             ignore_index, reduction, loss_dtype});
  return call.backward(/*of_target=*/false, grad_output, saved);
}
Tensor target_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                       const OptionalTensor& weight, const Tensor& saved, int64_t loss, std::vector<double> params,
                       int64_t activation, bool batch, bool squared, bool include_background, bool skip_absent,
                       double smooth_nr, double smooth_dr, int64_t ignore_index, int64_t reduction,
                       int64_t loss_dtype) {
  Call call(input, target, weight,
            {loss, params, activation, batch, squared, include_background, skip_absent, smooth_nr, smooth_dr,
             ignore_index, reduction, loss_dtype});
  return call.backward(/*of_target=*/true, grad_output, saved);
}

// How the kernels walk this input, in words, for fastloss.explain().
std::string regime(const Tensor& input, const Tensor& target) {
  Call call(input, target, std::nullopt,
            {0,
             {},
             int64_t(Activation::softmax),
             false,
             false,
             true,
             false,
             0,
             0,
             -100,
             int64_t(Reduction::mean),
             int64_t(dtype_of(input, "input"))});
  call.set_layout(nullptr);
#if defined(FASTLOSS_HAVE_CUDA)
  if (input.is_cuda()) {
    const std::string rows = std::to_string(dice_loss_rows_per_thread_cuda(call.args));
    return "sums of every class, " + rows + (rows == "1" ? " row per thread" : " adjacent rows per thread");
  }
#endif
  return std::string(isa_name(current_isa())) + ", tiles (vectors along the rows)";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastloss, m) {
  const std::string tensors = "Tensor input, Tensor target, Tensor? weight, ";
  const std::string options =
      "int loss, float[] params, int activation, bool batch, bool squared, bool include_background, bool skip_absent, "
      "float smooth_nr, float "
      "smooth_dr, int ignore_index, int reduction, int loss_dtype) -> ";
  m.def(("dice_loss_value(" + tensors + options + "Tensor").c_str());
  m.def(("dice_loss_forward(" + tensors + options + "(Tensor, Tensor)").c_str());
  m.def(("dice_loss_backward(Tensor grad_output, " + tensors + "Tensor saved, " + options + "Tensor").c_str());
  m.def(("dice_loss_target_backward(Tensor grad_output, " + tensors + "Tensor saved, " + options + "Tensor").c_str());
  m.def("dice_loss_regime(Tensor input, Tensor target) -> str");
}

namespace {
void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("dice_loss_value", TORCH_BOX(&value));
  m.impl("dice_loss_forward", TORCH_BOX(&forward));
  m.impl("dice_loss_backward", TORCH_BOX(&backward));
  m.impl("dice_loss_target_backward", TORCH_BOX(&target_backward));
  m.impl("dice_loss_regime", TORCH_BOX(&regime));
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) { register_kernels(m); }
#if defined(FASTLOSS_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastloss, CUDA, m) { register_kernels(m); }
#endif

}  // namespace fastloss
