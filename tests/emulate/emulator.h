// The emulator: runs a grid of CUDA threads as fibers of one host thread, for tests.
//
// Modelled
//   blocks    each with dynamic shared memory of exactly the size asked for, poisoned before and after; several in
//             flight, started in random order; those of a cluster together
//   warps     32 lanes without lockstep; a shuffle exchanges values and orders no memory
//   schedule  seeded. Warps have random priorities, redrawn now and then, so that one runs far ahead of another, which
//             uncovers more than a fair choice does; lanes run in random order. A thread gives way where it waits
//             and, by chance, at atomics, fences and 128-bit accesses
//   barriers  of a warp, a block, a cluster (arrive and wait apart)
//   atomics   relaxed; memory fences order what they separate from an atomic, and nothing else does (seen under
//             ThreadSanitizer only)
// Reported, with source line and thread
//   a barrier or shuffle that not all threads reach, at whatever place they are instead; threads of one group at two
//   different barriers; a cluster arrive or wait without its counterpart; a peer's shared memory mapped after that
//   block has left; misaligned 64- to 256-bit accesses; streaming accesses to shared memory; writes past the end of the
//   shared memory; launches that the emulated device could not run
// Left to others
//   data races, missing fences: ThreadSanitizer, which sees a thread in every fiber, synchronised as CUDA promises (a
//             volatile write that announces others before any fence, or others after it, is reported there too)
//   accesses out of bounds: AddressSanitizer (shared memory is a heap block of its own)
// Not modelled
//   memory reordering (x86 order at best), speed, occupancy, the rounding of approximate instructions
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "common/device_properties.h"
#include "common/types.h"

namespace fastloss {

struct LaunchShape {
  int64_t grid = 1;  // blocks
  int block = 32;    // threads
  int shared = 0;    // bytes of dynamic shared memory
  int cluster = 1;   // blocks in a cluster; divides grid
};

namespace emulator {

// ---- for tests
void set_seed(uint64_t seed);  // the schedule of the following launches
// Emulated devices by index. They have one multiprocessor, so that small grids make blocks take several rows; but for
// the last one, which has more than any problem has blocks.
constexpr int kDevices = 4;
DeviceProperties device(int index);
extern int current_device;  // of the following launches
// Only the first and the last block or cluster of a launch run: what reaches beyond 2^32 elements would take hours.
extern bool only_ends;
const std::string& last_error();             // what the last failed launch reported
const std::vector<LaunchShape>& launches();  // since the seed was set

// One launch of a kernel with a fault.
enum class Fault {
  none,
  early_return,
  two_barriers,
  inactive_lanes,
  part_of_a_warp,
  arrive_without_wait,
  wait_without_arrive,
  peer_has_left,
  misaligned,
  misaligned_word,
  stream_of_shared,
  overrun
};
Status provoke(Fault fault);

// ---- for primitives_emulated.h
struct Site {  // of a call in the kernel's source
  const char* file;
  int line;
};
struct Index {
  unsigned x;
};
// Of the running thread.
extern Index thread_index, block_index, block_size, grid_size;
extern unsigned char* shared;

using Body = void (*)(const void* argument);
Status run(const LaunchShape& shape, Body body, const void* argument);

void block_barrier(Site site);
void warp_barrier(Site site);
void cluster_arrive(Site site);
void cluster_wait(Site site);
const unsigned char* cluster_map(const void* p, int rank, Site site);
uint64_t shuffle_xor(unsigned mask, uint64_t bits, int lane_mask, Site site);
void fence();
void before_atomic(const void* location);
void access_vector(const void* p, int bytes, Site site);  // checks the alignment
void access_stream(const void* p, int bytes, Site site);  // and that it is not shared memory

}  // namespace emulator
}  // namespace fastloss
