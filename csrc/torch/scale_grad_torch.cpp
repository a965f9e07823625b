// Binding of scale_grad: see common/scale_grad.h.
#include "../common/scale_grad.h"
#include "support.h"
#if defined(FASTLOSS_HAVE_CUDA)
#include "../common/scale_grad_cuda.h"
#endif

namespace fastloss {
namespace {

// Every element of a dense tensor is visited in memory order; grad comes from our own forward, so it is dense.
void scale_into(const Tensor& grad, const Tensor& out, const Tensor& scale) {
  if (scale.numel() != 1) throw std::invalid_argument("scale: expected one element");
  const DType type = dtype_of(grad, "grad"), scale_type = dtype_of(scale, "scale");
#if defined(FASTLOSS_HAVE_CUDA)
  if (grad.is_cuda()) {
    CudaCall call(grad);
    Status s = scale_grad_cuda(grad.data_ptr(), out.data_ptr(), type, grad.numel(), scale.data_ptr(), scale_type,
                               call.context());
    return raise_if_failed(s, grad, 0, 0);
  }
#endif
  scale_grad_cpu(grad.data_ptr(), out.data_ptr(), type, grad.numel(), scale.data_ptr(), scale_type, torch_parallel);
}

Tensor scale_grad(const Tensor& grad, const Tensor& scale) {
  Tensor out = allocate_like(grad);
  bool same = true;
  for (int64_t d = 0; d < grad.dim(); ++d) same &= grad.stride(d) == out.stride(d) || grad.size(d) == 1;
  if (!same) throw std::invalid_argument("grad: expected a dense tensor");
  scale_into(grad, out, scale);
  return out;
}
void scale_grad_(Tensor grad, const Tensor& scale) { scale_into(grad, grad, scale); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastloss, CPU, m) {
  m.impl("scale_grad", TORCH_BOX(&scale_grad));
  m.impl("scale_grad_", TORCH_BOX(&scale_grad_));
}
#if defined(FASTLOSS_HAVE_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastloss, CUDA, m) {
  m.impl("scale_grad", TORCH_BOX(&scale_grad));
  m.impl("scale_grad_", TORCH_BOX(&scale_grad_));
}
#endif

}  // namespace fastloss
