// What the processor can do, for the benchmark's roofline: sums of floats and of their exponentials, as fast as a
// compiler makes them for this very machine (bench/measure.py builds this with -O3 -march=native -ffast-math).
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// exp(x) for |x| < 87 to about 2 units in the last place: x = k ln 2 + r, a polynomial of degree 5 in r, then 2^k added
// to the exponent. Branchless, so that the loops below become vector code.
inline float exp_poly(float x) {
  const float k = std::floor(x * 1.44269504f + 0.5f);
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float e = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &e, sizeof bits);
  bits += static_cast<int32_t>(k) << 23;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace

// x in one piece or as four at a time: which is faster depends on the size of the pages.
extern "C" float read_sum(const float* x, int64_t n, int64_t pieces) {
  float sum = 0;
  if (pieces == 1)
    for (int64_t i = 0; i < n; ++i) sum += x[i];
  else
    for (int64_t i = 0, quarter = n / 4; i < quarter; ++i)
      sum += (x[i] + x[i + quarter]) + (x[i + 2 * quarter] + x[i + 3 * quarter]);
  return sum;
}

extern "C" float exp_sum(const float* x, int64_t n, int64_t repeats) {
  float sum = 0;
  for (int64_t r = 0; r < repeats; ++r) {
    const float shift = static_cast<float>(r) * 1e-6f;  // so that no repetition can be left out
    for (int64_t i = 0; i < n; ++i) sum += exp_poly(x[i] + shift);
  }
  return sum;
}
