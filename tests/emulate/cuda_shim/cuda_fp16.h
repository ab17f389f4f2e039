#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_runtime_api.h"

struct __half {
  std::uint16_t bits;
};

inline float __half2float(__half value) {
  const int exponent = (value.bits >> 10) & 31;
  const float fraction = static_cast<float>(value.bits & 1023);
  const float sign = value.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024.0f + fraction, exponent - 25);
}

inline __half __float2half_rn(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (value != value) return {0x7fff};
  if (magnitude == 0) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(magnitude, &exponent);
  // One unit in the last place is 2^(exponent - 11), and 2^-24 for subnormals. nearbyint rounds ties to even.
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // In units, bits of a half are linear: each exponent step adds 1024.
  return {static_cast<std::uint16_t>(sign | (units + 1024 * (unit + 24)))};
}

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
