#include "token_log_probs_cuda.h"
#include "token_log_probs_kernels.cuh"

namespace fastloss {

namespace {

constexpr int64_t kShortRow = 1024;  // classes that a warp takes by itself
constexpr int64_t kSlice = 16384;    // classes of a long row for one block
constexpr int64_t kMostBlocks = int64_t(1) << 30;

// Classes lie next to each other, and each row begins as far from 16 bytes in the gradient as in the logits.
bool aligned_alike(const TokenLogProbsArgs& a) {
  const int64_t size = size_of(a.logits_type);
  auto differs = [&](int64_t x, int64_t grad) { return (x - grad) * size % 16 != 0; };
  if (a.logits_strides.cls != 1 || a.grad_strides.cls != 1) return false;
  if (reinterpret_cast<uintptr_t>(a.logits) % 16 != reinterpret_cast<uintptr_t>(a.grad) % 16) return false;
  return !(a.outer > 1 && differs(a.logits_strides.outer, a.grad_strides.outer)) &&
         !(a.inner > 1 && differs(a.logits_strides.inner, a.grad_strides.inner));
}

template <class T, int kThreads, bool kVectors>
Status launch_gradient(const TokenLogProbsParams& p, void* stream) {
  LaunchShape shape;
  const int64_t per_block = kTokenThreads / kThreads, blocks = (p.rows * p.slices + per_block - 1) / per_block;
  shape.grid = blocks < kMostBlocks ? blocks : kMostBlocks;
  shape.block = kTokenThreads;
  return launch(token_log_probs_gradient_kernel<T, kThreads, kVectors>, shape, stream, p);
}

template <class T>
Status backward(const TokenLogProbsArgs& a, void* stream) {
  TokenLogProbsParams p{a, a.outer * a.inner, 1, a.classes};
  if (p.rows == 0 || a.classes == 0) return {};
  const bool adjacent_rows = a.inner > 1 && a.logits_strides.inner <= a.logits_strides.cls;
  if (adjacent_rows) return launch_gradient<T, 1, false>(p, stream);
  const bool vectors = aligned_alike(a);
  if (a.classes <= kShortRow)
    return vectors ? launch_gradient<T, kWarp, true>(p, stream) : launch_gradient<T, kWarp, false>(p, stream);
  p.slices = (a.classes + kSlice - 1) / kSlice;
  p.slice = p.slices == 1 ? a.classes : kSlice;
  return vectors ? launch_gradient<T, kTokenThreads, true>(p, stream)
                 : launch_gradient<T, kTokenThreads, false>(p, stream);
}

}  // namespace

Status token_log_probs_backward_cuda(const TokenLogProbsArgs& a, const CudaContext& context) {
  Status status;
  with_type(a.logits_type, [&](auto tag) { status = backward<decltype(tag)>(a, context.stream); });
  return status;
}

}  // namespace fastloss
