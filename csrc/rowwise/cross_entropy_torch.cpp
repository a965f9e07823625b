// Binding of cross entropy: checks, allocates, hands raw pointers to the core. Schema fragments at the end.
// The operators are private: their outputs carry no autograd, the Python face (losses/cross_entropy.py) adds it.
//
//   logits         [N, C, d1, ...] float32, float64, float16, bfloat16
//   target         [N, d1, ...] any integer dtype, or [N, C, d1, ...] floating probabilities
//   weight         [C], sample_weight [N, d1, ...]: accumulation dtype (float64 for float64 logits, else float32)
//   loss           [] or [N, d1, ...], of loss_dtype (the value of DType)
//   saved          what backward needs, opaque; empty unless asked for
#include "../common/cpu_isa.h"
#include "../torch/support.h"
#include "cross_entropy_cpu_policy.h"
#if defined(FASTLOSS_HAVE_CUDA)
#include "cross_entropy_cuda.h"
#endif

#include <tuple>

namespace fastloss {
namespace {

enum Flags : int64_t { kSave = 1, kGrad = 2, kAllIgnoredZero = 4, kZeroTimesInf = 8, kStats = 16 };

// One operator call: the contract's arguments, and the tensors whose storage they point into.
struct Call {
  CrossEntropyArgs args;
  const Tensor& logits;
  Tensor target;

  Call(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
       const std::optional<Tensor>& sample_weight, int64_t reduction, int64_t loss_dtype, int64_t ignore_index,
       double label_smoothing, double z_loss, double softcap, double logit_scale, int64_t flags)
      : logits(logits), target(target) {
    if (logits.dim() < 2) throw std::invalid_argument("logits: expected [N, C, ...]");
    args.logits = logits.data_ptr();
    args.logits_type = dtype_of(logits, "logits");
    args.soft = is_floating(target);
    const int64_t rows = logits.size(1) ? logits.numel() / logits.size(1) : count_rows();
    if (args.soft) {
      if (target.numel() != logits.numel() || target.dim() != logits.dim())
        throw std::invalid_argument("target: probabilities need the shape of the logits");
      args.prob_type = dtype_of(target, "target");
    } else {
      if (target.numel() != rows || !target.is_contiguous())
        throw std::invalid_argument("target: expected one contiguous class index per row");
      args.index_type = index_type_of(target);
    }
    if (target.is_cuda() != logits.is_cuda() || target.get_device_index() != logits.get_device_index())
      throw std::invalid_argument("target: expected the device of the logits");
    args.target = target.data_ptr();
    const ScalarType accum = scalar_type_of(accum_of(args.logits_type));
    if (weight) {
      require_vector(*weight, "weight", logits.size(1), accum, logits);
      args.weight = weight->data_ptr();
    }
    if (sample_weight) {
      require_vector(*sample_weight, "sample_weight", rows, accum, logits);
      args.sample_weight = sample_weight->data_ptr();
    }
    if (loss_dtype < 0 || loss_dtype > int64_t(DType::bf16)) throw std::invalid_argument("loss_dtype: unknown");
    args.loss_type = DType(loss_dtype);
    args.reduction = Reduction(reduction);
    args.ignore_index = ignore_index;
    args.label_smoothing = label_smoothing;
    args.z_loss = z_loss;
    args.softcap = softcap;
    args.logit_scale = logit_scale;
    args.all_ignored_zero = flags & kAllIgnoredZero;
    args.zero_times_inf = flags & kZeroTimesInf;
  }

  ScalarType accum() const { return scalar_type_of(accum_of(args.logits_type)); }

  // Fixes the [outer, classes, inner] view, which must suit every tensor of the logits' shape.
  void set_layout(const Tensor* grad, const Tensor* grad_target) {
    const Tensor* second = args.soft ? &target : &logits;
    const Tensor* third = grad ? grad : grad_target ? grad_target : &logits;
    const Collapsed c = collapse({&logits, second, third});
    args.outer = c.outer;
    args.classes = c.classes;
    args.inner = c.inner;
    args.logits_strides = c.strides[0];
    args.target_strides = c.strides[1];
    if (grad) {
      args.grad = grad->data_ptr();
      args.grad_strides = c.strides[2];
    }
    if (grad_target) {
      args.grad_target = grad_target->data_ptr();
      args.grad_target_strides = c.strides[2];
    }
  }

  // A tensor with one element per row, in the shape of an index target.
  Tensor per_row(ScalarType type) const {
    int64_t sizes[kMaxDims], n = 0;
    for (int64_t d = 0; d < logits.dim(); ++d)
      if (d != 1) sizes[n++] = logits.size(d);
    return allocate(logits, sizes, n, type);
  }
  Tensor allocate_loss() const {
    const ScalarType type = scalar_type_of(args.loss_type);
    return args.reduction == Reduction::none ? per_row(type) : allocate_scalar(logits, type);
  }
  Tensor nothing() const { return allocate(logits, int64_t(0), ScalarType::Float); }

  void forward() {
#if defined(FASTLOSS_HAVE_CUDA)
    if (logits.is_cuda()) return run_cuda(cross_entropy_forward_cuda);
#endif
    raise_if_failed(cross_entropy_forward_cpu(args, torch_parallel), target, args.classes, args.ignore_index);
  }
  void backward() {
#if defined(FASTLOSS_HAVE_CUDA)
    if (logits.is_cuda()) return run_cuda(cross_entropy_backward_cuda);
#endif
    raise_if_failed(cross_entropy_backward_cpu(args, torch_parallel), target, args.classes, args.ignore_index);
  }

 private:
  int64_t count_rows() const {
    int64_t rows = 1;
    for (int64_t d = 0; d < logits.dim(); ++d)
      if (d != 1) rows *= logits.size(d);
    return rows;
  }
#if defined(FASTLOSS_HAVE_CUDA)
  void run_cuda(Status (*kernel)(const CrossEntropyArgs&, const CudaContext&)) {
    CudaCall call(logits);
    const int64_t bytes = cross_entropy_workspace_bytes_cuda(args, call.context());
    raise_if_failed(kernel(args, call.with_workspace(bytes)), target, args.classes, args.ignore_index);
  }
#endif
};

using OptionalTensor = std::optional<Tensor>;

// Log-sum-exp, arg-max and accuracy, from the same read.
struct Stats {
  Tensor lse, argmax, accuracy;
};
Stats want_stats(Call& call) {
  Stats s{call.per_row(call.accum()), call.per_row(ScalarType::Long), allocate_scalar(call.logits, ScalarType::Float)};
  call.args.lse = s.lse.data_ptr();
  call.args.argmax = static_cast<int64_t*>(s.argmax.data_ptr());
  call.args.accuracy = static_cast<float*>(s.accuracy.data_ptr());
  return s;
}

// Loss, and what the flags ask for; the caller runs the kernel.
std::tuple<Tensor, Tensor, Tensor> want_results(Call& call, int64_t flags) {
  Tensor grad = flags & kGrad ? allocate_like(call.logits) : call.nothing();
  call.set_layout(flags & kGrad ? &grad : nullptr, nullptr);
  Tensor loss = call.allocate_loss();
  call.args.loss = loss.data_ptr();
  Tensor saved = flags & kSave ? allocate(call.logits, call.args.saved_count(), call.accum()) : call.nothing();
  if (flags & kSave) call.args.saved = saved.data_ptr();
  return {loss, saved, grad};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                           const OptionalTensor& sample_weight, int64_t reduction, int64_t loss_dtype,
                                           int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                                           double logit_scale, int64_t flags) {
  Call call(logits, target, weight, sample_weight, reduction, loss_dtype, ignore_index, label_smoothing, z_loss,
            softcap, logit_scale, flags);
  auto results = want_results(call, flags);
  call.forward();
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_stats(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& sample_weight,
    int64_t reduction, int64_t loss_dtype, int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
    double logit_scale, int64_t flags) {
  Call call(logits, target, weight, sample_weight, reduction, loss_dtype, ignore_index, label_smoothing, z_loss,
            softcap, logit_scale, flags);
  auto [loss, saved, grad] = want_results(call, flags);
  Stats s = want_stats(call);
  call.forward();
  return {loss, saved, grad, s.lse, s.argmax, s.accuracy};
}

// The gradient takes the memory of the logits.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_inplace(Tensor logits, const Tensor& target,
                                                           const OptionalTensor& weight,
                                                           const OptionalTensor& sample_weight, int64_t reduction,
                                                           int64_t loss_dtype, int64_t ignore_index,
                                                           double label_smoothing, double z_loss, double softcap,
                                                           double logit_scale, int64_t flags) {
  Call call(logits, target, weight, sample_weight, reduction, loss_dtype, ignore_index, label_smoothing, z_loss,
            softcap, logit_scale, flags);
  call.set_layout(&logits, nullptr);
  Tensor loss = call.allocate_loss();
  call.args.loss = loss.data_ptr();
  if (flags & kStats) {
    Stats s = want_stats(call);
    call.forward();
    return {loss, s.lse, s.argmax, s.accuracy};
  }
  call.forward();
  return {loss, call.nothing(), call.nothing(), call.nothing()};
}

Tensor backward_of(bool of_target, const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                   const OptionalTensor& weight, const OptionalTensor& sample_weight, const Tensor& saved,
                   int64_t reduction, int64_t loss_dtype, int64_t ignore_index, double label_smoothing, double z_loss,
                   double softcap, double logit_scale, int64_t flags) {
  Call call(logits, target, weight, sample_weight, reduction, loss_dtype, ignore_index, label_smoothing, z_loss,
            softcap, logit_scale, flags);
  if (of_target && !call.args.soft) throw std::invalid_argument("target: class indices have no gradient");
  Tensor grad = allocate_like(of_target ? target : logits);
  call.set_layout(of_target ? nullptr : &grad, of_target ? &grad : nullptr);
  require_vector(saved, "saved", call.args.saved_count(), call.accum(), logits);
  call.args.saved = saved.data_ptr();
  const bool per_row = call.args.reduction == Reduction::none;
  require_vector(grad_output, "grad_output", per_row ? call.args.rows() : 1, scalar_type_of(call.args.loss_type),
                 logits);
  call.args.grad_output = grad_output.data_ptr();
  call.args.grad_output_per_row = per_row;
  call.backward();
  return grad;
}
Tensor backward(const Tensor& grad_output, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& sample_weight, const Tensor& saved, int64_t reduction, int64_t loss_dtype,
                int64_t ignore_index, double label_smoothing, double z_loss, double softcap, double logit_scale,
                int64_t flags) {
  return backward_of(false, grad_output, logits, target, weight, sample_weight, saved, reduction, loss_dtype,
                     ignore_index, label_smoothing, z_loss, softcap, logit_scale, flags);
}
Tensor target_backward(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                       const OptionalTensor& weight, const OptionalTensor& sample_weight, const Tensor& saved,
                       int64_t reduction, int64_t loss_dtype, int64_t ignore_index, double label_smoothing,
                       double z_loss, double softcap, double logit_scale, int64_t flags) {
  return backward_of(true, grad_output, logits, target, weight, sample_weight, saved, reduction, loss_dtype,
                     ignore_index, label_smoothing, z_loss, softcap, logit_scale, flags);
}

// Which kernel forward takes, in words, for fastloss.explain(). Of the flags, kGrad and kStats matter.
std::string regime(const Tensor& logits, const Tensor& target, double label_smoothing, double softcap,
                   double logit_scale, int64_t flags) {
  Call call(logits, target, std::nullopt, std::nullopt, int64_t(Reduction::mean), int64_t(dtype_of(logits, "logits")),
            -100, label_smoothing, 0, softcap, logit_scale, flags);
  call.set_layout(flags & kGrad ? &logits : nullptr, nullptr);  // a gradient is laid out as dense logits are
#if defined(FASTLOSS_HAVE_CUDA)
  if (logits.is_cuda()) {
    CudaCall on_device(logits);
    std::optional<Stats> stats;
    if (flags & kStats) stats = want_stats(call);
    return cross_entropy_regime_cuda(call.args, on_device.context(), /*backward=*/false);
  }
#endif
  const std::string isa = isa_name(current_isa());
  return isa + (takes_row_path(call.args) ? ", row path (vectors along the classes)"
                                          : ", tile path (vectors along the rows)");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastloss, m) {
  const std::string tail =
      "Tensor? weight, Tensor? sample_weight, int reduction, int loss_dtype, int ignore_index, float label_smoothing, "
      "float z_loss, float softcap, float logit_scale, int flags)";
  const std::string saved_tail =
      "Tensor? weight, Tensor? sample_weight, Tensor saved, int reduction, int loss_dtype, int ignore_index, float "
      "label_smoothing, float z_loss, float softcap, float logit_scale, int flags) -> Tensor";
  m.def(("cross_entropy_forward(Tensor logits, Tensor target, " + tail + " -> (Tensor, Tensor, Tensor)").c_str());
  m.def(("cross_entropy_forward_stats(Tensor logits, Tensor target, " + tail +
         " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
            .c_str());
  m.def(("cross_entropy_forward_inplace(Tensor(a!) logits, Tensor target, " + tail +
         " -> (Tensor, Tensor, Tensor, Tensor)")
            .c_str());
  m.def(
      "cross_entropy_regime(Tensor logits, Tensor target, float label_smoothing, float softcap, float logit_scale, int "
      "flags) -> str");
  m.def(("cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor target, " + saved_tail).c_str());
  m.def(("cross_entropy_target_backward(Tensor grad_output, Tensor logits, Tensor target, " + saved_tail).c_str());
}

namespace {
void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&forward));
  m.impl("cross_entropy_forward_stats", TORCH_BOX(&forward_stats));
  m.impl("cross_entropy_forward_inplace", TORCH_BOX(&forward_inplace));
  m.impl("cross_entropy_backward", TORCH_BOX(&backward));
  m.impl("cross_entropy_target_backward", TORCH_BOX(&target_backward));
  m.impl("cross_entropy_regime", TORCH_BOX(&regime));
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) { register_kernels(m); }
#if defined(FASTLOSS_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastloss, CUDA, m) { register_kernels(m); }
#endif

}  // namespace fastloss
