// Packed codes as vectors of bytes, and their products with int8 activations.  Included by one translation unit per
// instruction set.
//
// A vector of packed bytes holds kPlanes codes a byte: plane p has those of columns kPlanes * byte + p.  (Bit-nested
// weights are unpacked before: kVectors vectors, a plane each.)  A plane is unsigned, as the dot product of bytes wants
// it (but kSigned ones), its value 2^code_shift * code - code_bias; what the bias adds is taken off through the sums of
// the activations. kMaxCode bounds a plane.
#pragma once

#include "cpu/packed_gemm_isa.h"
#include "cpu/simd.h"
#include "moert/bit_nested.h"

namespace moert::cpu {
namespace {

using VecB = Vec<uint8_t>;
using VecS = Vec<int8_t>;

template <typename V>
MOERT_INLINE V load_vector(const void* p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <typename V>
MOERT_INLINE void store_vector(void* p, const V& x) {
  std::memcpy(p, &x, sizeof x);
}

// The vector of packed bytes at p, of which `left` are the row's: zeros after them.  left: a multiple of 16.
MOERT_INLINE VecB load_last(const uint8_t* p, [[maybe_unused]] int64_t left) {
#if defined(__AVX512F__)
  return bit_cast_vector<VecB>(_mm512_maskz_loadu_epi32(__mmask16((1u << left / 4) - 1), p));
#elif defined(__AVX2__)
  return bit_cast_vector<VecB>(_mm256_zextsi128_si256(load_vector<__m128i>(p)));
#else
  return load_vector<VecB>(p);
#endif
}

MOERT_INLINE VecF to_floats(const VecI& x) { return __builtin_convertvector(x, VecF); }

// To the nearest integer, ties to even.
MOERT_INLINE VecI nearest_integers(const VecF& x) {
#if defined(__AVX512F__)
  return bit_cast_vector<VecI>(_mm512_cvtps_epi32(bit_cast_vector<__m512>(x)));
#elif defined(__AVX2__)
  return bit_cast_vector<VecI>(_mm256_cvtps_epi32(bit_cast_vector<__m256>(x)));
#else
  VecI y;
  for (int i = 0; i < kLanes<float>; ++i) y[i] = int32_t(::nearbyintf(x[i]));
  return y;
#endif
}

// table[index[i]] of the vector at `table`; kLanes elements of it are read.
template <typename T>
MOERT_INLINE Vec<T> pick(const T* table, const VecI& index) {
#if defined(__AVX512F__)
  const __m512i t = load_vector<__m512i>(table);
  return bit_cast_vector<Vec<T>>(_mm512_permutexvar_epi32(bit_cast_vector<__m512i>(index), t));
#elif defined(__AVX2__)
  const __m256i t = load_vector<__m256i>(table);
  return bit_cast_vector<Vec<T>>(_mm256_permutevar8x32_epi32(t, bit_cast_vector<__m256i>(index)));
#else
  Vec<T> y;
  for (int i = 0; i < kLanes<T>; ++i) y[i] = table[index[i]];
  return y;
#endif
}

// The kMaxCode of int8 that stays signed.  VPSIGNB, which AVX-512 has not, gives x the signs of the codes, which then
// are multiplied without them.
constexpr int kSigned = -1;
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kOnlyAvx2 = true;
#else
constexpr bool kOnlyAvx2 = false;
#endif

#if defined(__AVX2__)
using VecH = Vec<int16_t>;

// The products of two bytes each, added up: exact for codes up to 129, and for signed ones.
template <int kMaxCode>
MOERT_INLINE VecH dot2(const VecB& codes, const VecS& x) {
#if defined(__AVX512F__)
  return bit_cast_vector<VecH>(_mm512_maddubs_epi16(bit_cast_vector<__m512i>(codes), bit_cast_vector<__m512i>(x)));
#else
  const __m256i c = bit_cast_vector<__m256i>(codes), y = bit_cast_vector<__m256i>(x);
  if constexpr (kMaxCode == kSigned)
    return bit_cast_vector<VecH>(_mm256_maddubs_epi16(_mm256_abs_epi8(c), _mm256_sign_epi8(y, c)));
  else
    return bit_cast_vector<VecH>(_mm256_maddubs_epi16(c, y));
#endif
}

// sums[i] += a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
MOERT_INLINE VecI add_pairs(const VecI& sums, const VecH& a, const VecH& b = splat(int16_t(1))) {
#if defined(__AVX512F__)
  return sums + bit_cast_vector<VecI>(_mm512_madd_epi16(bit_cast_vector<__m512i>(a), bit_cast_vector<__m512i>(b)));
#else
  return sums + bit_cast_vector<VecI>(_mm256_madd_epi16(bit_cast_vector<__m256i>(a), bit_cast_vector<__m256i>(b)));
#endif
}
#endif

// sums[i] += the products of bytes 4i .. 4i+3; exact.  Without VNNI codes up to 129 go through 16-bit sums of two
// products, which hold 2 * 129 * 127; larger ones are widened first.
template <int kMaxCode>
MOERT_INLINE VecI dot4(const VecI& sums, const VecB& codes, const VecS& x) {
  static_assert(kMaxCode > 0 || kOnlyAvx2);
#if defined(__AVX512VNNI__)
  return bit_cast_vector<VecI>(_mm512_dpbusd_epi32(bit_cast_vector<__m512i>(sums), bit_cast_vector<__m512i>(codes),
                                                   bit_cast_vector<__m512i>(x)));
#elif defined(__AVX2__)
  if constexpr (kMaxCode <= 129) {
    return add_pairs(sums, dot2<kMaxCode>(codes, x));
  } else {
    using VecW = Vec<uint16_t>;
    const VecW wide = bit_cast_vector<VecW>(codes);
    const VecH even_x = bit_cast_vector<VecH>(bit_cast_vector<VecW>(x) << 8) >> 8;
    const VecI half = add_pairs(sums, bit_cast_vector<VecH>(wide & uint16_t(255)), even_x);
    return add_pairs(half, bit_cast_vector<VecH>(wide >> 8), bit_cast_vector<VecH>(x) >> 8);
  }
#else
  VecI y = sums;
  for (int i = 0; i < kLanes<int32_t>; ++i)
    for (int j = 4 * i; j < 4 * i + 4; ++j) y[i] += int32_t(codes[j]) * x[j];
  return y;
#endif
}

// dot4 of as many vectors as share a sum: add() of the 0th to the (n - 1)-th, then total(n), which sums may begin with
// again.
template <int kMaxCode>
struct ByteDots {
  VecI sums;
  MOERT_INLINE void add(const VecB& codes, const VecS& x, int) { sums = dot4<kMaxCode>(sums, codes, x); }
  MOERT_INLINE VecI total(int) const { return sums; }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// Small codes: kShort products are added up in 16 bits, then in 32.  Each addition is hidden from the compiler, which
// would add in a tree: all products first, and spill them.
template <int kMaxCode>
  requires(kMaxCode > 0 && kMaxCode <= 64)
struct ByteDots<kMaxCode> {
  static constexpr int kShort = 32767 / (2 * 127 * kMaxCode);
  VecI sums;
  VecH shorts;

  MOERT_INLINE void add(const VecB& codes, const VecS& x, int i) {
    const VecH two = dot2<kMaxCode>(codes, x);
    shorts = i % kShort ? shorts + two : two;
    asm("" : "+x"(shorts));
    if (i % kShort == kShort - 1) sums = add_pairs(sums, shorts);
  }
  MOERT_INLINE VecI total(int n) const { return n % kShort ? add_pairs(sums, shorts) : sums; }
};

template <>
struct ByteDots<kSigned> {
  VecI sums;
  MOERT_INLINE void add(const VecB& codes, const VecS& x, int) {
    sums = dot4<kSigned>(sums, codes, x);
    asm("" : "+x"(sums));
  }
  MOERT_INLINE VecI total(int) const { return sums; }
};
#endif

// Of most formats.
struct BytesOfCodes {
  static constexpr int kVectors = 1;
  static constexpr bool kZeros = false, kUnpacked = false;
};

struct Int8Code : BytesOfCodes {
  static constexpr int kPlanes = 1, kBias = kOnlyAvx2 ? 0 : 128, kMaxCode = kOnlyAvx2 ? kSigned : 255;
  MOERT_INLINE static void unpack(const VecB* bytes, const VecB&, VecB* planes) {
    planes[0] = bytes[0] ^ uint8_t(kBias);
  }
};

// The same where an integer belongs to 32 columns, not to a row.
struct Int8GroupCode : Int8Code {};

struct Int4Code : BytesOfCodes {
  static constexpr int kPlanes = 2, kBias = 8, kMaxCode = 15;
  MOERT_INLINE static void unpack(const VecB* bytes, const VecB&, VecB* planes) {
    planes[0] = bytes[0] & uint8_t(15);
    planes[1] = bytes[0] >> 4;
  }
};

// Here `zeros` is kBias - zero.
struct Int4AsymmetricCode : BytesOfCodes {
  static constexpr int kPlanes = 2, kBias = 15, kMaxCode = 30;
  static constexpr bool kZeros = true;
  MOERT_INLINE static void unpack(const VecB* bytes, const VecB& zeros, VecB* planes) {
    planes[0] = (bytes[0] & uint8_t(15)) + zeros;
    planes[1] = (bytes[0] >> 4) + zeros;
  }
};

// Twice the value of each e2m1 code, plus kBias.
alignas(16) constexpr uint8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct Mxfp4Code : BytesOfCodes {
  static constexpr int kPlanes = 2, kBias = 12, kMaxCode = 24;

  MOERT_INLINE static VecB look_up(const VecB& codes) {
#if defined(__AVX512F__)
    const __m512i table = _mm512_broadcast_i32x4(load_vector<__m128i>(kE2m1));
    return bit_cast_vector<VecB>(_mm512_shuffle_epi8(table, bit_cast_vector<__m512i>(codes)));
#elif defined(__AVX2__)
    const __m256i table = _mm256_broadcastsi128_si256(load_vector<__m128i>(kE2m1));
    return bit_cast_vector<VecB>(_mm256_shuffle_epi8(table, bit_cast_vector<__m256i>(codes)));
#else
    VecB y;
    for (int i = 0; i < kVectorBytes; ++i) y[i] = kE2m1[codes[i]];
    return y;
#endif
  }

  MOERT_INLINE static void unpack(const VecB* bytes, const VecB&, VecB* planes) {
    planes[0] = look_up(bytes[0] & uint8_t(15));
    planes[1] = look_up(bytes[0] >> 4);
  }
};

struct Ternary2Code : BytesOfCodes {
  static constexpr int kPlanes = 4, kBias = 1, kMaxCode = 3;
  MOERT_INLINE static void unpack(const VecB* bytes, const VecB&, VecB* planes) {
    planes[0] = bytes[0] & uint8_t(3);
    planes[1] = bytes[0] >> 2 & uint8_t(3);
    planes[2] = bytes[0] >> 4 & uint8_t(3);
    planes[3] = bytes[0] >> 6;
  }
};

// The carry of 3 * fraction above 8 bits: 1 from 86 on, 2 from 171 on.
struct Ternary5Code : BytesOfCodes {
  static constexpr int kPlanes = 5, kBias = 1, kMaxCode = 2;
  MOERT_INLINE static void unpack(const VecB* bytes, const VecB&, VecB* planes) {
    VecB fraction = bytes[0];
#pragma GCC unroll 5
    for (int p = 0; p < kPlanes; ++p) {
      const VecS one = fraction >= uint8_t(86), two = fraction >= uint8_t(171);
      planes[p] = bit_cast_vector<VecB>(-(one + two));
      fraction = fraction + fraction + fraction;
    }
  }
};

// 32 bit_nested_value(code) = bit_nested_step * code - bit_nested_offset, and what divides both.
constexpr int bit_nested_step(int64_t planes) { return 512 >> planes; }
constexpr int bit_nested_offset(int64_t planes) { return int(-32 * bit_nested_value(0, planes)); }
constexpr int bit_nested_unit(int64_t planes) {
  const int both = bit_nested_step(planes) | bit_nested_offset(planes);
  return both & -both;
}

// Bit-nested weights, whose bits packed_bits.h makes codes of first: a vector for each of the eight columns of a byte.
template <int kLargest>
struct BitNestedCode {
  static constexpr int kVectors = 8, kPlanes = 8, kMaxCode = kLargest;
  static constexpr bool kZeros = false, kUnpacked = true;
  MOERT_INLINE static void unpack(const VecB* codes, const VecB&, VecB* planes) {
#pragma GCC unroll 8
    for (int p = 0; p < kPlanes; ++p) planes[p] = codes[p];
  }
};

template <typename Code>
MOERT_INLINE int code_bias(const Packing& p) {
  if constexpr (Code::kUnpacked)
    return bit_nested_offset(p.planes) / bit_nested_unit(p.planes);
  else
    return Code::kBias;
}

// 0 but of bit-nested weights.
template <typename Code>
MOERT_INLINE int code_shift(const Packing& p) {
  return Code::kUnpacked ? __builtin_ctz(unsigned(bit_nested_step(p.planes) / bit_nested_unit(p.planes))) : 0;
}

// Columns in one step: a vector of packed bytes, or of each bit.
template <typename Code>
constexpr int64_t kStepColumns = int64_t(Code::kPlanes) * kVectorBytes;

// A byte of ternary5 has columns of two groups (but of 160): for their scales its codes are unpacked to int8 first.
MOERT_INLINE bool unpacks_first(const Packing& p, Precision precision) {
  return p.format == Format::ternary5 && (p.group != 0 || precision == Precision::int8_group32);
}

// f(Code{}) for the codes that the kernel reads.
template <typename F>
MOERT_INLINE auto with_code(const Packing& p, Precision precision, const F& f) {
  if (requantizes(p, precision)) return f(Int8Code{});
  switch (p.format) {
    case Format::int4:
      return f(Int4Code{});
    case Format::int4_asymmetric:
      return f(Int4AsymmetricCode{});
    case Format::mxfp4:
      return f(Mxfp4Code{});
    case Format::ternary2:
      return f(Ternary2Code{});
    case Format::ternary5:
      if (!unpacks_first(p, precision)) return f(Ternary5Code{});
      return f(Int8GroupCode{});
    case Format::bit_nested:
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
      if (p.planes < 8) return f(BitNestedCode<127>{});  // fits what dot4 has 16 bits for
#endif
      return f(BitNestedCode<255>{});
    default:
      if (p.group == 0 && is_int8_row(precision)) return f(Int8Code{});
      return f(Int8GroupCode{});
  }
}

}  // namespace
}  // namespace moert::cpu
