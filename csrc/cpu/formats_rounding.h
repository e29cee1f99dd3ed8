// How one group of weights becomes codes: the rounding rules of docs/formats.md, in loops that a compiler turns into
// vectors of any width without changing a bit: no sum is reordered, and nothing is contracted (-ffp-contract=off).
#pragma once

#include <cstring>

#include "moert/formats.h"

namespace moert::cpu {

constexpr float kInfinity = __builtin_huge_valf();

// To the nearest integer, ties to even; |x| < 2^22.  Adding 1.5 * 2^23 leaves no bits below 1.
static inline float nearest(float x) { return (x + 12582912.f) - 12582912.f; }

static inline float clamp(float x, float low, float high) {
  const float above = x < low ? low : x;
  return high < above ? high : above;
}

// The smallest f16 that is not below x >= 0: with a scale rounded up no weight of the group is out of reach.
static inline f16 to_f16_up(float x) {
  f16 half = to_f16(x);
  if (to_float(half) < x) ++half.bits;
  return half;
}

// The largest |w|; infinity where one is not finite.  Magnitudes compare as the integers that their bits are.
static inline float largest_magnitude(const float* w, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = float_to_bits(w[i]) & 0x7fffffffu;
    largest = largest < magnitude ? magnitude : largest;
  }
  return largest < 0x7f800000u ? bits_to_float(largest) : kInfinity;
}

struct Range {
  float low, high;  // low <= 0 <= high
};

// Of finite weights, widened to 0.  A positive float is a positive integer, the larger the larger.
static inline Range range_with_zero(const float* w, int64_t n) {
  int32_t high = 0, low = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t up = int32_t(float_to_bits(w[i])), down = int32_t(float_to_bits(w[i]) ^ 0x80000000u);
    high = high < up ? up : high;
    low = low < down ? down : low;
  }
  return {-bits_to_float(uint32_t(low)), bits_to_float(uint32_t(high))};
}

// codes = nearest(w / scale) within [low, high], plus zero.
static inline void round_group(const float* w, int64_t n, float scale, float low, float high, float zero,
                               uint8_t* __restrict codes) {
  if (scale == 0.f) {
    for (int64_t i = 0; i < n; ++i) codes[i] = uint8_t(int32_t(zero));
    return;
  }
  for (int64_t i = 0; i < n; ++i) codes[i] = uint8_t(int32_t(clamp(nearest(w[i] / scale), low, high) + zero));
}

// Of N ways to round n weights the sums of squared errors, error(way, i) of weight i, each in order and in double, so
// that comparing two of them has one outcome everywhere.
template <int N, typename Error>
static inline void squared_errors(int64_t n, const Error& error, double* sums) {
  constexpr int64_t kBlock = 32;  // what is added up is made by vectors
  double squares[N][kBlock], sum[N] = {};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = n - begin < kBlock ? n - begin : kBlock;
    for (int way = 0; way < N; ++way) {
      for (int64_t i = 0; i < count; ++i) {
        const double e = error(way, begin + i);
        squares[way][i] = e * e;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int way = 0; way < N; ++way) sum[way] += squares[way][i];
    }
  }
  for (int way = 0; way < N; ++way) sums[way] = sum[way];
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

static inline bool first_extreme_is_positive(const float* w, int64_t n, float largest) {
  for (int64_t i = 0; i < n; ++i) {
    if (w[i] == largest || w[i] == -largest) return w[i] > 0.f;
  }
  return false;
}

// Two scales, of which the one with the smaller squared error is kept: the largest magnitude is 7 of it, or exactly the
// weight of largest magnitude is -8 of it (a finer grid that may clip the other side).  others: n codes.
static Rounded round_int4(const float* w, int64_t n, uint8_t* codes, uint8_t* others) {
  const float largest = largest_magnitude(w, n);
  const f16 scale = to_f16_up(largest / 7.f);
  if (!(to_float(scale) < kInfinity)) return {scale, 0};
  f16 finer = to_f16_up(largest / 8.f);
  if (first_extreme_is_positive(w, n, largest)) finer.bits |= 0x8000u;
  const float scales[2] = {to_float(scale), to_float(finer)};
  const uint8_t* both[2] = {codes, others};
  round_group(w, n, scales[0], -8.f, 7.f, 8.f, codes);
  round_group(w, n, scales[1], -8.f, 7.f, 8.f, others);
  double errors[2];
  squared_errors<2>(
      n, [&](int way, int64_t i) { return double(w[i]) - double(scales[way] * float(int(both[way][i]) - 8)); }, errors);
  if (!(errors[1] < errors[0])) return {scale, 0};
  std::memcpy(codes, others, size_t(n));
  return {finer, 0};
}

// 0 is always on the grid: the range is widened to it, and zero is its code.
static Rounded round_int4_asymmetric(const float* w, int64_t n, uint8_t* codes) {
  if (!(largest_magnitude(w, n) < kInfinity)) return {{0x7c00u}, 0};
  const Range range = range_with_zero(w, n);
  const f16 half = to_f16_up((range.high - range.low) / 15.f);
  const float scale = to_float(half);
  if (!(scale < kInfinity)) return {half, 0};
  const float zero = scale == 0.f ? 0.f : clamp(nearest(-range.low / scale), 0.f, 15.f);
  round_group(w, n, scale, -zero, 15.f - zero, zero, codes);
  return {half, uint8_t(int32_t(zero))};
}

// n numbers, the largest first, by their bytes from the lowest on; others: room for as many.
static void sort_descending(uint32_t* numbers, int64_t n, uint32_t* others) {
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t places[257] = {};
    for (int64_t i = 0; i < n; ++i) ++places[256 - (numbers[i] >> shift & 255u)];
    for (int i = 1; i <= 256; ++i) places[i] += places[i - 1];
    for (int64_t i = 0; i < n; ++i) others[places[255 - (numbers[i] >> shift & 255u)]++] = numbers[i];
    uint32_t* swap = numbers;
    numbers = others;
    others = swap;
  }
}

// The scale and the set of non-zeros of least squared error: of the k largest magnitudes the mean, for the k whose
// (sum^2 / k) is largest.  numbers: 2 n.
static Rounded round_ternary(const float* w, int64_t n, uint8_t* codes, uint32_t* numbers) {
  if (!(largest_magnitude(w, n) < kInfinity)) return {{0x7c00u}, 0};
  for (int64_t i = 0; i < n; ++i) numbers[i] = float_to_bits(w[i]) & 0x7fffffffu;
  sort_descending(numbers, n, numbers + n);
  double sum = 0, best = 0, mean = 0;
  for (int64_t k = 1; k <= n; ++k) {
    sum += double(bits_to_float(numbers[k - 1]));
    const double gain = sum * sum / double(k);
    if (gain > best) best = gain, mean = sum / double(k);
  }
  const f16 scale = to_f16(float(mean));
  if (to_float(scale) < kInfinity) round_group(w, n, to_float(scale), -1.f, 1.f, 1.f, codes);
  return {scale, 0};
}

// To the nearest e2m1 of y >= 0, ties to the even code; above 6 it is 6.
static inline uint32_t to_e2m1(float y) {
  return uint32_t(y > 0.25f) + uint32_t(y >= 0.75f) + uint32_t(y > 1.25f) + uint32_t(y >= 1.75f) + uint32_t(y > 2.5f) +
         uint32_t(y >= 3.5f) + uint32_t(y > 5.f);
}

// e2m1_to_float in operations that vectors have: twice the value is the code, or 2 or 3 times a power of two.
static inline float e2m1_value(uint32_t code) {
  const uint32_t c = code & 7u, twice = c < 2u ? c : (2u + (c & 1u)) << (((c >> 1) - 1u) & 3u);
  return bits_to_float(float_to_bits(0.5f * float(int32_t(twice))) | (code & 8u) << 28);
}

// The codes of n weights at the scale 2^(e - 127).
static inline void round_e2m1(const float* w, int64_t n, int e, uint8_t* __restrict codes) {
  const float inverse = e8m0_to_float(uint8_t(254 - e));
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = float_to_bits(w[i]);
    codes[i] = uint8_t(to_e2m1(bits_to_float(bits & 0x7fffffffu) * inverse) | bits >> 31 << 3);
  }
}

// The exponent of OCP's conversion, at which magnitudes above 6 of it become 6, or the next one, at which none is:
// the one with the smaller squared error.  255 where a weight is not finite.  others: n codes.
static uint8_t round_mxfp4(const float* w, int64_t n, uint8_t* codes, uint8_t* others) {
  const float largest = largest_magnitude(w, n);
  if (!(largest < kInfinity)) return 255;
  const int above = int(float_to_bits(largest) >> 23) - 2;  // biased; of a subnormal number below all that there are
  const int exponent = above < 0 ? 0 : above > 253 ? 253 : above;
  const double scales[2] = {e8m0_to_float(uint8_t(exponent)), e8m0_to_float(uint8_t(exponent + 1))};
  const uint8_t* both[2] = {codes, others};
  round_e2m1(w, n, exponent, codes);
  round_e2m1(w, n, exponent + 1, others);
  double errors[2];
  squared_errors<2>(
      n, [&](int way, int64_t i) { return double(w[i]) - scales[way] * double(e2m1_value(both[way][i])); }, errors);
  if (!(errors[1] < errors[0])) return uint8_t(exponent);
  std::memcpy(codes, others, size_t(n));
  return uint8_t(exponent + 1);
}

}  // namespace moert::cpu
