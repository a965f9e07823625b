// Vectors of float or double for the CPU kernels. The kernels are written once and compiled once per instruction
// set: a translation unit *_avx512.cpp, *_avx2.cpp or *_portable.cpp names its namespace in FASTLOSS_ISA, is built
// with its own flags and includes the kernels. Everything here lives in that namespace, and nothing here calls a
// library template, so that no function compiled for AVX-512 can be linked in place of a portable one.
//
// GCC and Clang vector extensions carry the arithmetic (they serve x86, Arm and anything else); intrinsics appear
// only where the compiler cannot see the instruction from the extension.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "types.h"

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef FASTLOSS_ISA
#error "define FASTLOSS_ISA (avx512, avx2 or portable) before including simd.h"
#endif

namespace fastloss {
namespace FASTLOSS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// ---- storage types of 16-bit floats
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <class S>
struct accum_of_storage {
  using type = float;
};
template <>
struct accum_of_storage<double> {
  using type = double;
};
template <class S>
using accum_t = typename accum_of_storage<S>::type;

// ---- vectors
template <class T, int kBytes = kVectorBytes>
struct vector_type {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using vec = typename vector_type<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
struct bits_of;  // the integer of the same size
template <>
struct bits_of<float> {
  using type = int32_t;
};
template <>
struct bits_of<double> {
  using type = int64_t;
};
template <class T>
using ivec = vec<typename bits_of<T>::type>;

template <class T>
inline vec<T> splat(T x) {
  return x - vec<T>{};  // x - 0 keeps the sign of -0
}
template <class T>
inline vec<T> iota() {
  vec<T> r{};
  for (int i = 0; i < kLanes<T>; ++i) r[i] = T(i);
  return r;
}
template <class To, class From>
inline To bit_cast(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To r;
  __builtin_memcpy(&r, &x, sizeof r);
  return r;
}

// The larger of two; a where x is nan. Exactly what MAXPS(x, a) does, which GCC 12 does not see for 512 bits.
template <class V>
inline V max_of(V x, V a) {
  return x > a ? x : a;
}

#if defined(__AVX512F__)
inline vec<float> max_of(vec<float> x, vec<float> a) {
  return _mm512_maskz_max_ps(__mmask16(-1), x, a);  // maskz: GCC 12 warns about the plain form
}
inline vec<double> max_of(vec<double> x, vec<double> a) { return _mm512_maskz_max_pd(__mmask8(-1), x, a); }
#elif defined(__AVX2__)
inline vec<float> max_of(vec<float> x, vec<float> a) { return _mm256_max_ps(x, a); }
inline vec<double> max_of(vec<double> x, vec<double> a) { return _mm256_max_pd(x, a); }
#endif

// v, rounded here: the compiler does not fuse the product that it may be with the sum that it goes to. It would in one
// variant of a kernel and not in another, and they would give other bits.
template <class V>
inline V rounded(V v) {
#if defined(__FMA__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// As many floats as a vector has doubles, as doubles. With AVX-512 GCC 12 makes four instructions of what is one.
using vec_double = vec<double>;
using half_floats = vector_type<float, kVectorBytes / 2>::type;
inline vec_double doubles_of(half_floats v) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(__mmask8(-1), v);
#else
  return __builtin_convertvector(v, vec_double);
#endif
}
inline vec_double doubles_of(vec_double v) { return v; }

// Lane sums in double: the lanes of a vector of floats are added in two halves.
inline vec_double widen(vec<double> v) { return v; }
inline vec_double widen(vec<float> v) {
  half_floats half[2];
  __builtin_memcpy(half, &v, sizeof v);
  return doubles_of(half[0]) + doubles_of(half[1]);
}

// Lanes are combined in halves, always in the same order: lane i with lane i + n/2.
template <class T, int kBytes, class Op>
inline T fold_lanes(typename vector_type<T, kBytes>::type v, const Op& op) {
  if constexpr (kBytes > 16) {
    using half = typename vector_type<T, kBytes / 2>::type;
    half parts[2];
    __builtin_memcpy(parts, &v, sizeof v);
    return fold_lanes<T, kBytes / 2>(op(parts[0], parts[1]), op);
  } else if constexpr (sizeof(T) == 4) {
    const auto pairs = op(v, __builtin_shufflevector(v, v, 2, 3, 2, 3));
    return op(pairs, __builtin_shufflevector(pairs, pairs, 1, 1, 1, 1))[0];
  } else {
    return op(v, __builtin_shufflevector(v, v, 1, 1))[0];
  }
}
template <class T>
inline T sum_lanes(vec<T> v) {
  return fold_lanes<T, kVectorBytes>(v, [](auto a, auto b) { return a + b; });
}
template <class T>
inline T max_lanes(vec<T> v) {  // v holds no nan
  return fold_lanes<T, kVectorBytes>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// ---- scalar conversions
inline float to_accum(float x) { return x; }
inline double to_accum(double x) { return x; }
inline float to_accum(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_accum(float16 h) {
  // Shift the exponent into place and correct its bias by a multiplication, which also normalises subnormals.
  uint32_t magnitude = uint32_t(h.bits & 0x7fffu) << 13, sign = uint32_t(h.bits & 0x8000u) << 16;
  float f = bit_cast<float>(magnitude) * 0x1p112f;
  uint32_t bits = bit_cast<uint32_t>(f);
  if ((h.bits & 0x7c00u) == 0x7c00u) bits = magnitude | 0x7f800000u;  // inf, nan
  return bit_cast<float>(bits | sign);
}

template <class S, class T>
inline S from_accum(T x);
template <>
inline float from_accum<float, float>(float x) {
  return x;
}
template <>
inline float from_accum<float, double>(double x) {
  return float(x);
}
template <>
inline double from_accum<double, double>(double x) {
  return x;
}
template <>
inline double from_accum<double, float>(float x) {
  return x;
}
template <>
inline bfloat16 from_accum<bfloat16, float>(float x) {
  uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t((u >> 16) | 0x40u)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};  // nearest, ties to even
}
template <>
inline float16 from_accum<float16, float>(float x) {
  uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};   // nan
  if (a >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to inf
  if (a < 0x38800000u) {                                    // subnormal half: let the adder round
    float f = bit_cast<float>(a) + 0.5f;
    return {uint16_t(sign | (bit_cast<uint32_t>(f) - 0x3f000000u))};
  }
  a += 0xc8000fffu + ((a >> 13) & 1u);  // rebias the exponent by -112, nearest even
  return {uint16_t(sign | (a >> 13))};
}
// double -> 16 bit goes through float by way of round-to-odd, so that the value is rounded once.
inline float round_to_odd(double x) {
  float f = float(x);
  if (double(f) == x || f != f || f - f != 0.f) return f;
  uint32_t u = bit_cast<uint32_t>(f);
  if ((u & 1u) == 0) u += ((double(f) < x) == (x > 0)) ? 1u : uint32_t(-1);
  return bit_cast<float>(u);
}
template <>
inline bfloat16 from_accum<bfloat16, double>(double x) {
  return from_accum<bfloat16, float>(round_to_odd(x));
}
template <>
inline float16 from_accum<float16, double>(double x) {
  return from_accum<float16, float>(round_to_odd(x));
}

// ---- vector loads and stores, with conversion to the accumulation type
inline vec<float> load(const float* p) {
  vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline vec<double> load(const double* p) {
  vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
using half_bits = vector_type<uint16_t, kVectorBytes / 2>::type;
using word_bits = vec<uint32_t>;
// The 16-bit integers at p as 32-bit ones. GCC 12 makes four instructions of what is one.
inline word_bits load_words(const void* p) {
#if defined(__AVX512F__)
  return bit_cast<word_bits>(
      _mm512_maskz_cvtepu16_epi32(__mmask16(-1), _mm256_loadu_si256(static_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bit_cast<word_bits>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  half_bits h;
  __builtin_memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, word_bits);
#endif
}
inline vec<float> load(const bfloat16* p) { return bit_cast<vec<float>>(load_words(p) << 16); }
inline vec<float> load(const float16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_accum(p[i]);
  return v;
#endif
}
inline void store(float* p, vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store(double* p, vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
// Rounded to the nearest, ties to even, in the low halves.
template <class V>
inline auto bfloat16_bits(V v) {
  using U = typename vector_type<uint32_t, int(sizeof(V))>::type;
  const U u = bit_cast<U>(v), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return v != v ? (u >> 16) | 0x40u : rounded;
}
inline void store(bfloat16* p, vec<float> v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_maskz_cvtepi32_epi16(__mmask16(-1), bit_cast<__m512i>(bfloat16_bits(v)));
#else
  const half_bits h = __builtin_convertvector(bfloat16_bits(v), half_bits);
#endif
  __builtin_memcpy(p, &h, sizeof h);
}
inline void store(float16* p, vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(__mmask16(-1), v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_accum<float16, float>(v[i]);
#endif
}

// A vector of floats as fours: load_fours(p, stride) takes four neighbours at each of p, p + stride, ...; store_fours
// is the way back. transpose_fours transposes each 4 x 4 of m[j][4 q + i] (j, i < 4): rows 4 q + j with classes i
// become classes j with rows 4 q + i.
template <class T>
using narrow = typename vector_type<T, 16>::type;
inline narrow<float> load4(const float* p) {
  narrow<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline narrow<float> load4(const bfloat16* p) {
  typename vector_type<uint16_t, 8>::type h;
  __builtin_memcpy(&h, p, sizeof h);
  return bit_cast<narrow<float>>(__builtin_convertvector(h, narrow<uint32_t>) << 16);
}
inline narrow<float> load4(const float16* p) {
#if defined(__F16C__)
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return narrow<float>{to_accum(p[0]), to_accum(p[1]), to_accum(p[2]), to_accum(p[3])};
#endif
}
inline void store4(float* p, narrow<float> v) { __builtin_memcpy(p, &v, sizeof v); }
inline void store4(bfloat16* p, narrow<float> v) {
  const auto h = __builtin_convertvector(bfloat16_bits(v), typename vector_type<uint16_t, 8>::type);
  __builtin_memcpy(p, &h, sizeof h);
}
inline void store4(float16* p, narrow<float> v) {
#if defined(__F16C__)
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 4; ++i) p[i] = from_accum<float16, float>(v[i]);
#endif
}
template <class S>
inline vec<float> load_fours(const S* p, int64_t stride) {
#if defined(__AVX512F__)
  const auto low = __builtin_shufflevector(load4(p), load4(p + stride), 0, 1, 2, 3, 4, 5, 6, 7);
  const auto high = __builtin_shufflevector(load4(p + 2 * stride), load4(p + 3 * stride), 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  return __builtin_shufflevector(load4(p), load4(p + stride), 0, 1, 2, 3, 4, 5, 6, 7);
#else
  (void)stride;
  return load4(p);
#endif
}
template <class S>
inline void store_fours(S* p, int64_t stride, vec<float> v) {
  narrow<float> parts[kLanes<float> / 4];
  __builtin_memcpy(parts, &v, sizeof v);
  for (int i = 0; i < kLanes<float> / 4; ++i) store4(p + i * stride, parts[i]);
}
// Of every four lanes of a and b: a0 b0 a1 b1, a2 b2 a3 b3, a0 a1 b0 b1, a2 a3 b2 b3.
#if defined(__AVX512F__)
inline vec<float> low_pairs(vec<float> a, vec<float> b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
inline vec<float> high_pairs(vec<float> a, vec<float> b) {
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
inline vec<float> low_halves(vec<float> a, vec<float> b) {
  return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}
inline vec<float> high_halves(vec<float> a, vec<float> b) {
  return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
#elif defined(__AVX2__)
inline vec<float> low_pairs(vec<float> a, vec<float> b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
}
inline vec<float> high_pairs(vec<float> a, vec<float> b) {
  return __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
}
inline vec<float> low_halves(vec<float> a, vec<float> b) {
  return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
}
inline vec<float> high_halves(vec<float> a, vec<float> b) {
  return __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}
#else
inline vec<float> low_pairs(vec<float> a, vec<float> b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline vec<float> high_pairs(vec<float> a, vec<float> b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
inline vec<float> low_halves(vec<float> a, vec<float> b) { return __builtin_shufflevector(a, b, 0, 1, 4, 5); }
inline vec<float> high_halves(vec<float> a, vec<float> b) { return __builtin_shufflevector(a, b, 2, 3, 6, 7); }
#endif
inline void transpose_fours(vec<float> (&m)[4]) {
  const vec<float> a = low_pairs(m[0], m[1]), b = low_pairs(m[2], m[3]);
  const vec<float> c = high_pairs(m[0], m[1]), d = high_pairs(m[2], m[3]);
  m[0] = low_halves(a, b);
  m[1] = high_halves(a, b);
  m[2] = low_halves(c, d);
  m[3] = high_halves(c, d);
}

// A store past the caches, for results too large to be read back from them: it saves reading the line first. Falls back
// to an ordinary one where the address is not aligned. stream_fence() orders such stores before what follows.
template <class S>
inline void stream(S* p, vec<accum_t<S>> v) {
#if defined(__AVX2__)
  alignas(64) unsigned char bytes[kLanes<accum_t<S>> * sizeof(S)];
  if (uintptr_t(p) % sizeof bytes == 0) {
    store(reinterpret_cast<S*>(bytes), v);
    if constexpr (sizeof bytes == 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(bytes));
    } else if constexpr (sizeof bytes == 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(bytes));
    } else {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), *reinterpret_cast<const __m512i*>(bytes));
#endif
    }
    return;
  }
#endif
  store(p, v);
}
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first n < kLanes elements, the rest filled; and the store that matches. Nothing past them is touched.
template <class S>
inline vec<accum_t<S>> load_tail(const S* p, int64_t n, accum_t<S> fill) {
  using T = accum_t<S>;
  T a[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) a[i] = i < n ? to_accum(p[i]) : fill;
  return load(a);
}
template <class S>
inline void store_tail(S* p, int64_t n, vec<accum_t<S>> v) {
  S a[kLanes<accum_t<S>>];
  store(a, v);
  __builtin_memcpy(p, a, size_t(n) * sizeof(S));
}
#if defined(__AVX512F__)
inline vec<float> load_tail(const float* p, int64_t n, float fill) {
  return _mm512_mask_loadu_ps(splat(fill), __mmask16((1u << n) - 1), p);
}
inline vec<double> load_tail(const double* p, int64_t n, double fill) {
  return _mm512_mask_loadu_pd(splat(fill), __mmask8((1u << n) - 1), p);
}
inline vec<float> load_tail(const bfloat16* p, int64_t n, float fill) {
  const __mmask16 mask = __mmask16((1u << n) - 1);
  const __m512i bits =
      _mm512_maskz_slli_epi32(mask, _mm512_maskz_cvtepu16_epi32(mask, _mm256_maskz_loadu_epi16(mask, p)), 16);
  return _mm512_mask_mov_ps(splat(fill), mask, _mm512_castsi512_ps(bits));
}
inline vec<float> load_tail(const float16* p, int64_t n, float fill) {
  const __mmask16 mask = __mmask16((1u << n) - 1);
  return _mm512_mask_cvtph_ps(splat(fill), mask, _mm256_maskz_loadu_epi16(mask, p));
}
inline void store_tail(float* p, int64_t n, vec<float> v) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
inline void store_tail(double* p, int64_t n, vec<double> v) { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v); }
inline void store_tail(bfloat16* p, int64_t n, vec<float> v) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1),
                           bit_cast<__m256i>(__builtin_convertvector(bfloat16_bits(v), half_bits)));
}
inline void store_tail(float16* p, int64_t n, vec<float> v) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1),
                           _mm512_maskz_cvtps_ph(__mmask16(-1), v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline vec<float> load_tail(const float* p, int64_t n, float fill) {
  const __m256i mask = first_lanes(n);
  return _mm256_blendv_ps(splat(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
inline void store_tail(float* p, int64_t n, vec<float> v) { _mm256_maskstore_ps(p, first_lanes(n), v); }
#endif

// ---- elementary functions, for vectors V of any width
template <class R>
struct strip_reference;
template <class T>
struct strip_reference<T&> {
  using type = T;
};
template <size_t kSize>
struct uint_of_size {
  using type = uint32_t;
};
template <>
struct uint_of_size<8> {
  using type = uint64_t;
};
template <class V>
using lane_t = typename strip_reference<decltype(static_cast<V*>(nullptr)[0][0])>::type;
template <class V>
struct uint_vector {  // for bit patterns: its arithmetic wraps
  using type = typename vector_type<typename uint_of_size<sizeof(lane_t<V>)>::type, int(sizeof(V))>::type;
};
template <class V>
struct int_vector {
  using type = typename vector_type<typename bits_of<lane_t<V>>::type, int(sizeof(V))>::type;
};

// exp for x <= 80 (and nan): e^x = 2^n 2^f with x log2(e) = n + f, |f| <= 1/2; minimax polynomial for 2^f, 2^n by
// exponent bits. Relative error about (1 + |x| / 9) ulp with fused multiply-add; results under the smallest normal
// number are 0, and exp(-inf) is 0.
template <class T>
struct exp_constants;
template <>
struct exp_constants<float> {
  // magic is 1.5 2^23 + bias: adding it rounds to an integer and leaves n + bias in the low bits.
  static constexpr float lowest = -88.0f, log2e = 1.44269504088896341f, magic = 12582912.0f + 127.0f;
  static constexpr int mantissa = 23;
  static constexpr float c[] = {0.000154537612306f,
                                0.00133915544008f,
                                0.00961808142887f,
                                0.0555035581091f,
                                0.240226507629f,
                                0.693147188299f,
                                1.0f};
};
template <>
struct exp_constants<double> {
  static constexpr double lowest = -709.1, log2e = 1.4426950408889634074, magic = 6755399441055744.0 + 1023.0;
  static constexpr int mantissa = 52;
  static constexpr double c[] = {4.455074120217283834e-10, 7.072798926201545768e-9,  1.0178061874829993702e-7,
                                 1.3215441516650742984e-6, 1.5252733830778568438e-5, 1.5403530443504154997e-4,
                                 1.3333558146416370956e-3, 9.6181291076058297627e-3, 5.5504108664821595226e-2,
                                 0.24022650695910099884,   0.69314718055994530942,   1.0};
};
template <class V>
inline V exp_of(V x) {
  using T = lane_t<V>;
  using K = exp_constants<T>;
  using U = typename uint_vector<V>::type;
  x = max_of(K::lowest - V{}, x);  // operand order keeps a nan
  const V shifted = x * K::log2e + K::magic;
  const V f = x * K::log2e - (shifted - K::magic);  // one rounding: contracted to a fused multiply-add
  V p = K::c[0] - V{};
  for (size_t i = 1; i < sizeof(K::c) / sizeof(T); ++i) p = p * f + K::c[i];
  return p * bit_cast<V>(bit_cast<U>(shifted) << K::mantissa);  // n + bias = 0 gives the float 0
}

#if defined(__AVX2__)
// The same for a whole vector of floats, where a look into a table is one instruction: e^x = 2^n 2^(j/8) e^f with
// x = (n + j / 8) log(2) + f, |f| <= log(2) / 16, takes half the polynomial. Multiplications are what a processor with
// 256 bits runs out of; the permutation goes where they cannot. Relative error about (1 + |x| / 40) ulp: float's log(2)
// is closer to it than its log2(e). Under the smallest normal number the error is less than that number.
inline vec<float> exp_of(vec<float> x) {
  using K = exp_constants<float>;
  using U = vec<uint32_t>;
  constexpr float magic = 1572864.0f;  // 1.5 2^20: adding it rounds to eighths and leaves 8 n + j in the low bits
  // The bits of 2^(j/8) less j << 20, which the addition of (8 n + j) << 20 brings back along with n in the exponent;
  // twice, since wider vectors look up by four bits.
  alignas(64) static constexpr uint32_t kTable[] = {
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  x = max_of(K::lowest - vec<float>{}, x);
  const vec<float> shifted = x * K::log2e + magic;
  const vec<float> f = x - (shifted - magic) * 0.693147181f;  // one rounding: a fused multiply-add
  const vec<float> p = ((0.166668579f * f + 0.500064552f) * f + 1.0f) * f + 1.0f;
  U table;
  __builtin_memcpy(&table, kTable, sizeof table);
#if defined(__AVX512F__)
  table =
      bit_cast<U>(_mm512_maskz_permutexvar_epi32(__mmask16(-1), bit_cast<__m512i>(shifted), bit_cast<__m512i>(table)));
#else
  table = bit_cast<U>(_mm256_permutevar8x32_epi32(bit_cast<__m256i>(table), bit_cast<__m256i>(shifted)));
#endif
  return rounded(p * bit_cast<vec<float>>(table + (bit_cast<U>(shifted) << 20)));
}
#endif

// log w for w >= 1, inf and nan, from u = w - 1 as well, which near w = 1 has the digits that w has lost.
template <class V>
inline V log1p_from(V u, V w) {
  using T = lane_t<V>;
  if constexpr (sizeof(T) == 8) {
    V log_w = w;
    for (size_t i = 0; i < sizeof(V) / 8; ++i) log_w[i] = __builtin_log(w[i]);
    const V d = w - T(1);  // u with the rounding error of w
    return d == u ? log_w : d == T(0) ? u : log_w * (u / d);
  } else {
    using I = typename int_vector<V>::type;
    const I bits = bit_cast<I>(bit_cast<typename uint_vector<V>::type>(w) - 0x3f3504f3u);  // relative to sqrt(1/2)
    const I exponent = bits >> 23;
    const V e = __builtin_convertvector(exponent, V);
    const V f = exponent == 0 ? u : bit_cast<V>((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    constexpr float c[] = {0.0697161147f,  -0.1147973385f, 0.1168541992f,  -0.1242568733f, 0.1424905765f,
                           -0.1666780232f, 0.2000071575f,  -0.2499999696f, 0.3333333118f};
    V p = c[0] - V{};
    for (int i = 1; i < 9; ++i) p = p * f + c[i];
    const V f2 = f * f;
    const V r = p * f2 * f + e * -2.12194440e-4f - 0.5f * f2 + f + e * 0.693359375f;
    return (w - w == 0.0f) ? r : w;  // inf and nan stay
  }
}
template <class V>
inline V log_of(V x) {  // x >= 1
  return log1p_from(x - lane_t<V>(1), x);
}
template <class V>
inline V log1p_of(V u) {  // u >= 0
  return log1p_from(u, lane_t<V>(1) + u);
}

// log(1 + u) for u in [0, 1] and nan: there a polynomial takes half of what log1p_of does.
template <class V>
inline V log1p_of_unit(V u) {
  if constexpr (sizeof(lane_t<V>) == 8) {
    return log1p_of(u);
  } else {
    constexpr float c[] = {0.00283598294f, -0.0173407476f, 0.0496075973f, -0.0917000771f, 0.130517438f,
                           -0.163716614f,  0.199580088f,   -0.249968916f, 0.333332419f,   -0.5f};
    V p = c[0] - V{};
    for (int i = 1; i < 10; ++i) p = p * u + c[i];
    return u + u * u * p;
  }
}
// 1 - e with e = e^-x, x >= 0 or nan, with all its digits where x is small.
template <class V>
inline V one_minus_exp(V x, V e) {
  if constexpr (sizeof(lane_t<V>) == 8) {
    for (size_t i = 0; i < sizeof(V) / 8; ++i) e[i] = -__builtin_expm1(-x[i]);
    return e;
  } else {
    constexpr float c[] = {-0.00103313767f, 0.00806723908f, -0.0415719971f, 0.166651189f, -0.499999076f, 1.0f};
    V p = c[0] - V{};
    for (int i = 1; i < 6; ++i) p = p * x + c[i];
    return x < 0.693147181f ? x * p : 1.0f - e;
  }
}

template <class V>
inline V inverse_of(V x) {
  return lane_t<V>(1) / x;
}

template <class V>
inline V tanh_of(V u) {
  if constexpr (sizeof(lane_t<V>) == 8) {
    for (size_t i = 0; i < sizeof(V) / 8; ++i) u[i] = __builtin_tanh(u[i]);
    return u;
  } else {
    const V a = u < 0.0f ? -u : u;
    const V e = exp_of(-2.0f * a);
    const V large = (1.0f - e) / (1.0f + e);
    const V w = u * u;
    constexpr float c[] = {0.00226950168f, -0.00832318706f, 0.0217625029f, -0.0539584616f, 0.133333001f, -0.333333331f};
    V p = c[0] - V{};
    for (int i = 1; i < 6; ++i) p = p * w + c[i];
    return a < 0.625f ? u + u * w * p : (u < 0.0f ? -large : large);
  }
}

// One value through the narrowest vector.
template <class T>
inline T exp_of_scalar(T x) {
  return exp_of(x - narrow<T>{})[0];
}
template <class T>
inline T log_scalar(T x) {
  return log_of(x - narrow<T>{})[0];
}
}  // namespace FASTLOSS_ISA
}  // namespace fastloss
