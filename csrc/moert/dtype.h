// Element types of activations and weights, and their conversions to and from float.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// What kernels of the host and of a device both include: a device compiler sees its keywords, any other nothing.
#if defined(__CUDACC__)
#define MOERT_HOST_DEVICE __host__ __device__
#else
#define MOERT_HOST_DEVICE
#endif

namespace moert {

enum class DType : int32_t { f32, bf16, f16, f64 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

// The type of sums over T.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f(T{}) for the element type T of dtype.
template <typename F>
static inline void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    case DType::f64:
      return f(double{});
  }
}

// `static`: no weak symbol leaves a translation unit that is compiled for one instruction set.
MOERT_HOST_DEVICE static inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

MOERT_HOST_DEVICE static inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

MOERT_HOST_DEVICE static inline double bits_to_double(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

MOERT_HOST_DEVICE static inline uint64_t double_to_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}

MOERT_HOST_DEVICE static inline float to_float(float x) { return x; }

MOERT_HOST_DEVICE static inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

// On a GPU one instruction does each of the following three; it gives the same bits but for a NaN's.
MOERT_HOST_DEVICE static inline float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, nan
  if (magnitude < 0x0400u) {                                                                        // subnormal
    const float value = float(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
#endif
}

// Round to nearest even; NaN stays NaN.
MOERT_HOST_DEVICE static inline bf16 to_bf16(float x) {
#if defined(__CUDA_ARCH__)
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(bits >> 16 | 0x40u)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

MOERT_HOST_DEVICE static inline f16 to_f16(float x) {
#if defined(__CUDA_ARCH__)
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: the adder rounds to a multiple of 2^-24
    return {uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13))};
#endif
}

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct DTypeOf<f16> {
  static constexpr DType value = DType::f16;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::f64;
};

}  // namespace moert
