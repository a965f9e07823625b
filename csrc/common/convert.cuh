// Storage types on the device: 16-byte vectors to and from the accumulation type, loads whose dtype is only known at
// run time. cuda_fp16.h and cuda_bf16.h also compile for the host.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "primitives.cuh"

namespace fastloss {

using half_t = __half;
using bfloat16_t = __nv_bfloat16;

template <class T>
using accum_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int kLanes16 = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

__device__ __forceinline__ float to_accum(float v) { return v; }
__device__ __forceinline__ double to_accum(double v) { return v; }
__device__ __forceinline__ float to_accum(half_t v) { return __half2float(v); }
__device__ __forceinline__ float to_accum(bfloat16_t v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_accum(accum_t<T> v) {
  if constexpr (std::is_same_v<T, half_t>)
    return __float2half_rn(v);
  else if constexpr (std::is_same_v<T, bfloat16_t>)
    return __float2bfloat16_rn(v);
  else
    return v;
}

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Of a Vec16 or a Vec8.
template <class T, class V>
__device__ __forceinline__ void unpack(const V& v, accum_t<T> (&out)[sizeof(V) / sizeof(T)]) {
  constexpr int kWords = sizeof(V) / 4;
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < kWords / 2; ++i)
      out[i] = bits_as<double>(uint64_t(v.word[2 * i]) | uint64_t(v.word[2 * i + 1]) << 32);
  } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) out[i] = bits_as<float>(v.word[i]);
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {  // a bfloat16 is the upper half of a float
      out[2 * i] = bits_as<float>(v.word[i] << 16);
      out[2 * i + 1] = bits_as<float>(v.word[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      float2 f = __half22float2(bits_as<__half2>(v.word[i]));
      out[2 * i] = f.x;
      out[2 * i + 1] = f.y;
    }
  }
}

template <class T, int kCount>
__device__ __forceinline__ auto pack(const accum_t<T> (&in)[kCount]) {
  constexpr int kWords = kCount * int(sizeof(T)) / 4;
  std::conditional_t<kWords == 4, Vec16, Vec8> v;
  static_assert(sizeof(v) == kCount * sizeof(T));
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < kWords / 2; ++i) {
      uint64_t bits = bits_as<uint64_t>(in[i]);
      v.word[2 * i] = uint32_t(bits);
      v.word[2 * i + 1] = uint32_t(bits >> 32);
    }
  } else if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) v.word[i] = bits_as<uint32_t>(in[i]);
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) v.word[i] = bits_as<uint32_t>(__floats2bfloat162_rn(in[2 * i], in[2 * i + 1]));
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) v.word[i] = bits_as<uint32_t>(__floats2half2_rn(in[2 * i], in[2 * i + 1]));
  }
  return v;
}

// One vector's worth of -inf: what lies outside a row adds nothing to its sum.
template <class T, class V = Vec16>
__device__ __forceinline__ V minus_infinity() {
  accum_t<T> v[sizeof(V) / sizeof(T)];
#pragma unroll
  for (int i = 0; i < int(sizeof(V) / sizeof(T)); ++i) v[i] = -INFINITY;
  return pack<T>(v);
}

// Element by element, the larger one; a nan loses to a number. 16-bit types two at a time.
template <class T, class V>
__device__ __forceinline__ V max_of_vectors(const V& a, const V& b) {
  constexpr int kCount = sizeof(V) / sizeof(T);
  V m;
  if constexpr (sizeof(T) == 2) {
    using pair_t = std::conditional_t<std::is_same_v<T, half_t>, __half2, __nv_bfloat162>;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i)
      m.word[i] = bits_as<uint32_t>(__hmax2(bits_as<pair_t>(a.word[i]), bits_as<pair_t>(b.word[i])));
  } else {
    accum_t<T> x[kCount], y[kCount];
    unpack<T>(a, x);
    unpack<T>(b, y);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = max_of(x[i], y[i]);
    m = pack<T>(x);
  }
  return m;
}

// v[i] = value, without giving v an address.
template <class T>
__device__ __forceinline__ void set_element(Vec16& v, int i, accum_t<T> value) {
  accum_t<T> x[kLanes16<T>];
  unpack<T>(v, x);
#pragma unroll
  for (int j = 0; j < kLanes16<T>; ++j) x[j] = j == i ? value : x[j];
  v = pack<T>(x);
}

// The largest element, two at a time; a nan loses to a number.
template <class T>
__device__ __forceinline__ accum_t<T> max_of_vector(const Vec16& v) {
  if constexpr (sizeof(T) == 2) {
    using pair_t = std::conditional_t<std::is_same_v<T, half_t>, __half2, __nv_bfloat162>;
    const pair_t a = __hmax2(bits_as<pair_t>(v.word[0]), bits_as<pair_t>(v.word[1]));
    const pair_t b = __hmax2(bits_as<pair_t>(v.word[2]), bits_as<pair_t>(v.word[3]));
    const pair_t m = __hmax2(a, b);
    return max_of(to_accum(T(m.x)), to_accum(T(m.y)));
  } else {
    accum_t<T> x[kLanes16<T>];
    unpack<T>(v, x);
    accum_t<T> m = x[0];
#pragma unroll
    for (int i = 1; i < kLanes16<T>; ++i) m = max_of(m, x[i]);
    return m;
  }
}

// The elements of 4 bytes, aligned as such.
__device__ __forceinline__ void load_word(const float* p, float (&out)[1]) { out[0] = *p; }
__device__ __forceinline__ void load_word(const half_t* p, float (&out)[2]) {
  const __half2 v = *reinterpret_cast<const __half2*>(p);
  out[0] = to_accum(v.x), out[1] = to_accum(v.y);
}
__device__ __forceinline__ void load_word(const bfloat16_t* p, float (&out)[2]) {
  const __nv_bfloat162 v = *reinterpret_cast<const __nv_bfloat162*>(p);
  out[0] = to_accum(v.x), out[1] = to_accum(v.y);
}
__device__ __forceinline__ void store_word(float* p, const float (&in)[1]) { *p = in[0]; }
__device__ __forceinline__ void store_word(half_t* p, const float (&in)[2]) {
  *reinterpret_cast<__half2*>(p) = __floats2half2_rn(in[0], in[1]);
}
__device__ __forceinline__ void store_word(bfloat16_t* p, const float (&in)[2]) {
  *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(in[0], in[1]);
}

__device__ __forceinline__ bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// f(T{}) with the C++ type of a dtype.
template <class F>
inline void with_type(DType t, const F& f) {
  switch (t) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::f16: return f(half_t{});
    case DType::bf16: return f(bfloat16_t{});
  }
}

// Element i of an array of floating dtype t.
template <class A>
__device__ __forceinline__ A load_as(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::f32: return A(static_cast<const float*>(p)[i]);
    case DType::f64: return A(static_cast<const double*>(p)[i]);
    case DType::f16: return A(to_accum(static_cast<const half_t*>(p)[i]));
    case DType::bf16: return A(to_accum(static_cast<const bfloat16_t*>(p)[i]));
  }
  return A(0);
}
template <class A>
__device__ __forceinline__ void store_as(void* p, DType t, int64_t i, A v) {
  switch (t) {
    case DType::f32: static_cast<float*>(p)[i] = float(v); return;
    case DType::f64: static_cast<double*>(p)[i] = double(v); return;
    case DType::f16: static_cast<half_t*>(p)[i] = __float2half_rn(float(v)); return;
    case DType::bf16: static_cast<bfloat16_t*>(p)[i] = __float2bfloat16_rn(float(v)); return;
  }
}

// Class indices i, i + 1, ..., i + N - 1.
template <int N>
__device__ __forceinline__ void load_indices(const void* p, IndexType t, int64_t i, int64_t (&out)[N]) {
  if (t == IndexType::i64) {  // the usual one by itself, so that the loads go out together
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = static_cast<const int64_t*>(p)[i + j];
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = load_index(p, t, i + j);
  }
}

// N elements i, i + stride, … of type T, by 16-byte accesses where they are adjacent and aligned.
template <class T, int N, class A>
__device__ __forceinline__ void load_run_of(const T* p, int64_t stride, A (&out)[N]) {
  constexpr int kL = kLanes16<T>;
  if constexpr (N % kL == 0) {
    if (stride == 1 && aligned16(p)) {
#pragma unroll
      for (int j = 0; j < N / kL; ++j) {
        accum_t<T> v[kL];
        unpack<T>(load16(p + j * kL), v);
#pragma unroll
        for (int i = 0; i < kL; ++i) out[j * kL + i] = A(v[i]);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = A(to_accum(p[i * stride]));
}
template <int N, class A>
__device__ __forceinline__ void load_run(const void* p, DType t, int64_t at, int64_t stride, A (&out)[N]) {
  switch (t) {
    case DType::f32: return load_run_of(static_cast<const float*>(p) + at, stride, out);
    case DType::f64: return load_run_of(static_cast<const double*>(p) + at, stride, out);
    case DType::f16: return load_run_of(static_cast<const half_t*>(p) + at, stride, out);
    case DType::bf16: return load_run_of(static_cast<const bfloat16_t*>(p) + at, stride, out);
  }
}

}  // namespace fastloss
