// The vocabulary that every layer shares: dtypes, layouts, status. No torch, no CUDA headers.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FASTLOSS_HD __host__ __device__ inline
#else
// Internal linkage: compiled once per instruction set, so the linker must not merge them into one for every CPU.
#define FASTLOSS_HD static inline
#endif

namespace fastloss {

// Floating dtypes of logits, probability targets, losses and gradients.
enum class DType : int32_t { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// Integer dtypes that a class-index target may have.
enum class IndexType : int32_t { i64 = 0, i32 = 1, i16 = 2, i8 = 3, u8 = 4, u16 = 5, u32 = 6, u64 = 7 };

enum class Reduction : int32_t { none = 0, mean = 1, sum = 2 };  // torch's own numbering

FASTLOSS_HD int64_t size_of(DType t) { return t == DType::f32 ? 4 : t == DType::f64 ? 8 : 2; }

// Sums, exponentials and logarithms are taken in float for 16- and 32-bit data, in double for double.
FASTLOSS_HD DType accum_of(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

// One class index, whatever its dtype. uint64 values past 2^63 come out negative, hence out of range; one of them
// would be a negative ignore_index, so the Python face sends none.
FASTLOSS_HD int64_t load_index(const void* p, IndexType t, int64_t i) {
  switch (t) {
    case IndexType::i64: return static_cast<const int64_t*>(p)[i];
    case IndexType::i32: return static_cast<const int32_t*>(p)[i];
    case IndexType::i16: return static_cast<const int16_t*>(p)[i];
    case IndexType::i8: return static_cast<const int8_t*>(p)[i];
    case IndexType::u8: return static_cast<const uint8_t*>(p)[i];
    case IndexType::u16: return static_cast<const uint16_t*>(p)[i];
    case IndexType::u32: return static_cast<const uint32_t*>(p)[i];
    case IndexType::u64: return static_cast<int64_t>(static_cast<const uint64_t*>(p)[i]);
  }
  return -1;
}

// Strides, in elements, of a tensor seen as [outer, classes, inner].
struct Strides {
  int64_t outer = 0, cls = 0, inner = 0;
};

// What a core function has to say. `bad_target` carries the first offending row and its value.
struct Status {
  enum Code : int32_t { ok = 0, bad_target = 1, cuda_error = 2, unsupported = 3 };
  Code code = ok;
  int64_t row = 0;    // bad_target: row in [0, outer * inner)
  int64_t value = 0;  // bad_target: the class index found there; cuda_error: the cudaError_t
};

// How the core runs work on several threads: call body(ctx, begin, end) over disjoint ranges that cover
// [0, count), each of at least `grain` items where possible, and return when all are done. The binding
// passes PyTorch's pool; tests pass std::thread or a plain loop. Results never depend on the split.
using RangeBody = void (*)(void* ctx, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeBody body, void* ctx);

}  // namespace fastloss
