// The torch-free core as a Python module over numpy arrays, for tests and microbenchmarks of the kernels.
#include <atomic>
#include <thread>

#include "../common/cpu_isa.h"
#include "../common/scale_grad.h"
#include "arrays.h"

namespace fastloss {

namespace {

std::atomic<int> num_threads{1};

// One thread per range, the caller takes the last; 1 thread: a plain call.
void thread_ranges(int64_t count, int64_t grain, RangeBody body, void* ctx) {
  if (count <= 0) return;
  const int64_t most = (count + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int64_t threads = std::min<int64_t>(num_threads, most);
  std::vector<std::thread> others;
  for (int64_t i = 0; i + 1 < threads; ++i)
    others.emplace_back(body, ctx, count * i / threads, count * (i + 1) / threads);
  body(ctx, count * (threads - 1) / threads, count);
  for (std::thread& other : others) other.join();
}

Isa isa_of(const std::string& name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (name == isa_name(isa)) return isa;
  throw py::value_error("expected portable, avx2 or avx512, got " + name);
}

}  // namespace

Status run_cross_entropy_forward(const CrossEntropyArgs& a) { return cross_entropy_forward_cpu(a, thread_ranges); }
Status run_cross_entropy_backward(const CrossEntropyArgs& a) { return cross_entropy_backward_cpu(a, thread_ranges); }
Status run_row_loss_forward(const RowLossArgs& a) { return row_loss_forward_cpu(a, thread_ranges); }
Status run_row_loss_backward(const RowLossArgs& a) { return row_loss_backward_cpu(a, thread_ranges); }
Status run_dice_loss_forward(const DiceLossArgs& a) { return dice_loss_forward_cpu(a, thread_ranges); }
Status run_dice_loss_backward(const DiceLossArgs& a) { return dice_loss_backward_cpu(a, thread_ranges); }
Status run_divergence_forward(const DivergenceArgs& a) { return divergence_forward_cpu(a, thread_ranges); }
Status run_divergence_backward(const DivergenceArgs& a) { return divergence_backward_cpu(a, thread_ranges); }
Status run_token_log_probs_backward(const TokenLogProbsArgs& a) {
  return token_log_probs_backward_cpu(a, thread_ranges);
}
Status run_pointwise_forward(const PointwiseArgs& a) { return pointwise_forward_cpu(a, thread_ranges); }
Status run_pointwise_backward(const PointwiseArgs& a) { return pointwise_backward_cpu(a, thread_ranges); }
Status run_scale_grad(const void* grad, void* out, DType type, int64_t count, const void* scale, DType scale_type) {
  scale_grad_cpu(grad, out, type, count, scale, scale_type, thread_ranges);
  return {};
}
std::string failure_message(const Status& status) { return "core status " + std::to_string(status.code); }

}  // namespace fastloss

PYBIND11_MODULE(fastloss_core_numpy, m) {
  namespace py = pybind11;
  using namespace fastloss;
  m.doc() = "fastloss's torch-free core on numpy arrays. uint16 in the place of a float dtype is bfloat16.";
  m.def(
      "set_num_threads",
      [](int n) {
        if (n < 1) throw py::value_error("the number of threads must be at least 1");
        num_threads = n;
      },
      py::arg("n"), "Threads of the following calls; 1, the default, runs in the calling thread.");
  m.def("get_num_threads", [] { return num_threads.load(); });
  m.def("best_isa", [] { return isa_name(best_isa()); }, "The best instruction set of this machine and build.");
  m.def("current_isa", [] { return isa_name(current_isa()); });
  m.def(
      "set_isa", [](const std::string& name) { return set_isa(isa_of(name)); }, py::arg("name"),
      "Use portable, avx2 or avx512; False, changing nothing, when the machine or the build lacks it.");
  bind_cross_entropy(m);
  bind_row_loss(m);
  bind_dice_loss(m);
  bind_divergence(m);
  bind_token_log_probs(m);
  bind_pointwise(m);
  bind_scale_grad(m);
  bind_policy(m);
}
