#include "pointwise_cuda.h"
#include "pointwise_launch.cuh"

namespace fastloss {

Status pointwise_cuda(const PointwiseArgs& a, const PointwiseConfig& config, const CudaContext& context) {
  if (a.rows == 0 || (a.count() == 0 && !config.sums_rows)) return {};
  PointwiseParams p{};
  p.a = a;
  p.config = config;
  p.inverse_parts = 1 / double(config.parts);
  for (int k = 0; k < a.dim; ++k) p.inverse_sizes[k] = 1 / double(a.sizes[k]);
  for (int k = 0; k < kPointwiseOperands; ++k) {
    p.operand_is_flat[k] = is_flat(a, a.operands[k]);
    p.grad_is_flat[k] = is_flat(a, a.grads[k]);
  }
  p.weight_is_flat = is_flat(a, a.weight);
  p.mask_is_flat = is_flat(a, a.mask);
  p.loss_is_flat = is_flat(a, a.loss_elements);
  p.grad_output_is_flat = is_flat(a, a.grad_output_elements);
  if (config.workspace_bytes > 0) {
    if (context.workspace_bytes < config.workspace_bytes) return {Status::unsupported};
    auto* workspace = static_cast<unsigned char*>(context.workspace);
    p.counters = reinterpret_cast<unsigned*>(workspace);
    p.partials = reinterpret_cast<double*>(workspace + config.counter_bytes);
    const Status status = fill_zero(p.counters, config.counter_bytes, context.stream);
    if (status.code != Status::ok) return status;
  }
  LaunchShape shape;
  shape.grid = config.grid;
  shape.block = kPointwiseThreads;
  shape.shared = kPointwiseShared;
  if (config.regime != PointwiseRegime::streaming)
    return a.accum == DType::f64 ? launch_pointwise_general<double>(shape, p, context.stream)
                                 : launch_pointwise_general<float>(shape, p, context.stream);
  switch (a.operands[0].type) {
    case DType::f16: return launch_pointwise_streaming<half_t>(shape, p, context.stream);
    case DType::bf16: return launch_pointwise_streaming<bfloat16_t>(shape, p, context.stream);
    default: return launch_pointwise_streaming<float>(shape, p, context.stream);
  }
}

}  // namespace fastloss
