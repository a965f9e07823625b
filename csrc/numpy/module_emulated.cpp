// The CUDA kernels on numpy arrays: fastloss_core_numpy's functions, carried out by the emulator (tests/emulate).
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "../common/errors_cuda.h"
#include "../common/scale_grad_cuda.h"
#include "../pointwise/pointwise_cuda.h"
#include "../rowwise/cross_entropy_cuda.h"
#include "../rowwise/dice_loss_cuda.h"
#include "../rowwise/divergence_cuda.h"
#include "../rowwise/row_loss_cuda.h"
#include "../rowwise/token_log_probs_cuda.h"
#include "arrays.h"
#include "emulator.h"

// The losses by name alone: pointwise_cpu.cpp is not in this module.
#define FASTLOSS_ISA host
namespace fastloss {
namespace host {
template <class V>
using lane_t = V;
}  // namespace host
}  // namespace fastloss
#include "../pointwise/registry.h"

namespace fastloss {

namespace {

const char* regime = "";

CudaContext context_of_device() {
  CudaContext context;
  context.device = emulator::current_device;
  return context;
}

// A call with a workspace of exactly the size it asks for, filled with nan (64 MiB of it: calls that run in part only
// may ask for gigabytes).
template <class Call>
Status with_workspace(int64_t bytes, const Call& call) {
  CudaContext context = context_of_device();
  context.workspace_bytes = bytes;
  const std::unique_ptr<unsigned char[]> workspace(new unsigned char[size_t(bytes)]);
  std::memset(workspace.get(), 0xff, std::min(size_t(bytes), size_t(64) << 20));
  context.workspace = workspace.get();
  return call(context);
}
template <class Args>
Status with_workspace(const Args& a, int64_t (*bytes)(const Args&, const CudaContext&),
                      Status (*call)(const Args&, const CudaContext&)) {
  return with_workspace(bytes(a, context_of_device()), [&](const CudaContext& context) { return call(a, context); });
}
Status run_pointwise(const PointwiseArgs& a, PointwisePass pass) {
  const PointwiseConfig config = pointwise_config(a, pass);
  regime = pointwise_regime_name(config.regime);
  return with_workspace(config.workspace_bytes,
                        [&](const CudaContext& context) { return pointwise_cuda(a, config, context); });
}
Status run_cross_entropy(const CrossEntropyArgs& a, bool backward) {
  const CrossEntropyPlan plan = cross_entropy_plan_cuda(a, context_of_device(), backward);
  regime = cross_entropy_regime_cuda(plan);
  return with_workspace(plan.workspace_bytes,
                        [&](const CudaContext& context) { return cross_entropy_run_cuda(plan, context); });
}

}  // namespace

Status run_cross_entropy_forward(const CrossEntropyArgs& a) { return run_cross_entropy(a, /*backward=*/false); }
Status run_cross_entropy_backward(const CrossEntropyArgs& a) { return run_cross_entropy(a, /*backward=*/true); }
Status run_row_loss_forward(const RowLossArgs& a) {
  return with_workspace(a, row_loss_workspace_bytes_cuda, row_loss_forward_cuda);
}
Status run_row_loss_backward(const RowLossArgs& a) {
  return with_workspace(a, row_loss_workspace_bytes_cuda, row_loss_backward_cuda);
}
Status run_dice_loss_forward(const DiceLossArgs& a) {
  return with_workspace(a, dice_loss_workspace_bytes_cuda, dice_loss_forward_cuda);
}
Status run_dice_loss_backward(const DiceLossArgs& a) {
  return with_workspace(a, dice_loss_workspace_bytes_cuda, dice_loss_backward_cuda);
}
Status run_divergence_forward(const DivergenceArgs& a) {
  return with_workspace(a, divergence_workspace_bytes_cuda, divergence_forward_cuda);
}
Status run_divergence_backward(const DivergenceArgs& a) { return divergence_backward_cuda(a, context_of_device()); }
Status run_token_log_probs_backward(const TokenLogProbsArgs& a) {
  return token_log_probs_backward_cuda(a, context_of_device());
}
const PointwiseLoss* pointwise_losses() { return host::registry(); }
Status run_pointwise_forward(const PointwiseArgs& a) { return run_pointwise(a, PointwisePass::forward); }
Status run_pointwise_backward(const PointwiseArgs& a) { return run_pointwise(a, PointwisePass::backward); }
Status run_scale_grad(const void* grad, void* out, DType type, int64_t count, const void* scale, DType scale_type) {
  return scale_grad_cuda(grad, out, type, count, scale, scale_type, context_of_device());
}
std::string failure_message(const Status& status) {
  return status.code == Status::cuda_error ? emulator::last_error() : "core status " + std::to_string(status.code);
}

}  // namespace fastloss

PYBIND11_MODULE(fastloss_emulated_numpy, m) {
  namespace py = pybind11;
  using namespace fastloss;
  m.doc() =
      "fastloss's CUDA kernels on numpy arrays, each thread a fiber. What the emulator finds wrong is a RuntimeError.";
  m.def("set_seed", &emulator::set_seed, py::arg("seed"), "The schedule of the following calls.");
  m.def(
      "set_device",
      [](int sm) {
        for (int i = 0; i < emulator::kDevices; ++i)
          if (emulator::device(i).sm == sm) return void(emulator::current_device = i);
        throw py::value_error("no such emulated device");
      },
      py::arg("sm"),
      "Run on a device of this compute capability: 80, 90 or 120 with one multiprocessor, 100 with a million.");
  m.def(
      "set_only_ends", [](bool only) { emulator::only_ends = only; }, py::arg("only"),
      "Run the first and the last block (or cluster) of every launch, and no other.");
  m.def(
      "launches",
      [] {
        std::vector<std::tuple<int64_t, int, int>> all;
        for (const LaunchShape& shape : emulator::launches()) all.emplace_back(shape.grid, shape.block, shape.cluster);
        return all;
      },
      "(grid, block, cluster) of every launch since set_seed.");
  m.def(
      "regime", [] { return regime; },
      "The kernel of the last call of cross entropy or of a pointwise loss, as explain() says it.");
  m.def(
      "take_bad_target",
      []() -> std::optional<std::pair<int64_t, int64_t>> {
        const Status status = bad_target_take_cuda();
        if (status.code != Status::bad_target) return std::nullopt;
        return std::pair(status.row, status.value);
      },
      "(row, value) of a bad target since the last call, or None.");
  py::enum_<emulator::Fault> faults(m, "Fault");
  for (auto [name, fault] : {std::pair("none", emulator::Fault::none),
                             {"early_return", emulator::Fault::early_return},
                             {"two_barriers", emulator::Fault::two_barriers},
                             {"inactive_lanes", emulator::Fault::inactive_lanes},
                             {"part_of_a_warp", emulator::Fault::part_of_a_warp},
                             {"arrive_without_wait", emulator::Fault::arrive_without_wait},
                             {"wait_without_arrive", emulator::Fault::wait_without_arrive},
                             {"peer_has_left", emulator::Fault::peer_has_left},
                             {"misaligned", emulator::Fault::misaligned},
                             {"misaligned_word", emulator::Fault::misaligned_word},
                             {"stream_of_shared", emulator::Fault::stream_of_shared},
                             {"overrun", emulator::Fault::overrun}})
    faults.value(name, fault);
  m.def(
      "provoke", [](emulator::Fault fault) { run_core([&] { return emulator::provoke(fault); }); }, py::arg("fault"),
      "Run a kernel with a fault, for the test of the emulator.");
  bind_cross_entropy(m);
  bind_row_loss(m);
  bind_dice_loss(m);
  bind_divergence(m);
  bind_token_log_probs(m);
  bind_pointwise(m);
  bind_scale_grad(m);
  bind_policy(m);
}
