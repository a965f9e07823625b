#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "cross_entropy_cuda.h"
#include "cross_entropy_launch.cuh"

namespace fastloss {

namespace {

// What the policy sees: the device's own word, and the largest cluster that can be launched.
const DeviceProperties& policy_device(int device) {
  constexpr int kDevices = 64;
  static std::once_flag once[kDevices];
  static DeviceProperties known[kDevices];
  if (device < 0 || device >= kDevices) return device_properties(device);
  std::call_once(once[device], [device] {
    known[device] = device_properties(device);
    if (known[device].max_cluster > 1) known[device].max_cluster = largest_row_cluster(known[device].max_cluster);
  });
  return known[device];
}

// FASTLOSS_ROWWISE_TUNING=rows_to_stream,row_blocks,few_vectors is for bench/cuda/sweep.py.
const RowwiseTuning& tuning() {
  static const RowwiseTuning known = [] {
    RowwiseTuning t;
    if (const char* tried = std::getenv("FASTLOSS_ROWWISE_TUNING"))
      std::sscanf(tried, "%d,%d,%d", &t.rows_to_stream, &t.row_blocks, &t.few_vectors);
    return t;
  }();
  return known;
}

constexpr int64_t kTotalsBytes = kMaxTotals * 4 * sizeof(double), kCounterBytes = 128;

int grid_offset(const void* p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15); }

CrossEntropyPlan plan_of(const CrossEntropyArgs& args, Pass pass, const DeviceProperties& device) {
  CrossEntropyPlan plan;
  plan.a = args;
  plan.pass = pass;
  CrossEntropyArgs& a = plan.a;
  Strides* tensors[4] = {&a.logits_strides};
  int count = 1;
  if (a.grad) tensors[count++] = &a.grad_strides;
  if (a.soft) tensors[count++] = &a.target_strides;
  if (a.grad_target && pass == Pass::backward) tensors[count++] = &a.grad_target_strides;
  merge_axes(&a.outer, a.classes, &a.inner, tensors, count);
  if (a.rows() == 0) a.outer = 0, a.inner = 1;  // the kernels divide by the size of the inner axis

  RowwiseProblem problem;
  problem.outer = a.outer;
  problem.classes = a.classes;
  problem.inner = a.inner;
  problem.element_bytes = static_cast<int>(size_of(a.logits_type));
  problem.logits = a.logits_strides;
  problem.grad = a.grad_strides;
  problem.has_grad = pass != Pass::forward && a.grad;
  problem.logits_offset = grid_offset(a.logits);
  problem.grad_offset = grid_offset(a.grad);
  problem.general = a.logits_type == DType::f64 || a.soft || a.label_smoothing > 0 || a.softcap > 0 ||
                    a.logit_scale != 1 || a.row_map != 0 || a.has_margin() ||
                    (pass != Pass::backward && (a.argmax || a.accuracy || a.entropy || a.stats_best)) ||
                    a.classes > INT32_MAX / 2;  // the others count classes, and a turn of a loop further, in 32 bits
  problem.in_place = problem.has_grad && a.grad == a.logits;
  problem.pass = pass;
  plan.config = rowwise_config(problem, device, tuning());
  const bool weighted_classes = a.weight && (a.label_smoothing > 0);
  if (pass == Pass::backward) {
    plan.totals = weighted_classes && !a.soft;
  } else {
    plan.finish = (a.loss && a.reduction != Reduction::none) || a.accuracy;
    plan.totals = !a.stats && (plan.finish || a.saved || weighted_classes);
    if (plan.finish && plan.config.grid == 0) plan.config.grid = plan.config.parts;  // no rows: the scalars remain
  }
  if (plan.totals)
    plan.workspace_bytes =
        kTotalsBytes + (plan.finish ? kCounterBytes + 4 * plan.config.grid * int64_t(sizeof(double)) : 0);
  return plan;
}

template <class A>
Status run(const CrossEntropyPlan& plan, const CudaContext& context) {
  const CrossEntropyArgs& a = plan.a;
  CrossEntropyParams<A> p{};
  p.logits = a.logits;
  p.grad = a.grad;
  p.target = a.target;
  p.weight = a.weight ? static_cast<const A*>(a.weight) + a.class_offset : nullptr;
  p.normalizer = a.normalizer;
  p.class_offset = a.class_offset;
  p.all_classes = a.all_classes();
  p.fields = a.saved_fields();
  p.row_map = RowMap(a.row_map);
  p.margin = Margin<A>::of(a.margin_angle, a.margin_cosine);
  for (int i = 0; i < 2; ++i) p.map_params[i] = A(a.map_params[i]);
  p.sample_weight = static_cast<const A*>(a.sample_weight);
  p.logits_strides = a.logits_strides;
  p.grad_strides = a.grad_strides;
  p.target_strides = a.target_strides;
  p.grad_target_strides = a.grad_target_strides;
  p.outer = a.outer;
  p.classes = a.classes;
  p.inner = a.inner;
  p.rows = a.rows();
  p.ignore_index = a.ignore_index;
  p.saved = static_cast<A*>(a.saved);
  p.loss_type = a.loss_type;
  p.prob_type = a.prob_type;
  p.index_type = a.index_type;
  p.reduction = a.reduction;
  p.pass = plan.pass;
  p.soft = a.soft;
  p.smooth = a.label_smoothing > 0;
  p.transform = a.softcap > 0 || a.logit_scale != 1 || a.has_margin();
  p.zero_times_inf = a.zero_times_inf;
  p.all_ignored_zero = a.all_ignored_zero;
  p.want_q = p.soft || p.smooth;
  p.k.smoothing = A(a.label_smoothing > 0 ? a.label_smoothing : 0);
  p.k.smooth_share = a.label_smoothing > 0 ? A(a.label_smoothing / double(p.all_classes)) : A(0);
  p.k.weight_sum = A(double(p.all_classes));
  p.k.z_loss = A(a.z_loss);
  p.k.logit_scale = A(a.logit_scale);
  p.k.softcap = A(a.softcap);
  p.k.inv_softcap = A(a.softcap > 0 ? 1 / a.softcap : 0);
  if (plan.pass == Pass::backward) {
    p.in_place = a.grad && a.grad == a.logits;
    p.grad_target = a.grad_target;
    p.grad_output = a.grad_output;
    p.grad_output_per_row = a.grad_output_per_row;
  } else {
    p.loss = a.loss;
    p.lse = static_cast<A*>(a.lse);
    p.argmax = a.argmax;
    p.accuracy = a.accuracy;
    p.entropy = static_cast<A*>(a.entropy);
    p.stats = static_cast<A*>(a.stats);
    p.best_at = a.stat_place(Stat::best);
    p.want_best = a.argmax || a.accuracy || a.stats_best;
    p.want_entropy = a.entropy || a.stats_best;
    if (!a.soft) {
      Status status;
      p.record = bad_target_record_cuda(&status);
      if (status.code != Status::ok) return status;
    }
  }
  const RowwiseConfig& c = plan.config;
  p.lanes = c.lanes;
  p.parts = c.parts;
  p.slice = c.slice;
  p.groups = c.groups;

  if (plan.totals) {
    auto* workspace = static_cast<unsigned char*>(context.workspace);
    p.totals = reinterpret_cast<double*>(workspace);
    p.totals_count = totals_blocks(p.rows, p.weight && p.smooth ? p.all_classes : 0);
    if (plan.finish) {
      p.counter = reinterpret_cast<unsigned*>(workspace + kTotalsBytes);
      p.partials = reinterpret_cast<double*>(workspace + kTotalsBytes + kCounterBytes);
    }
    LaunchShape shape;
    shape.grid = p.totals_count;
    shape.block = 256;
    shape.shared = 4 * kWarp * static_cast<int>(sizeof(double));
    Status status = launch(cross_entropy_totals_kernel<A>, shape, context.stream, p);
    if (status.code != Status::ok) return status;
  }
  switch (a.logits_type) {
    case DType::f32:
      if constexpr (std::is_same_v<A, float>) return launch_cross_entropy<float>(c, p, context.stream);
      break;
    case DType::f16:
      if constexpr (std::is_same_v<A, float>) return launch_cross_entropy<half_t>(c, p, context.stream);
      break;
    case DType::bf16:
      if constexpr (std::is_same_v<A, float>) return launch_cross_entropy<bfloat16_t>(c, p, context.stream);
      break;
    case DType::f64:
      if constexpr (std::is_same_v<A, double>) return launch_cross_entropy<double>(c, p, context.stream);
      break;
  }
  return {Status::unsupported};
}

}  // namespace

CrossEntropyPlan cross_entropy_plan_cuda(const CrossEntropyArgs& a, const CudaContext& context, bool backward) {
  const Pass pass = backward ? Pass::backward : a.grad ? Pass::forward_grad : Pass::forward;
  return plan_of(a, pass, policy_device(context.device));
}

Status cross_entropy_run_cuda(const CrossEntropyPlan& plan, const CudaContext& context) {
  if (context.workspace_bytes < plan.workspace_bytes || !plan.a.margin_is_supported()) return {Status::unsupported};
  return accum_of(plan.a.logits_type) == DType::f64 ? run<double>(plan, context) : run<float>(plan, context);
}

const char* cross_entropy_regime_cuda(const CrossEntropyPlan& plan) {
  const RowwiseConfig& c = plan.config;
  switch (c.regime) {
    case Regime::warp_rows: return c.general ? "warp rows, general" : "warp rows";
    case Regime::block_rows:
      return c.cluster ? (c.general ? "cluster rows, general" : "cluster rows")
                       : (c.general ? "block rows, general" : "block rows");
    case Regime::streaming_rows: return c.general ? "streaming rows, general" : "streaming rows";
    case Regime::tile: return "tiles of rows";
    case Regime::column: return "columns";
    case Regime::plane: break;
  }
  return c.wide ? (c.general ? "planes, 8 bytes, general" : "planes, 8 bytes")
                : (c.general ? "planes, any strides, general" : "planes, any strides");
}

}  // namespace fastloss
