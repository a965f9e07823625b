// The seam of primitives.cuh for the host: the names listed there, carried out by the emulator. CUDA's own headers give
// the 16-bit types.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

#include "emulator.h"

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx ::fastloss::emulator::thread_index
#define blockIdx ::fastloss::emulator::block_index
#define blockDim ::fastloss::emulator::block_size
#define gridDim ::fastloss::emulator::grid_size

#define FASTLOSS_HERE ::fastloss::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

// ---- plain CUDA names
template <class V>
inline V __shfl_xor_sync(unsigned mask, V v, int lane_mask, FASTLOSS_HERE) {
  static_assert(sizeof(V) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(V));
  bits = fastloss::emulator::shuffle_xor(mask, bits, lane_mask, site);
  std::memcpy(&v, &bits, sizeof(V));
  return v;
}
inline unsigned atomicAdd(unsigned* p, unsigned v) {
  fastloss::emulator::before_atomic(p);
  return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline int atomicCAS(int* p, int expected, int desired) {
  fastloss::emulator::before_atomic(p);
  __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

namespace fastloss {

// ---- device side
struct alignas(16) Vec16 {
  uint32_t word[4];
};
#ifdef FASTLOSS_EMULATE_SM75
constexpr bool kPairwiseMax = false;
#else
constexpr bool kPairwiseMax = true;
#endif

struct alignas(8) Vec8 {
  uint32_t word[2];
};
struct [[gnu::may_alias]] alignas(8) Memory8 {
  Vec8 v;
};
struct [[gnu::may_alias]] alignas(16) Memory16 {  // whatever lies there
  Vec16 v;
};

inline Vec16 load16(const void* p, FASTLOSS_HERE) {
  emulator::access_vector(p, 16, site);
  return static_cast<const Memory16*>(p)->v;
}
inline Vec16 load16_stream(const void* p, FASTLOSS_HERE) {
  emulator::access_stream(p, 16, site);
  return static_cast<const Memory16*>(p)->v;
}
inline void store16(void* p, Vec16 v, FASTLOSS_HERE) {
  emulator::access_vector(p, 16, site);
  static_cast<Memory16*>(p)->v = v;
}
inline void store16_stream(void* p, Vec16 v, FASTLOSS_HERE) {
  emulator::access_stream(p, 16, site);
  static_cast<Memory16*>(p)->v = v;
}

#ifdef FASTLOSS_EMULATE_SM100
constexpr int kWideParts = 2;
#else
constexpr int kWideParts = 1;
#endif
struct VecWide {
  Vec16 part[kWideParts];
};
inline VecWide load_wide_stream(const void* p, bool aligned, FASTLOSS_HERE) {
  if (aligned) emulator::access_vector(p, int(sizeof(VecWide)), site);
  VecWide v;
  for (int i = 0; i < kWideParts; ++i) v.part[i] = load16_stream(static_cast<const Vec16*>(p) + i, site);
  return v;
}
inline void store_wide_stream(void* p, const VecWide& v, bool aligned, FASTLOSS_HERE) {
  if (aligned) emulator::access_vector(p, int(sizeof(VecWide)), site);
  for (int i = 0; i < kWideParts; ++i) store16_stream(static_cast<Vec16*>(p) + i, v.part[i], site);
}

inline Vec8 load8_stream(const void* p, FASTLOSS_HERE) {
  emulator::access_stream(p, 8, site);
  return static_cast<const Memory8*>(p)->v;
}
inline void store8_stream(void* p, Vec8 v, FASTLOSS_HERE) {
  emulator::access_stream(p, 8, site);
  static_cast<Memory8*>(p)->v = v;
}

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline float reciprocal_fast(float x) { return 1 / x; }

inline unsigned char* shared_memory() { return emulator::shared; }
inline void block_barrier(FASTLOSS_HERE) { emulator::block_barrier(site); }
inline void warp_barrier(FASTLOSS_HERE) { emulator::warp_barrier(site); }
inline void memory_fence() { emulator::fence(); }
inline void system_fence() { emulator::fence(); }
inline void cluster_arrive(FASTLOSS_HERE) { emulator::cluster_arrive(site); }
inline void cluster_wait(FASTLOSS_HERE) { emulator::cluster_wait(site); }
template <class T>
const T* cluster_map(const T* p, int rank, FASTLOSS_HERE) {
  return reinterpret_cast<const T*>(emulator::cluster_map(p, rank, site));
}

// ---- host side
inline DeviceProperties query_device(int device) { return emulator::device(device); }

inline Status allocate_mapped(size_t bytes, void** host, void** device) {
  *host = *device = ::operator new(bytes);
  std::memset(*host, 0, bytes);
  return {};
}

inline Status fill_zero(void* p, int64_t bytes, void*) {
  std::memset(p, 0, static_cast<size_t>(bytes));
  return {};
}

template <class Params>
int largest_cluster(void (*)(Params), const LaunchShape&, int wanted) {
  return wanted;
}

template <class Params>
Status launch(void (*kernel)(Params), const LaunchShape& shape, void*, const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  } call{kernel, &params};
  return emulator::run(
      shape, [](const void* p) { static_cast<const Call*>(p)->kernel(*static_cast<const Call*>(p)->params); }, &call);
}

}  // namespace fastloss

#undef FASTLOSS_HERE
