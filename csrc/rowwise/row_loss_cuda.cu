#include "row_loss_cuda.h"
#include "row_loss_kernels.cuh"

namespace fastloss {

namespace {

// A thread for each item, or fewer.
LaunchShape shape_for(int64_t items, int64_t most_blocks, bool sums) {
  LaunchShape shape;
  const int64_t blocks = (items + kRowLossThreads - 1) / kRowLossThreads;
  shape.grid = blocks < 1 ? 1 : blocks < most_blocks ? blocks : most_blocks;
  shape.block = kRowLossThreads;
  shape.shared = sums ? 2 * kWarp * static_cast<int>(sizeof(double)) : 0;
  return shape;
}

// The strides fill outer * classes * inner elements without a gap, in whatever order.
bool is_dense(const RowLossArgs& a) {
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

// f(lanes) with the number of threads that share a row.
template <class Loss, class F>
Status with_lanes(const RowLossArgs& a, const F& f) {
  if constexpr (Loss::sums > 0)
    if (a.inner == 1 || a.input_strides.inner > a.input_strides.cls) return f(std::integral_constant<int, kWarp>{});
  return f(std::integral_constant<int, 1>{});
}

template <class Loss, class T>
Status forward(const RowLossArgs& a, const CudaContext& context) {
  RowLossParams p{a, nullptr, 0, nullptr};
  Status status;
  p.record = bad_target_record_cuda(&status);
  if (status.code != Status::ok) return status;
  const bool sums = a.reduction != Reduction::none || a.total_weight;
  if (sums && context.workspace_bytes < row_loss_workspace_bytes_cuda(a, context)) return {Status::unsupported};
  status = with_lanes<Loss>(a, [&](auto lanes) {
    const LaunchShape shape = shape_for(a.rows() * lanes.value, kRowLossMaxBlocks, true);
    p.blocks = static_cast<int>(shape.grid);
    if (sums) p.partials = static_cast<double*>(context.workspace);
    return launch(row_loss_forward_kernel<Loss, T, lanes.value>, shape, context.stream, p);
  });
  if (status.code != Status::ok || !sums) return status;
  return launch(row_loss_finish_kernel<T>, shape_for(1, 1, true), context.stream, p);
}

template <class Loss, class T>
Status backward(const RowLossArgs& a, const CudaContext& context) {
  const RowLossParams p{a, nullptr, 0, nullptr};
  const int64_t count = a.rows() * a.classes;
  const int64_t most = int64_t(device_properties(context.device).multiprocessors) * 32;
  if (count == 0) return {};
  if constexpr (Loss::sums == 0) {
    Status status = is_dense(a) ? fill_zero(a.grad, count * static_cast<int64_t>(sizeof(T)), context.stream)
                                : launch(row_loss_zero_kernel<T>, shape_for(count, most, false), context.stream, p);
    if (status.code != Status::ok) return status;
    return launch(row_loss_target_kernel<Loss, T>, shape_for(a.rows(), most, false), context.stream, p);
  } else {
    return with_lanes<Loss>(a, [&](auto lanes) {
      const LaunchShape shape = shape_for(a.rows() * lanes.value, most, false);
      return launch(row_loss_gradient_kernel<Loss, T, lanes.value>, shape, context.stream, p);
    });
  }
}

// run(loss, tag) for the loss and the storage type of the arguments.
template <class F>
Status dispatch(const RowLossArgs& a, const F& run) {
  Status status;
  with_row_loss(RowLosses{}, a.kind,
                [&](auto loss) { with_type(a.input_type, [&](auto tag) { status = run(loss, tag); }); });
  return status;
}

}  // namespace

int64_t row_loss_workspace_bytes_cuda(const RowLossArgs&, const CudaContext&) {
  return 2 * kRowLossMaxBlocks * static_cast<int64_t>(sizeof(double));
}

Status row_loss_forward_cuda(const RowLossArgs& a, const CudaContext& context) {
  return dispatch(a, [&](auto loss, auto tag) { return forward<decltype(loss), decltype(tag)>(a, context); });
}

Status row_loss_backward_cuda(const RowLossArgs& a, const CudaContext& context) {
  return dispatch(a, [&](auto loss, auto tag) { return backward<decltype(loss), decltype(tag)>(a, context); });
}

}  // namespace fastloss
