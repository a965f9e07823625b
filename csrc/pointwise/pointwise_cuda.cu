#include <utility>

#include "pointwise_cuda.h"
#include "pointwise_launch.cuh"

namespace fastloss {

namespace {
template <int... kGroups>
Status launch_group(const PointwiseArgs& a, const LaunchShape& shape, const PointwiseParams& p, void* stream,
                    std::integer_sequence<int, kGroups...>) {
  using Launch = Status(const LaunchShape&, const PointwiseParams&, void*);
  static constexpr Launch* in_float[] = {launch_pointwise<LossGroup(kGroups), float>...};
  static constexpr Launch* in_double[] = {launch_pointwise<LossGroup(kGroups), double>...};
  return (a.accum == DType::f64 ? in_double : in_float)[int(a.group)](shape, p, stream);
}
}  // namespace

Status pointwise_cuda(const PointwiseArgs& a, const PointwiseConfig& config, const CudaContext& context) {
  if (a.rows == 0 || (a.count() == 0 && !config.sums_rows)) return {};
  PointwiseParams p{};
  p.a = a;
  p.config = config;
  if (a.checks && config.pass == PointwisePass::forward) {
    Status status;
    p.record = bad_target_record_cuda(&status);
    if (status.code != Status::ok) return status;
  }
  p.inverse_parts = 1 / double(config.parts);
  for (int k = 0; k < a.dim; ++k) p.inverse_sizes[k] = 1 / double(a.sizes[k]);
  for (int k = 0; k < kPointwiseOperands; ++k) {
    p.operand_is_flat[k] = is_flat(a, a.operands[k]);
    p.grad_is_flat[k] = is_flat(a, a.grads[k]);
  }
  p.weight_is_flat = is_flat(a, a.weight);
  p.mask_is_flat = is_flat(a, a.mask);
  p.loss_is_flat = is_flat(a, a.loss_elements);
  p.multiplier_is_flat = is_flat(a, a.multiplier);
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
  return launch_group(a, shape, p, context.stream, std::make_integer_sequence<int, kLossGroups>{});
}

}  // namespace fastloss
