#include "pointwise_cuda.h"
#include "pointwise_launch.cuh"

namespace fastloss {

namespace {

int64_t counter_bytes(const PointwiseArgs& a) { return (a.rows * 4 + 15) / 16 * 16; }

Status run(const PointwiseArgs& a, const CudaContext& context, PointwisePass pass) {
  const PointwiseConfig config = pointwise_config(a, pass);
  PointwiseParams p{a, pass, config.parts, nullptr, nullptr, 1 / double(config.parts), {}, false};
  const auto at_32_bytes = [](const PointwiseOperand& o) { return reinterpret_cast<uintptr_t>(o.data) % 32 == 0; };
  p.wide = at_32_bytes(a.input) && at_32_bytes(a.target) && at_32_bytes(a.grad_input);
  for (int k = 0; k < a.dim; ++k) p.inverse_sizes[k] = 1 / double(a.sizes[k]);
  if (a.rows == 0 || (a.count() == 0 && !sums_rows(a, pass))) return {};
  if (config.parts > 1 && sums_rows(a, pass)) {
    if (context.workspace_bytes < pointwise_workspace_bytes_cuda(a, context)) return {Status::unsupported};
    auto* workspace = static_cast<unsigned char*>(context.workspace);
    p.counters = reinterpret_cast<unsigned*>(workspace);
    p.partials = reinterpret_cast<double*>(workspace + counter_bytes(a));
    const Status status = fill_zero(p.counters, counter_bytes(a), context.stream);
    if (status.code != Status::ok) return status;
  }
  LaunchShape shape;
  shape.grid = config.grid;
  shape.block = kPointwiseThreads;
  shape.shared = (2 * kWarp + 1) * static_cast<int>(sizeof(double));
  if (!config.streaming)
    return a.accum == DType::f64 ? launch_pointwise_general<double>(shape, p, context.stream)
                                 : launch_pointwise_general<float>(shape, p, context.stream);
  switch (a.input.type) {
    case DType::f16: return launch_pointwise_streaming<half_t>(shape, p, context.stream);
    case DType::bf16: return launch_pointwise_streaming<bfloat16_t>(shape, p, context.stream);
    default: return launch_pointwise_streaming<float>(shape, p, context.stream);
  }
}

}  // namespace

int64_t pointwise_workspace_bytes_cuda(const PointwiseArgs& a, const CudaContext&) {
  int64_t parts = 1;
  for (PointwisePass pass : {PointwisePass::forward, PointwisePass::second}) {
    const int64_t of_pass = pointwise_config(a, pass).parts;
    if (of_pass > parts) parts = of_pass;
  }
  return parts == 1 ? 0 : counter_bytes(a) + 2 * a.rows * parts * static_cast<int64_t>(sizeof(double));
}

Status pointwise_forward_cuda(const PointwiseArgs& a, const CudaContext& context) {
  return run(a, context, PointwisePass::forward);
}
Status pointwise_backward_cuda(const PointwiseArgs& a, const CudaContext& context) {
  return run(a, context, PointwisePass::backward);
}
Status pointwise_second_cuda(const PointwiseArgs& a, const CudaContext& context) {
  return run(a, context, PointwisePass::second);
}

}  // namespace fastloss
