// Kernels with one fault each, for the test of the emulator itself (tests/core/test_emulator.py).
#include "common/primitives.cuh"
#include "emulator.h"

namespace fastloss {
namespace {

using emulator::Fault;

constexpr int kThreads = 64, kShared = 256;

struct Params {
  Fault fault;
  const int32_t* memory;  // global, on a 16-byte boundary
};

__global__ void __launch_bounds__(kThreads) faulty_kernel(const Params p) {
  unsigned char* shared = shared_memory();
  const unsigned lane = threadIdx.x % kWarp;
  switch (p.fault) {
    case Fault::none:
      shared[threadIdx.x] = 1;
      block_barrier();
      if (group_sum(int(shared[threadIdx.x ^ kWarp]), kWarp) != kWarp) warp_barrier();
      return;
    case Fault::early_return:
      if (threadIdx.x == 5) return;
      block_barrier();
      return;
    case Fault::two_barriers:
      if (threadIdx.x < kWarp) {
        block_barrier();
      } else {
        block_barrier();
      }
      return;
    case Fault::inactive_lanes:
      if (lane < 16) group_sum(1.f, 16);
      return;
    case Fault::part_of_a_warp: __shfl_xor_sync(0xffffu, 1.f, 1); return;
    case Fault::arrive_without_wait: cluster_arrive(); return;
    case Fault::wait_without_arrive: cluster_wait(); return;
    case Fault::peer_has_left:
      cluster_arrive();
      cluster_wait();
      if (blockIdx.x == 0 && *cluster_map(shared, 1) == 0) warp_barrier();
      return;
    case Fault::misaligned: store16(shared + 4, Vec16{}); return;
    case Fault::misaligned_word: load8_stream(p.memory + 1); return;
    case Fault::stream_of_shared: store16_stream(shared, Vec16{}); return;
    case Fault::overrun:
      if (threadIdx.x == 0) shared[kShared] = 0;
      return;
  }
}

}  // namespace

Status emulator::provoke(Fault fault) {
  LaunchShape shape;
  shape.grid = shape.cluster = 2;
  shape.block = kThreads;
  shape.shared = kShared;
  alignas(16) static const int32_t memory[4] = {};
  return launch(faulty_kernel, shape, nullptr, Params{fault, memory});
}

}  // namespace fastloss
