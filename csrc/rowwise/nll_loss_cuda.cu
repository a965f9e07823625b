#include "nll_loss_cuda.h"
#include "nll_loss_kernels.cuh"

namespace fastloss {

namespace {

LaunchShape shape_for(int64_t items, int64_t most_blocks, bool sums) {
  LaunchShape shape;
  const int64_t blocks = (items + kNllThreads - 1) / kNllThreads;
  shape.grid = blocks < 1 ? 1 : blocks < most_blocks ? blocks : most_blocks;
  shape.block = kNllThreads;
  shape.shared = sums ? 2 * kWarp * static_cast<int>(sizeof(double)) : 0;
  return shape;
}

// The strides fill outer * classes * inner elements without a gap, in whatever order.
bool is_dense(const NllLossArgs& a) {
  int64_t size[3] = {a.outer, a.classes, a.inner};
  int64_t stride[3] = {a.grad_strides.outer, a.grad_strides.cls, a.grad_strides.inner};
  bool taken[3] = {};
  int64_t expected = 1;
  for (int round = 0; round < 3; ++round) {
    int found = -1;
    for (int i = 0; i < 3; ++i)
      if (!taken[i] && (size[i] == 1 || stride[i] == expected)) found = i;
    if (found < 0) return false;
    taken[found] = true;
    expected *= size[found];
  }
  return true;
}

template <class T>
NllLossParams<accum_t<T>> params_of(const NllLossArgs& a) {
  using A = accum_t<T>;
  NllLossParams<A> p{};
  p.input = a.input;
  p.target = a.target;
  p.weight = static_cast<const A*>(a.weight);
  p.loss = a.loss;
  p.total_weight = static_cast<A*>(a.total_weight);
  p.grad_output = a.grad_output;
  p.grad = a.grad;
  p.input_strides = a.input_strides;
  p.grad_strides = a.grad_strides;
  p.outer = a.outer;
  p.classes = a.classes;
  p.inner = a.inner > 0 ? a.inner : 1;
  p.rows = a.rows();
  p.ignore_index = a.ignore_index;
  p.index_type = a.index_type;
  p.loss_type = a.loss_type;
  p.reduction = a.reduction;
  p.grad_output_per_row = a.grad_output_per_row;
  return p;
}

template <class T>
Status forward(const NllLossArgs& a, const CudaContext& context) {
  auto p = params_of<T>(a);
  Status status;
  p.record = bad_target_record_cuda(&status);
  if (status.code != Status::ok) return status;
  const LaunchShape shape = shape_for(a.rows(), kNllMaxBlocks, true);
  const bool sums = a.reduction != Reduction::none || a.total_weight;
  if (sums) {
    if (context.workspace_bytes < nll_loss_workspace_bytes_cuda(a, context)) return {Status::unsupported};
    p.partials = static_cast<double*>(context.workspace);
    p.blocks = static_cast<int>(shape.grid);
  }
  status = launch(nll_loss_forward_kernel<T>, shape, context.stream, p);
  if (status.code != Status::ok || !sums) return status;
  return launch(nll_loss_finish_kernel<T>, shape_for(1, 1, true), context.stream, p);
}

template <class T>
Status backward(const NllLossArgs& a, const CudaContext& context) {
  const auto p = params_of<T>(a);
  const int64_t count = a.rows() * a.classes;
  const int64_t most = int64_t(device_properties(context.device).multiprocessors) * 32;
  if (count == 0) return {};
  Status status = is_dense(a) ? fill_zero(a.grad, count * static_cast<int64_t>(sizeof(T)), context.stream)
                              : launch(nll_loss_zero_kernel<T>, shape_for(count, most, false), context.stream, p);
  if (status.code != Status::ok) return status;
  return launch(nll_loss_scatter_kernel<T>, shape_for(a.rows(), most, false), context.stream, p);
}

}  // namespace

int64_t nll_loss_workspace_bytes_cuda(const NllLossArgs&, const CudaContext&) {
  return 2 * kNllMaxBlocks * static_cast<int64_t>(sizeof(double));
}

Status nll_loss_forward_cuda(const NllLossArgs& a, const CudaContext& context) {
  Status status;
  with_type(a.input_type, [&](auto tag) { status = forward<decltype(tag)>(a, context); });
  return status;
}

Status nll_loss_backward_cuda(const NllLossArgs& a, const CudaContext& context) {
  Status status;
  with_type(a.input_type, [&](auto tag) { status = backward<decltype(tag)>(a, context); });
  return status;
}

}  // namespace fastloss
