// Binding of the gradient of log-probabilities and entropies. The operator is private: its output carries no autograd.
//
//   logits         [N, C, d1, ...] float32, float64, float16, bfloat16; any strides
//   index          [N, d1, ...] any integer dtype
//   saved          what cross_entropy_forward has returned for them with reduction none
//   entropy        its entropies; none without grad_entropy
//   grad_log_prob  [N, d1, ...] contiguous, accumulation dtype (float64 for float64 logits, else float32); none: 0
//   grad_entropy   the same
#include "../torch/support.h"
#include "token_log_probs.h"
#if defined(FASTLOSS_HAVE_CUDA)
#include "token_log_probs_cuda.h"
#endif

namespace fastloss {
namespace {

Tensor backward(const std::optional<Tensor>& grad_log_prob, const std::optional<Tensor>& grad_entropy,
                const Tensor& saved, const std::optional<Tensor>& entropy, const Tensor& given_logits,
                const Tensor& given_index, int64_t ignore_index, double softcap, double logit_scale) {
  Tensor logits = given_logits, index = given_index;
  if (logits.dim() < 2) throw std::invalid_argument("logits: expected [N, C, ...]");
  TokenLogProbsArgs a;
  a.logits_type = dtype_of(logits, "logits");
  const ScalarType accum = scalar_type_of(accum_of(a.logits_type));
  Tensor grad = allocate_like(logits);
  Tensor to = grad;
  std::optional<Collapsed> c = try_collapse({&logits, &to});
  if (!c) {
    logits = torch::stable::contiguous(logits);
    if (!to.is_contiguous()) to = allocate(to, to.sizes().data(), to.dim(), to.scalar_type());
    c = collapse({&logits, &to});
  }
  a.outer = c->outer;
  a.classes = c->classes;
  a.inner = c->inner;
  a.logits = logits.data_ptr();
  a.logits_strides = c->strides[0];
  a.grad = to.data_ptr();
  a.grad_strides = c->strides[1];
  const int64_t rows = a.outer * a.inner;
  if (index.numel() != rows) throw std::invalid_argument("index: expected one class index per row");
  if (index.is_cuda() != logits.is_cuda() || index.get_device_index() != logits.get_device_index())
    throw std::invalid_argument("index: expected the device of the logits");
  if (!index.is_contiguous()) index = torch::stable::contiguous(index);
  a.index = index.data_ptr();
  a.index_type = index_type_of(index);
  a.ignore_index = ignore_index;
  a.softcap = softcap;
  a.logit_scale = logit_scale;
  require_vector(saved, "saved", 2 * rows + 2, accum, logits);
  if (grad_entropy && !entropy) throw std::invalid_argument("entropy: expected with grad_entropy");
  a.saved = saved.data_ptr();
  if (entropy) {
    require_vector(*entropy, "entropy", rows, accum, logits);
    a.entropy = entropy->data_ptr();
  }
  if (grad_log_prob) {
    require_vector(*grad_log_prob, "grad_log_prob", rows, accum, logits);
    a.grad_log_prob = grad_log_prob->data_ptr();
  }
  if (grad_entropy) {
    require_vector(*grad_entropy, "grad_entropy", rows, accum, logits);
    a.grad_entropy = grad_entropy->data_ptr();
  }
  Status status;
#if defined(FASTLOSS_HAVE_CUDA)
  if (logits.is_cuda()) {
    CudaCall call(logits);
    status = token_log_probs_backward_cuda(a, call.context());
  } else
#endif
    status = token_log_probs_backward_cpu(a, torch_parallel);
  raise_if_failed(status, index, a.classes, a.ignore_index);
  if (to.get() != grad.get()) torch::stable::copy_(grad, to);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastloss, m) {
  m.def(
      "token_log_probs_backward(Tensor? grad_log_prob, Tensor? grad_entropy, Tensor saved, Tensor? entropy, Tensor "
      "logits, Tensor index, int ignore_index, float softcap, float logit_scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) { m.impl("token_log_probs_backward", TORCH_BOX(&backward)); }
#if defined(FASTLOSS_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastloss, CUDA, m) { m.impl("token_log_probs_backward", TORCH_BOX(&backward)); }
#endif

}  // namespace fastloss
