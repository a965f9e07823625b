// The seam to the GPU: the only file that touches hardware. A host build (FASTLOSS_EMULATE_CUDA) puts another header
// in its place that defines the same names and runs every CUDA thread as a fiber.
//
// The seam, device side:
//   Vec16, Vec8                          16 and 8 bytes as words
//   kPairwiseMax                         is there an instruction for two 16-bit maxima (sm_80 and later)?
//   load16, store16                      one 128-bit access
//   load16_stream, store16_stream        the same to global memory, evict first: the data are used once
//   load8_stream, store8_stream          the same of 64 bits
//   VecWide                              kWideParts Vec16 next to each other: two from sm_100 on, else one
//   load_wide_stream, store_wide_stream  one of them, streamed: in one 256-bit access where the address allows it
//   exp2_fast(float)                     2^x, 2 ulp, results below 2^-126 flushed to 0
//   reciprocal_fast(float)               1/x, 1 ulp
//   shared_memory()                      the block's dynamic shared memory, 16-byte aligned; there is no static one
//   block_barrier(), warp_barrier()      order memory among the threads of a block, a warp
//   memory_fence(), system_fence()       order this thread's writes for the device, for the host
//   cluster_arrive(), cluster_wait(), cluster_map(p, rank)   thread-block clusters, distributed shared memory
// and plain CUDA names: __global__, __device__, __launch_bounds__, threadIdx.x, blockIdx.x, blockDim.x, gridDim.x,
// __shfl_xor_sync, atomicAdd(unsigned*), atomicCAS(int*).
//
// The seam, host side:
//   query_device(device)                              -> DeviceProperties
//   allocate_mapped(bytes, &host, &device)            -> Status
//   fill_zero(p, bytes, stream)                       -> Status
//   largest_cluster(kernel, LaunchShape, wanted)      -> clusters of at most that many blocks that the device can run
//   launch(kernel, LaunchShape, stream, params)       -> Status
//
// Warp, block and cluster reductions below the seam are common code.
#pragma once
#include "types.h"

#ifdef FASTLOSS_EMULATE_CUDA
#include "primitives_emulated.h"
#else
#include <cuda_runtime.h>

#include "device_properties.h"

namespace fastloss {

struct alignas(16) Vec16 {
  uint32_t word[4];
};
struct alignas(8) Vec8 {
  uint32_t word[2];
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kPairwiseMax = false;
#else
constexpr bool kPairwiseMax = true;
#endif

__device__ __forceinline__ Vec16 load16(const void* p) {
  uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ Vec16 load16_stream(const void* p) {
  uint4 v = __ldcs(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void store16(void* p, Vec16 v) {
  *static_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
__device__ __forceinline__ void store16_stream(void* p, Vec16 v) {
  __stcs(static_cast<uint4*>(p), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}

__device__ __forceinline__ Vec8 load8_stream(const void* p) {
  uint2 v = __ldcs(static_cast<const uint2*>(p));
  return {{v.x, v.y}};
}
__device__ __forceinline__ void store8_stream(void* p, Vec8 v) {
  __stcs(static_cast<uint2*>(p), make_uint2(v.word[0], v.word[1]));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kWideParts = 2;
#else
constexpr int kWideParts = 1;
#endif
struct VecWide {
  Vec16 part[kWideParts];
};
// `aligned`: the address is a multiple of 32 bytes.
__device__ __forceinline__ VecWide load_wide_stream(const void* p, bool aligned) {
  VecWide v;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if (aligned) {
    uint32_t (&a)[4] = v.part[0].word, (&b)[4] = v.part[1].word;
    asm volatile("ld.global.cs.v8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]), "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
    return v;
  }
#endif
  for (int i = 0; i < kWideParts; ++i) v.part[i] = load16_stream(static_cast<const Vec16*>(p) + i);
  return v;
}
__device__ __forceinline__ void store_wide_stream(void* p, const VecWide& v, bool aligned) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if (aligned) {
    const uint32_t (&a)[4] = v.part[0].word, (&b)[4] = v.part[1].word;
    asm volatile("st.global.cs.v8.b32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8};" ::"l"(__cvta_generic_to_global(p)),
                 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3])
                 : "memory");
    return;
  }
#endif
  for (int i = 0; i < kWideParts; ++i) store16_stream(static_cast<Vec16*>(p) + i, v.part[i]);
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char fastloss_shared[];
  return fastloss_shared;
}

__device__ __forceinline__ void block_barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }
__device__ __forceinline__ void memory_fence() { __threadfence(); }
__device__ __forceinline__ void system_fence() { __threadfence_system(); }

// Clusters exist from sm_90 on; the launch policy never asks for one before, so the bodies are empty there. A cluster
// is `parts` blocks with adjacent blockIdx.x, so a block's rank is blockIdx.x % parts. Memory accesses before arrive
// happen before those after wait, across the cluster. All threads of a block call both.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#endif
}
// The same shared-memory object in another block of the cluster.
template <class T>
__device__ __forceinline__ const T* cluster_map(const T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<const T*>(__cluster_map_shared_rank(p, static_cast<unsigned>(rank)));
#else
  (void)rank;
  return p;
#endif
}

struct LaunchShape {
  int64_t grid = 1;  // blocks
  int block = 32;    // threads
  int shared = 0;    // bytes of dynamic shared memory
  int cluster = 1;   // blocks in a cluster; divides grid
};

inline Status cuda_status(cudaError_t e) {
  return e == cudaSuccess ? Status{} : Status{Status::cuda_error, 0, static_cast<int64_t>(e)};
}

// What the device says of itself; sm stays 0 when it cannot be asked. max_cluster is what the architecture allows
// (16 needs the non-portable attribute, which launch() sets); how many fit is for largest_cluster() to say.
inline DeviceProperties query_device(int device) {
  DeviceProperties d;
  auto get = [device](cudaDeviceAttr what) {
    int v = 0;
    if (cudaDeviceGetAttribute(&v, what, device) != cudaSuccess) v = 0, cudaGetLastError();
    return v;
  };
  d.sm = 10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor);
  d.multiprocessors = get(cudaDevAttrMultiProcessorCount);
  d.shared_per_block = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  d.max_cluster = get(cudaDevAttrClusterLaunch) ? 16 : 1;
  return d;
}

// Host memory that the device sees at *device, zeroed; legal while a stream is being captured.
inline Status allocate_mapped(size_t bytes, void** host, void** device) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaError_t e = cudaHostAlloc(host, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
  if (e == cudaSuccess) {
    for (size_t i = 0; i < bytes; ++i) static_cast<volatile unsigned char*>(*host)[i] = 0;
    e = cudaHostGetDevicePointer(device, *host, 0);
    if (e != cudaSuccess) cudaFreeHost(*host);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (e != cudaSuccess) cudaGetLastError();
  return cuda_status(e);
}

inline Status fill_zero(void* p, int64_t bytes, void* stream) {
  const cudaError_t e = cudaMemsetAsync(p, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  if (e != cudaSuccess) cudaGetLastError();
  return cuda_status(e);
}

// `wanted`, or the next smaller power of two of which the device can hold at least one cluster.
template <class Params>
int largest_cluster(void (*kernel)(Params), const LaunchShape& shape, int wanted) {
  const void* entry = reinterpret_cast<const void*>(kernel);
  cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (; wanted > 1; wanted /= 2) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(wanted));
    config.blockDim = dim3(static_cast<unsigned>(shape.block));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(wanted), 1, 1};
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, entry, &config) == cudaSuccess && clusters > 0) break;
    cudaGetLastError();
  }
  return wanted;
}

template <class Params>
Status launch(void (*kernel)(Params), const LaunchShape& shape, void* stream, const Params& params) {
  if (shape.grid <= 0) return {};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid));
  config.blockDim = dim3(static_cast<unsigned>(shape.block));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  if (shape.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  cudaError_t e = cudaSuccess;
  const void* entry = reinterpret_cast<const void*>(kernel);
  if (shape.cluster > 8) e = cudaFuncSetAttribute(entry, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (e == cudaSuccess && shape.shared > 48 * 1024)
    e = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared);
  if (e == cudaSuccess) e = cudaLaunchKernelEx(&config, kernel, params);
  if (e != cudaSuccess) cudaGetLastError();  // a launch error is reported here and nowhere else
  return cuda_status(e);
}

}  // namespace fastloss
#endif  // FASTLOSS_EMULATE_CUDA

// ---------------------------------------------------------------- reductions, common to the GPU and the emulator
namespace fastloss {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// The larger one; a nan loses to a number.
__device__ __forceinline__ float max_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double max_of(double a, double b) { return fmax(a, b); }

// Over aligned groups of `width` lanes (a power of two); every lane of the group gets the result. All 32 lanes of the
// warp take part. Additions commute, so the lanes agree to the bit.
template <class V>
__device__ __forceinline__ V group_sum(V v, int width) {
  for (int o = width >> 1; o > 0; o >>= 1) v += __shfl_xor_sync(kFullMask, v, o);
  return v;
}

template <class V>
__device__ __forceinline__ V group_max(V v, int width) {
  for (int o = width >> 1; o > 0; o >>= 1) v = max_of(v, __shfl_xor_sync(kFullMask, v, o));
  return v;
}

// Sum over the block in a fixed order; the result is valid in thread 0. scratch: one V per warp. The caller puts a
// barrier between two uses of the same scratch.
template <class V>
__device__ __forceinline__ V block_sum(V v, V* scratch) {
  v = group_sum(v, kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) scratch[warp] = v;
  block_barrier();
  if (warp == 0) v = group_sum(lane < warps ? scratch[lane] : V(0), kWarp);
  return v;
}

}  // namespace fastloss
