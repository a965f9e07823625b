#include "divergence_cuda.h"
#include "divergence_kernels.cuh"

namespace fastloss {

namespace {

constexpr int64_t kShortRow = 1024;  // classes that a warp takes by itself
constexpr int64_t kLongRow = 16384;  // classes from which on a block has as many threads as it may

enum class Share { thread, warp, block };

// Who takes a row.
Share share_of(const DivergenceArgs& a) {
  if (a.inner > 1 && a.p.strides.inner <= a.p.strides.cls) return Share::thread;
  return a.classes <= kShortRow ? Share::warp : Share::block;
}

template <class A, int kGroup>
Status launch_rows(DivergenceParams& p, void* stream) {
  LaunchShape shape;
  shape.block = kGroup == 0 && p.a.classes >= kLongRow ? kDivergenceMostThreads<A> : kDivergenceThreads;
  shape.shared = kDivergenceShared;
  const int64_t per_block = kGroup == 0 ? 1 : shape.block / kGroup, blocks = (p.a.rows() + per_block - 1) / per_block;
  shape.grid = blocks < 1 ? 1 : blocks < kDivergenceMaxBlocks ? blocks : kDivergenceMaxBlocks;
  p.blocks = int(shape.grid);
  return launch(divergence_kernel<A, kGroup>, shape, stream, p);
}

template <class A>
Status run(DivergenceParams p, void* stream) {
  const Share share = share_of(p.a);
  const Status status = share == Share::thread ? launch_rows<A, 1>(p, stream)
                        : share == Share::warp ? launch_rows<A, kWarp>(p, stream)
                                               : launch_rows<A, 0>(p, stream);
  if (status.code != Status::ok || !p.partials) return status;
  LaunchShape shape;
  shape.grid = 1;
  shape.block = kDivergenceThreads;
  shape.shared = kDivergenceShared;
  return launch(divergence_finish_kernel<A>, shape, stream, p);
}

Status run(const DivergenceParams& p, void* stream) {
  return p.a.accum() == DType::f64 ? run<double>(p, stream) : run<float>(p, stream);
}

}  // namespace

int64_t divergence_workspace_bytes_cuda(const DivergenceArgs& a, const CudaContext&) {
  return a.reduction == Reduction::none ? 0 : kDivergenceMaxBlocks * int64_t(sizeof(double));
}

Status divergence_forward_cuda(const DivergenceArgs& a, const CudaContext& context) {
  if (context.workspace_bytes < divergence_workspace_bytes_cuda(a, context)) return {Status::unsupported};
  double* partials = a.reduction == Reduction::none ? nullptr : static_cast<double*>(context.workspace);
  return run({a, partials, 0, /*backward=*/false}, context.stream);
}
Status divergence_backward_cuda(const DivergenceArgs& a, const CudaContext& context) {
  return run({a, nullptr, 0, /*backward=*/true}, context.stream);
}

const char* divergence_regime_cuda(const DivergenceArgs& a) {
  const Share share = share_of(a);
  return share == Share::thread ? "a thread per row" : share == Share::warp ? "a warp per row" : "a block per row";
}

}  // namespace fastloss
