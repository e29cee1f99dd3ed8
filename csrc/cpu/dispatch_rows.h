// Rows rounded to eight bits an element and back, for the instruction set that the including file is compiled for: the
// same bits for each.
#pragma once

#include <cfloat>

#include "cpu/dispatch_isa.h"
#include "cpu/simd.h"

namespace moert::cpu {
namespace {

using Bits = Vec<uint32_t>;
typedef uint8_t Bytes __attribute__((vector_size(kLanes<float>)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes<float>)));

// The codes of x, within the type, in the low byte of each lane.
template <Payload P>
MOERT_INLINE Bits codes_of(const VecF& x) {
  if constexpr (P == Payload::int8) {
    // 1.5 * 2^23: the adder rounds to an integer, whose low bits these are.
    return bit_cast_vector<Bits>(x + 12582912.0f);
  } else {
    const Bits bits = bit_cast_vector<Bits>(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    const Bits normal = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    // Below 2^-6 the adder rounds to a multiple of 2^-9.
    const Bits small = bit_cast_vector<Bits>(bit_cast_vector<VecF>(magnitude) + 0x1p14f) - 0x46800000u;
    return sign | select(magnitude < 0x3c800000u, small, normal);
  }
}

template <Payload P, typename N>
MOERT_INLINE VecF values_of(const uint8_t* codes, N n) {
  Bytes bytes{};
  std::memcpy(&bytes, codes, n);
  if constexpr (P == Payload::int8) {
    return __builtin_convertvector(bit_cast_vector<SignedBytes>(bytes), VecF);
  } else {
    const Bits code = __builtin_convertvector(bytes, Bits), magnitude = code & 0x7fu;
    const VecF small = __builtin_convertvector(bit_cast_vector<VecI>(magnitude), VecF) * 0x1p-9f;
    const Bits normal = (magnitude << 20) + (120u << 23);
    const Bits finite = select(magnitude < 8u, bit_cast_vector<Bits>(small), normal);
    const Bits value = select(magnitude == 0x7fu, Bits{} + 0x7fc00000u, finite);
    return bit_cast_vector<VecF>(value | (code & 0x80u) << 24);
  }
}

template <typename T, Payload P>
void round_row_of(const T* row, int64_t H, uint8_t* rounded) {
  Bits most{};  // as integers magnitudes keep their order, and what is not finite is above all
  for_vectors<float>(H, [&](int64_t h, auto n) {
    const Bits magnitude = bit_cast_vector<Bits>(load(row + h, n)) & 0x7fffffffu;
    most = select(magnitude > most, magnitude, most);
  });
  uint32_t largest = 0;
  for (int i = 0; i < kLanes<float>; ++i) largest = most[i] > largest ? most[i] : largest;
  const float scale = largest < 0x7f800000u ? bits_to_float(largest) / largest_of(P) : bits_to_float(0x7fc00000u);
  const int64_t place = scale_place(H);
  if (scale > 0) {
    // A scale that is not normal may be too small by a third.
    const VecF end = splat(largest_of(P)), divisor = splat(scale);
    for_vectors<float>(H, [&](int64_t h, auto n) {
      const VecF x = max(min(load(row + h, n) / divisor, end), -end);
      const Bytes bytes = __builtin_convertvector(codes_of<P>(x), Bytes);
      std::memcpy(rounded + h, &bytes, n);
    });
  } else {
    std::memset(rounded, 0, H);
  }
  std::memset(rounded + H, 0, place - H);
  std::memcpy(rounded + place, &scale, 4);
}

template <typename T, Payload P>
void widen_row_of(const uint8_t* rounded, int64_t H, T* row) {
  float scale;
  std::memcpy(&scale, rounded + scale_place(H), 4);
  const VecF end = splat(FLT_MAX);  // which the largest magnitude times its scale may round past
  for_vectors<float>(
      H, [&](int64_t h, auto n) { store(row + h, max(min(values_of<P>(rounded + h, n) * scale, end), -end), n); });
}

// f(T{}, payload) for the element type T and the payload, as a constant.
template <typename F>
void with_types(DType dtype, Payload payload, const F& f) {
  const auto with_payload = [&](auto element) {
    if (payload == Payload::int8) return f(element, std::integral_constant<Payload, Payload::int8>{});
    f(element, std::integral_constant<Payload, Payload::float8_e4m3>{});
  };
  if (dtype == DType::f32) return with_payload(float{});
  dtype == DType::bf16 ? with_payload(bf16{}) : with_payload(f16{});
}

void round_row(const void* row, DType dtype, int64_t H, Payload payload, void* rounded) {
  with_types(dtype, payload, [&](auto element, auto type) {
    using T = decltype(element);
    round_row_of<T, type()>(static_cast<const T*>(row), H, static_cast<uint8_t*>(rounded));
  });
}

void widen_row(const void* rounded, int64_t H, Payload payload, DType dtype, void* row) {
  with_types(dtype, payload, [&](auto element, auto type) {
    using T = decltype(element);
    widen_row_of<T, type()>(static_cast<const uint8_t*>(rounded), H, static_cast<T*>(row));
  });
}

}  // namespace
}  // namespace moert::cpu
