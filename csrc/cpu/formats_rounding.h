// How one group of weights becomes codes: the rounding rules of docs/formats.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "moert/formats.h"

namespace moert::cpu {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// To the nearest integer, ties to even; |x| < 2^22.  Adding 1.5 * 2^23 leaves no bits below 1.
static inline float nearest(float x) { return (x + 12582912.f) - 12582912.f; }

static inline float clamp(float x, float low, float high) { return std::min(std::max(x, low), high); }

// The smallest f16 that is not below x >= 0: with a scale rounded up no weight of the group is out of reach.
static inline f16 to_f16_up(float x) {
  f16 half = to_f16(x);
  if (to_float(half) < x) ++half.bits;
  return half;
}

// The largest |w|; infinity where one is not finite.
static inline float largest_magnitude(const float* w, int64_t n) {
  float largest = 0.f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = std::fabs(w[i]);
    finite &= magnitude < kInfinity;
    largest = std::max(largest, magnitude);
  }
  return finite ? largest : kInfinity;
}

// codes = nearest(w / scale) within [low, high], plus zero.
static inline void round_group(const float* w, int64_t n, float scale, float low, float high, float zero,
                               uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) {
    const float q = scale == 0.f ? 0.f : clamp(nearest(w[i] / scale), low, high);
    codes[i] = uint8_t(int32_t(q + zero));
  }
}

// The sum of (w - value(code))^2, in order and in double, so that comparing two of them has one outcome everywhere.
template <typename Value>
static double squared_error(const float* w, int64_t n, const uint8_t* codes, const Value& value) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double error = double(w[i]) - double(value(codes[i]));
    sum += error * error;
  }
  return sum;
}

struct Rounded {
  f16 scale;     // infinite where the group cannot be rounded
  uint8_t zero;  // int4_asymmetric only
};

static Rounded round_int8(const float* w, int64_t n, uint8_t* codes) {
  const f16 scale = to_f16_up(largest_magnitude(w, n) / 127.f);
  if (to_float(scale) < kInfinity) round_group(w, n, to_float(scale), -127.f, 127.f, 0.f, codes);
  return {scale, 0};
}

// Two scales, of which the one with the smaller squared error is kept: the largest magnitude is 7 of it, or exactly the
// weight of largest magnitude is -8 of it (a finer grid that may clip the other side).
static Rounded round_int4(const float* w, int64_t n, uint8_t* codes, uint8_t* others) {
  const float largest = largest_magnitude(w, n);
  const f16 scale = to_f16_up(largest / 7.f);
  if (!(to_float(scale) < kInfinity)) return {scale, 0};
  f16 finer = to_f16_up(largest / 8.f);
  const float* extreme = std::find_if(w, w + n, [&](float x) { return std::fabs(x) == largest; });
  if (extreme != w + n && *extreme > 0.f) finer.bits |= 0x8000u;
  const auto error = [&](f16 s, uint8_t* out) {
    round_group(w, n, to_float(s), -8.f, 7.f, 8.f, out);
    return squared_error(w, n, out, [&](uint8_t code) { return to_float(s) * float(int(code) - 8); });
  };
  const double coarse_error = error(scale, codes);
  if (!(error(finer, others) < coarse_error)) return {scale, 0};
  std::copy(others, others + n, codes);
  return {finer, 0};
}

// 0 is always on the grid: the range is widened to it, and zero is its code.
static Rounded round_int4_asymmetric(const float* w, int64_t n, uint8_t* codes) {
  if (!(largest_magnitude(w, n) < kInfinity)) return {{0x7c00u}, 0};
  float low = 0.f, high = 0.f;
  for (int64_t i = 0; i < n; ++i) low = std::min(low, w[i]), high = std::max(high, w[i]);
  const f16 half = to_f16_up((high - low) / 15.f);
  const float scale = to_float(half);
  if (!(scale < kInfinity)) return {half, 0};
  const float zero = scale == 0.f ? 0.f : clamp(nearest(-low / scale), 0.f, 15.f);
  round_group(w, n, scale, -zero, 15.f - zero, zero, codes);
  return {half, uint8_t(int32_t(zero))};
}

// The scale and the set of non-zeros of least squared error: of the k largest magnitudes the mean, for the k whose
// (sum^2 / k) is largest.
static Rounded round_ternary(const float* w, int64_t n, uint8_t* codes, std::vector<float>& magnitudes) {
  if (!(largest_magnitude(w, n) < kInfinity)) return {{0x7c00u}, 0};
  magnitudes.resize(size_t(n));
  std::transform(w, w + n, magnitudes.begin(), [](float x) { return std::fabs(x); });
  std::sort(magnitudes.begin(), magnitudes.end(), std::greater<float>());
  double sum = 0, best = 0, mean = 0;
  for (int64_t k = 1; k <= n; ++k) {
    sum += double(magnitudes[size_t(k - 1)]);
    const double gain = sum * sum / double(k);
    if (gain > best) best = gain, mean = sum / double(k);
  }
  const f16 scale = to_f16(float(mean));
  if (to_float(scale) < kInfinity) round_group(w, n, to_float(scale), -1.f, 1.f, 1.f, codes);
  return {scale, 0};
}

// To the nearest e2m1 of y >= 0, ties to the even code; above 6 it is 6.
static inline uint8_t to_e2m1(float y) {
  return uint8_t((y > 0.25f) + (y >= 0.75f) + (y > 1.25f) + (y >= 1.75f) + (y > 2.5f) + (y >= 3.5f) + (y > 5.f));
}

// The exponent of OCP's conversion, at which magnitudes above 6 of it become 6, or the next one, at which none is:
// the one with the smaller squared error.  255 where a weight is not finite.
static uint8_t round_mxfp4(const float* w, int64_t n, uint8_t* codes, uint8_t* others) {
  const float largest = largest_magnitude(w, n);
  if (!(largest < kInfinity)) return 255;
  const int exponent = largest == 0.f ? -127 : std::clamp(std::ilogb(largest) - 2, -127, 126);
  const auto error = [&](int e, uint8_t* out) {
    const float scale = e8m0_to_float(uint8_t(127 + e)), inverse = e8m0_to_float(uint8_t(127 - e));
    for (int64_t i = 0; i < n; ++i) {
      out[i] = uint8_t(to_e2m1(std::fabs(w[i]) * inverse) | (std::signbit(w[i]) ? 8u : 0u));
    }
    return squared_error(w, n, out, [&](uint8_t code) { return double(scale) * e2m1_to_float(code); });
  };
  const double ocp_error = error(exponent, codes);
  if (!(error(exponent + 1, others) < ocp_error)) return uint8_t(exponent + 127);
  std::copy(others, others + n, codes);
  return uint8_t(exponent + 128);
}

}  // namespace moert::cpu
