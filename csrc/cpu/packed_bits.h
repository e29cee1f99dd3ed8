// Bit planes as codes, a byte each: three rounds of joining make the bits of eight columns, which share a byte, bytes.
#pragma once

#include "cpu/packed_codes.h"

namespace moert::cpu {
namespace {

// The bits of `a` where those of mask are 1, else those of b.  `a` is first, as what the result may overwrite.
MOERT_INLINE VecB select_bits(const VecB& a, const VecB& mask, const VecB& b) {
#if defined(__AVX512F__)
  return bit_cast_vector<VecB>(_mm512_ternarylogic_epi32(bit_cast_vector<__m512i>(a), bit_cast_vector<__m512i>(mask),
                                                         bit_cast_vector<__m512i>(b), 0xe2));
#else
  return (a & mask) | (b & ~mask);
#endif
}

// Fields of kWidth bits, those of `high` above those of `low`, become fields of twice the width: in low those of even
// places, in high those of odd ones.  Without kHigh, `high` counts as zeros.
template <int kWidth, bool kHigh>
MOERT_INLINE void join_fields(VecB& low, VecB& high) {
  using VecW = Vec<uint16_t>;  // bits that cross bytes are masked
  const VecB mask = splat(uint8_t(255 / ((1 << kWidth) + 1)));
  const VecB odd = bit_cast_vector<VecB>(bit_cast_vector<VecW>(low) >> kWidth);
  if constexpr (kHigh) {
    const VecB even = bit_cast_vector<VecB>(bit_cast_vector<VecW>(high) << kWidth);
    low = select_bits(low, mask, even);
    high = select_bits(odd, mask, high);
  } else {
    low = low & mask;
    high = odd & mask;
  }
}

// v[p], the codes of the columns 8 * byte + p, from kBits vectors of bits, the highest first.
template <int kBits>
MOERT_INLINE void join_bits(const VecB* bits, VecB* v) {
  // Bits of the index i of a vector v become those of its columns' place among eight: first bit 0, then 1, then 2.
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = i < kBits ? bits[kBits - 1 - i] : VecB{};
  join_fields<1, (kBits > 1)>(v[0], v[1]);
  if constexpr (kBits > 2) join_fields<1, (kBits > 3)>(v[2], v[3]);
  if constexpr (kBits > 4) join_fields<1, (kBits > 5)>(v[4], v[5]);
  if constexpr (kBits > 6) join_fields<1, (kBits > 7)>(v[6], v[7]);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    join_fields<2, (kBits > 2)>(v[i], v[i + 2]);
    if constexpr (kBits > 4) join_fields<2, (kBits > 6)>(v[i + 4], v[i + 6]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) join_fields<4, (kBits > 4)>(v[i], v[i + 4]);
}

// Planes of bits, `plane` bytes apart, the highest first, become bytes: the code of column 8 b + p of the bits' byte b
// is at codes + p * apart + b / kVectorBytes * next + b % kVectorBytes.  bytes: a multiple of 16; codes are written up
// to a whole vector.  What follows the bytes is prefetched, as if it were the next rows (which it is not in a panel).
struct BitPlanes {
  const uint8_t* bits;
  int64_t plane, bytes;
  uint8_t* codes;
  int64_t apart, next;
};

template <int kBits, bool kLast>
MOERT_INLINE void unpack_vector(const BitPlanes& t, const uint8_t* bits, int64_t left, uint8_t* codes) {
  constexpr int64_t kPlaneAhead = kAheadBytes / 2;  // the planes are streams beside one another: of each, half as far
  VecB vectors[kBits], v[8];
#pragma GCC unroll 8
  for (int p = 0; p < kBits; ++p) {
    vectors[p] = kLast ? load_last(bits + p * t.plane, left) : load_vector<VecB>(bits + p * t.plane);
    __builtin_prefetch(bits + p * t.plane + kPlaneAhead, 0, 2);
    __builtin_prefetch(bits + p * t.plane + t.bytes, 0, 3);  // what comes next is in the level-2 cache by now
  }
  join_bits<kBits>(vectors, v);
#pragma GCC unroll 8
  for (int p = 0; p < 8; ++p) store_vector(codes + p * t.apart, v[p]);
}

template <int kBits>
void unpack_planes(const BitPlanes& t) {
  uint8_t* codes = t.codes;
  int64_t i = 0;
  for (; i + kVectorBytes <= t.bytes; i += kVectorBytes, codes += t.next)
    unpack_vector<kBits, false>(t, t.bits + i, kVectorBytes, codes);
  if (i < t.bytes) unpack_vector<kBits, true>(t, t.bits + i, t.bytes - i, codes);
}

void unpack_planes(int64_t planes, const BitPlanes& t) {
  using Function = void (*)(const BitPlanes&);
  static constexpr Function of_bits[] = {unpack_planes<1>, unpack_planes<2>, unpack_planes<3>, unpack_planes<4>,
                                         unpack_planes<5>, unpack_planes<6>, unpack_planes<7>, unpack_planes<8>};
  of_bits[planes < 1 ? 0 : planes > 8 ? 7 : planes - 1](t);
}

}  // namespace
}  // namespace moert::cpu
