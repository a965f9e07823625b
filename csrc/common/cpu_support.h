// What the CPU kernels need besides vectors: scratch memory, a parallel loop over a lambda, fixed-order sums.
// Included by the per-instruction-set translation units only (see simd.h for why nothing here is a library type).
#pragma once
#include "scratch.h"
#include "simd.h"

namespace fastloss {
namespace FASTLOSS_ISA {

// Results from here on are stored past the caches (stream): too large to be read back from them.
constexpr int64_t kStreamBytes = int64_t(8) << 20;

// Loops that stream through memory ask for the 16 KiB after the present ones, a line of each of its four pages by
// turns: the hardware stops at the end of a page, and one stream alone waits there for the next page's translation;
// four give half as much bandwidth again where pages have 4 KiB.
// To be called with the address of every line that is read, in order.
constexpr int64_t kLineBytes = 64;
inline void read_ahead(const void* p) {
  constexpr uintptr_t kLine = kLineBytes, kPage = 4096, kStreams = 4, kBlock = kStreams * kPage;
  const uintptr_t at = uintptr_t(p), turn = at % kBlock / kLine;
  const uintptr_t ahead = at - at % kBlock + kBlock + turn % kStreams * kPage + turn / kStreams * kLine;
  __builtin_prefetch(reinterpret_cast<const void*>(ahead));
}

// Uninitialised, vector-aligned scratch memory, padded by one vector so that kernels may read a whole one at the end.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(take_scratch((size_t(count) * sizeof(T) + 2 * 64 - 1) / 64 * 64))) {}
  ~Scratch() { return_scratch(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_;
};

// body(begin, end) over [0, count) by the caller's thread pool.
template <class F>
inline void parallel(ParallelFor parallel_for, int64_t count, int64_t grain, const F& body) {
  parallel_for(
      count, grain, [](void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Items per thread below which a second thread costs more than it brings, for items of `elements` elements.
inline int64_t grain_for(int64_t elements) {
  constexpr int64_t kElementsPerThread = 16384;
  return elements > 0 ? 1 + kElementsPerThread / elements : kElementsPerThread;
}

// Sum in a fixed order whatever the number of threads: pairwise over partial results indexed by the partition.
inline double pairwise_sum(const double* x, int64_t n, int64_t stride) {
  if (n <= 8) {
    double s = 0;
    for (int64_t i = 0; i < n; ++i) s += x[i * stride];
    return s;
  }
  return pairwise_sum(x, n / 2, stride) + pairwise_sum(x + n / 2 * stride, n - n / 2, stride);
}

template <class P>
struct strip_pointer;
template <class S>
struct strip_pointer<S*> {
  using type = S;
};
template <bool kValue>
struct constant {
  static constexpr bool value = kValue;
};

inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t clamp_to(int64_t x, int64_t lo, int64_t hi) { return x < lo ? lo : x > hi ? hi : x; }

template <class T>
constexpr T kInf = T(__builtin_inf());
template <class T>
constexpr T kNan = T(__builtin_nan(""));

inline double load_scalar(const void* p, DType type, int64_t i) {
  switch (type) {
    case DType::f64: return static_cast<const double*>(p)[i];
    case DType::f16: return to_accum(static_cast<const float16*>(p)[i]);
    case DType::bf16: return to_accum(static_cast<const bfloat16*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}
inline void store_scalar(void* p, DType type, int64_t i, double x) {
  switch (type) {
    case DType::f64: static_cast<double*>(p)[i] = x; break;
    case DType::f16: static_cast<float16*>(p)[i] = from_accum<float16, double>(x); break;
    case DType::bf16: static_cast<bfloat16*>(p)[i] = from_accum<bfloat16, double>(x); break;
    default: static_cast<float*>(p)[i] = float(x);
  }
}

// Calls f with a null pointer of the storage type: f(static_cast<S*>(nullptr)).
template <class F>
inline auto with_storage(DType type, const F& f) {
  switch (type) {
    case DType::f64: return f(static_cast<double*>(nullptr));
    case DType::f16: return f(static_cast<float16*>(nullptr));
    case DType::bf16: return f(static_cast<bfloat16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

// The same for class indices: f(static_cast<const I*>(nullptr)).
template <class F>
inline auto with_index(IndexType type, const F& f) {
  switch (type) {
    case IndexType::i32: return f(static_cast<const int32_t*>(nullptr));
    case IndexType::i16: return f(static_cast<const int16_t*>(nullptr));
    case IndexType::i8: return f(static_cast<const int8_t*>(nullptr));
    case IndexType::u8: return f(static_cast<const uint8_t*>(nullptr));
    case IndexType::u16: return f(static_cast<const uint16_t*>(nullptr));
    case IndexType::u32: return f(static_cast<const uint32_t*>(nullptr));
    case IndexType::u64: return f(static_cast<const uint64_t*>(nullptr));
    default: return f(static_cast<const int64_t*>(nullptr));
  }
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
