#include "dice_loss_cuda.h"
#include "dice_loss_kernels.cuh"

namespace fastloss {

namespace {

constexpr int64_t kMostParts = 4096;        // blocks, unless there are more groups
constexpr int64_t kMostShared = 48 * 1024;  // without asking the device
constexpr int64_t kMostFinishBlocks = 4096;

struct DiceConfig {
  int rows;       // per thread
  int threads;    // per block
  int shared;     // bytes
  int64_t parts;  // blocks per group
};

// 16 bytes of each class hold adjacent rows of one group, and are aligned.
bool takes_vectors(const DiceLossArgs& a, const void* data, const Strides& s, int64_t lanes) {
  return s.inner == 1 && s.cls % lanes == 0 && s.outer % lanes == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         a.inner % lanes == 0 && a.rows_per_group() % lanes == 0;
}

// Sums of a group.
int64_t sets_of(const DiceLossArgs& a) { return 3 * a.classes + (with_cross_entropy(a) ? 1 : 0); }

DiceConfig dice_config(const DiceLossArgs& a, bool backward) {
  const int64_t lanes = 16 / size_of(a.input_type), accum = size_of(accum_of(a.input_type));
  const bool vectors =
      takes_vectors(a, a.input, a.input_strides, lanes) && (!a.grad || takes_vectors(a, a.grad, a.grad_strides, lanes));
  DiceConfig c;
  c.rows = vectors ? static_cast<int>(lanes) : 1;
  c.threads = kDiceThreads;
  const int64_t shared = backward ? 3 * accum * a.classes : int64_t(kDiceThreads / kWarp) * 8 * sets_of(a);
  c.shared = shared <= kMostShared ? static_cast<int>(shared) : 0;
  if (!backward && shared > kMostShared) c.threads = kWarp;
  const int64_t tile = int64_t(c.threads) * c.rows, tiles = (a.rows_per_group() + tile - 1) / tile;
  const int64_t most = a.groups < kMostParts ? kMostParts / (a.groups > 0 ? a.groups : 1) : 1;
  c.parts = tiles < most ? tiles : most;
  return c;
}

// Class indices travel in 32 bits.
bool indices_fit(const DiceLossArgs& a) { return a.dense || a.classes <= INT32_MAX; }

int64_t counter_bytes(const DiceLossArgs& a) { return (4 * (2 * a.groups + 1) + 15) / 16 * 16; }

// For the kernels of T, with as many rows per thread as the configuration says.
template <class F>
void with_rows(DType type, int rows, const F& f) {
  with_type(type, [&](auto tag) {
    using T = decltype(tag);
    rows == 1 ? f(tag, std::integral_constant<int, 1>{}) : f(tag, std::integral_constant<int, kLanes16<T>>{});
  });
}

DiceLossParams params_of(const DiceLossArgs& a, const DiceConfig& config) {
  DiceLossParams p{};
  p.a = a;
  p.rows_per_group = a.rows_per_group();
  p.parts = config.parts;
  p.sets = sets_of(a);
  p.shared = config.shared > 0;
  return p;
}

LaunchShape shape_of(const DiceLossArgs& a, const DiceConfig& config) {
  LaunchShape shape;
  shape.grid = a.groups * config.parts;
  shape.block = config.threads;
  shape.shared = config.shared;
  return shape;
}

}  // namespace

int dice_loss_rows_per_thread_cuda(const DiceLossArgs& a) { return dice_config(a, /*backward=*/false).rows; }

int64_t dice_loss_workspace_bytes_cuda(const DiceLossArgs& a, const CudaContext&) {
  const int64_t parts = dice_config(a, /*backward=*/false).parts, items = a.groups * a.classes;
  const int64_t doubles = a.groups * sets_of(a) * parts + items + (with_cross_entropy(a) ? items + a.groups : 0);
  return counter_bytes(a) + doubles * static_cast<int64_t>(sizeof(double));
}

Status dice_loss_forward_cuda(const DiceLossArgs& a, const CudaContext& context) {
  if (!indices_fit(a) || !a.consistent()) return {Status::unsupported};
  const DiceConfig config = dice_config(a, /*backward=*/false);
  DiceLossParams p = params_of(a, config);
  Status status;
  p.record = bad_target_record_cuda(&status);
  if (status.code != Status::ok) return status;
  if (context.workspace_bytes < dice_loss_workspace_bytes_cuda(a, context)) return {Status::unsupported};
  auto* workspace = static_cast<unsigned char*>(context.workspace);
  p.counter = reinterpret_cast<unsigned*>(workspace);
  p.bad = p.counter + 1;
  p.counted = p.bad + a.groups;
  p.partials = reinterpret_cast<double*>(workspace + counter_bytes(a));
  const int64_t items = a.groups * a.classes;
  double* const of_items = p.partials + a.groups * p.sets * config.parts;
  if (a.reduction != Reduction::none) p.losses = of_items;
  p.weights = of_items + items;
  p.nll = p.weights + items;
  status = fill_zero(workspace, counter_bytes(a), context.stream);
  if (status.code != Status::ok) return status;
  if (a.classes > 0)
    with_rows(a.input_type, config.rows, [&](auto tag, auto rows) {
      status =
          launch(dice_loss_sums_kernel<decltype(tag), decltype(rows)::value>, shape_of(a, config), context.stream, p);
    });
  if (status.code != Status::ok) return status;
  LaunchShape finish;
  const int64_t blocks = items + (with_cross_entropy(a) ? a.groups : 0);
  finish.grid = blocks < 1 ? 1 : blocks < kMostFinishBlocks ? blocks : kMostFinishBlocks;
  finish.block = kDiceFinishThreads;
  finish.shared = (3 * kWarp + 1) * static_cast<int>(sizeof(double));
  with_type(a.input_type,
            [&](auto tag) { status = launch(dice_loss_finish_kernel<decltype(tag)>, finish, context.stream, p); });
  return status;
}

Status dice_loss_backward_cuda(const DiceLossArgs& a, const CudaContext& context) {
  if (!indices_fit(a) || !a.consistent()) return {Status::unsupported};
  const DiceConfig config = dice_config(a, /*backward=*/true);
  if (a.classes == 0) return {};
  const DiceLossParams p = params_of(a, config);
  Status status;
  with_rows(a.input_type, config.rows, [&](auto tag, auto rows) {
    status =
        launch(dice_loss_gradient_kernel<decltype(tag), decltype(rows)::value>, shape_of(a, config), context.stream, p);
  });
  return status;
}

}  // namespace fastloss
