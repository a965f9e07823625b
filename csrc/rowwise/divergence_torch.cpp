// Binding of the divergences of two softmaxes. The operators are private: their outputs carry no autograd.
//
//   p, q         logits [N, C, d1, ...] of one shape and any floating dtypes; any strides
//   weight       [N, d1, ...] contiguous, of the accumulation dtype (float64 where p or q is, else float32); none: ones
//   total        [] of the accumulation dtype, what a mean divides by; none: the number of rows
//   loss         [] or, for reduction none, [N, d1, ...]; of loss_dtype (the value of DType)
//   saved        [7, rows] of the accumulation dtype: what backward needs
//   needs        bit 0: the gradient by p, bit 1: by q; what is not wanted has no elements
#include "../common/cpu_isa.h"
#include "../torch/support.h"
#include "divergence_cpu_policy.h"
#if defined(FASTLOSS_HAVE_CUDA)
#include "divergence_cuda.h"
#endif

#include <tuple>

namespace fastloss {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The options, in the order of the operators' trailing arguments.
struct Options {
  int64_t kind;
  double beta, temperature, scale;
  int64_t reduction, loss_dtype;
};

// One operator call: the contract's arguments, and the tensors whose storage they point into.
struct Call {
  DivergenceArgs args;
  Tensor p, q;
  Tensor grad_p, grad_q;  // the results
  Tensor to_p, to_q;      // what the kernels write, if that has another layout

  Call(const Tensor& given_p, const Tensor& given_q, const OptionalTensor& weight, const OptionalTensor& total,
       const Options& o, int64_t needs)
      : p(given_p), q(given_q) {
    if (p.dim() < 2) throw std::invalid_argument("p: expected [N, C, ...]");
    bool same = p.dim() == q.dim();
    for (int64_t d = 0; same && d < p.dim(); ++d) same = p.size(d) == q.size(d);
    if (!same) throw std::invalid_argument("q: expected the shape of p");
    if (q.is_cuda() != p.is_cuda() || q.get_device_index() != p.get_device_index())
      throw std::invalid_argument("q: expected the device of p");
    args.p.type = dtype_of(p, "p");
    args.q.type = dtype_of(q, "q");
    if (o.kind < 0 || o.kind > int64_t(Divergence::js)) throw std::invalid_argument("kind: unknown");
    if (o.reduction < 0 || o.reduction > int64_t(Reduction::sum)) throw std::invalid_argument("reduction: unknown");
    if (o.loss_dtype < 0 || o.loss_dtype > int64_t(DType::bf16)) throw std::invalid_argument("loss_dtype: unknown");
    args.kind = Divergence(o.kind);
    args.beta = o.beta;
    args.temperature = o.temperature;
    args.scale = o.scale;
    args.reduction = Reduction(o.reduction);
    args.loss_type = DType(o.loss_dtype);

    grad_p = to_p = needs & 1 ? allocate_like(p) : allocate(p, 0, p.scalar_type());
    grad_q = to_q = needs & 2 ? allocate_like(q) : allocate(q, 0, q.scalar_type());
    auto view = [&] { return try_collapse({&p, &q, needs & 1 ? &to_p : &p, needs & 2 ? &to_q : &q}); };
    std::optional<Collapsed> c = view();
    if (!c) {  // no view suits them all: contiguous tensors take the places of those that are not
      p = torch::stable::contiguous(p);
      q = torch::stable::contiguous(q);
      if (needs & 1 && !to_p.is_contiguous()) to_p = allocate(p, p.sizes().data(), p.dim(), p.scalar_type());
      if (needs & 2 && !to_q.is_contiguous()) to_q = allocate(q, q.sizes().data(), q.dim(), q.scalar_type());
      c = view();
    }
    args.outer = c->outer;
    args.classes = c->classes;
    args.inner = c->inner;
    args.p.logits = p.data_ptr();
    args.q.logits = q.data_ptr();
    args.p.strides = c->strides[0];
    args.q.strides = c->strides[1];
    args.p.grad = needs & 1 ? to_p.data_ptr() : nullptr;
    args.q.grad = needs & 2 ? to_q.data_ptr() : nullptr;
    args.p.grad_strides = c->strides[2];
    args.q.grad_strides = c->strides[3];
    const ScalarType accum = scalar_type_of(args.accum());
    if (weight) {
      require_vector(*weight, "weight", args.rows(), accum, p);
      args.weight = weight->data_ptr();
    }
    if (total) {
      require_vector(*total, "total", 1, accum, p);
      args.total = total->data_ptr();
    }
  }

  // The gradients in their own layouts.
  void finish() {
    if (to_p.get() != grad_p.get()) torch::stable::copy_(grad_p, to_p);
    if (to_q.get() != grad_q.get()) torch::stable::copy_(grad_q, to_q);
  }

  Tensor forward() {
    int64_t sizes[kMaxDims], dim = 0;
    for (int64_t d = 0; d < p.dim() && args.reduction == Reduction::none; ++d)
      if (d != 1) sizes[dim++] = p.size(d);
    Tensor loss = allocate(p, sizes, dim, scalar_type_of(args.loss_type));
    args.loss = loss.data_ptr();
    Status status;
#if defined(FASTLOSS_HAVE_CUDA)
    if (p.is_cuda()) {
      CudaCall call(p);
      call.with_workspace(divergence_workspace_bytes_cuda(args, call.context()));
      status = divergence_forward_cuda(args, call.context());
    } else
#endif
      status = divergence_forward_cpu(args, torch_parallel);
    raise_if_failed(status, p, args.classes, std::nullopt);
    finish();
    return loss;
  }

  void backward(const Tensor& grad_output, const Tensor& saved) {
    const bool per_row = args.reduction == Reduction::none;
    require_vector(grad_output, "grad_output", per_row ? args.rows() : 1, scalar_type_of(args.loss_type), p);
    require_vector(saved, "saved", kDivergenceSaved * args.rows(), scalar_type_of(args.accum()), p);
    args.grad_output = grad_output.data_ptr();
    args.grad_output_per_row = per_row;
    args.saved = saved.data_ptr();
    Status status;
#if defined(FASTLOSS_HAVE_CUDA)
    if (p.is_cuda()) {
      CudaCall call(p);
      status = divergence_backward_cuda(args, call.context());
    } else
#endif
      status = divergence_backward_cpu(args, torch_parallel);
    raise_if_failed(status, p, args.classes, std::nullopt);
    finish();
  }
};

Tensor value(const Tensor& p, const Tensor& q, const OptionalTensor& weight, const OptionalTensor& total, int64_t kind,
             double beta, double temperature, double scale, int64_t reduction, int64_t loss_dtype) {
  return Call(p, q, weight, total, {kind, beta, temperature, scale, reduction, loss_dtype}, 0).forward();
}

std::tuple<Tensor, Tensor> forward(const Tensor& p, const Tensor& q, const OptionalTensor& weight,
                                   const OptionalTensor& total, int64_t kind, double beta, double temperature,
                                   double scale, int64_t reduction, int64_t loss_dtype) {
  Call call(p, q, weight, total, {kind, beta, temperature, scale, reduction, loss_dtype}, 0);
  const int64_t sizes[] = {kDivergenceSaved, call.args.rows()};
  Tensor saved = allocate(p, sizes, 2, scalar_type_of(call.args.accum()));
  call.args.saved = saved.data_ptr();
  Tensor loss = call.forward();
  return {loss, saved};
}

std::tuple<Tensor, Tensor, Tensor> grad(const Tensor& p, const Tensor& q, const OptionalTensor& weight,
                                        const OptionalTensor& total, int64_t needs, int64_t kind, double beta,
                                        double temperature, double scale, int64_t reduction, int64_t loss_dtype) {
  Call call(p, q, weight, total, {kind, beta, temperature, scale, reduction, loss_dtype}, needs);
  Tensor loss = call.forward();
  return {loss, call.grad_p, call.grad_q};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& p, const Tensor& q,
                                    const OptionalTensor& weight, const OptionalTensor& total, const Tensor& saved,
                                    int64_t needs, int64_t kind, double beta, double temperature, double scale,
                                    int64_t reduction, int64_t loss_dtype) {
  Call call(p, q, weight, total, {kind, beta, temperature, scale, reduction, loss_dtype}, needs);
  call.backward(grad_output, saved);
  return {call.grad_p, call.grad_q};
}

// How the kernels walk these logits, in words, for fastloss.explain().
std::string regime(const Tensor& p, const Tensor& q) {
  const Call call(p, q, std::nullopt, std::nullopt, {0, 0.5, 1, 1, 0, 0}, 0);
#if defined(FASTLOSS_HAVE_CUDA)
  if (p.is_cuda()) return divergence_regime_cuda(call.args);
#endif
  const char* path =
      takes_row_path(call.args) ? "whole rows (vectors along the classes)" : "tiles (vectors along the rows)";
  return std::string(isa_name(current_isa())) + ", " + path;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastloss, m) {
  const std::string tensors = "Tensor p, Tensor q, Tensor? weight, Tensor? total, ";
  const std::string options =
      "int kind, float beta, float temperature, float scale, int reduction, int loss_dtype) -> ";
  m.def(("divergence_value(" + tensors + options + "Tensor").c_str());
  m.def(("divergence_forward(" + tensors + options + "(Tensor loss, Tensor saved)").c_str());
  m.def(
      ("divergence_grad(" + tensors + "int needs, " + options + "(Tensor loss, Tensor grad_p, Tensor grad_q)").c_str());
  m.def(("divergence_backward(Tensor grad_output, " + tensors + "Tensor saved, int needs, " + options +
         "(Tensor grad_p, Tensor grad_q)")
            .c_str());
  m.def("divergence_regime(Tensor p, Tensor q) -> str");
}

namespace {
void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("divergence_value", TORCH_BOX(&value));
  m.impl("divergence_forward", TORCH_BOX(&forward));
  m.impl("divergence_grad", TORCH_BOX(&grad));
  m.impl("divergence_backward", TORCH_BOX(&backward));
  m.impl("divergence_regime", TORCH_BOX(&regime));
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) { register_kernels(m); }
#if defined(FASTLOSS_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastloss, CUDA, m) { register_kernels(m); }
#endif

}  // namespace fastloss
