// Codes in registers to the operand of a tensor core: pairs of bf16 or f16 that hold exactly what the code stands for,
// without its scale.
//
// No format stores what a lane of mma.m16n8k16 wants side by side (columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9), and none
// needs to: a sum may take its columns in any order if both operands do.  Lane t of the four that share a row takes the
// eight columns from 8 t on of a span of 32, which is one group of every format; they lie in 8 bytes of shared memory
// (8 bits), 4 (4 bits) or 2 (2 bits), and the same eight columns of x in one load of 16.
#pragma once

#include "cuda/packed_weights.h"

namespace moert::cuda {

// a * b + c of both halves of the words, rounded to T once.
template <typename T>
MOERT_DEVICE_INLINE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  uint32_t d;
  if constexpr (std::is_same_v<T, bf16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  const auto half = [&](int shift) {
    const auto value = [&](uint32_t word) { return to_float(T{uint16_t(word >> shift)}); };
    return uint32_t(narrow<T>(std::fma(value(a), value(b), value(c))).bits) << shift;
  };
  return half(0) | half(16);
#endif
}

// (a & b) | c as one LOP3: of two constants that only one can hold, the compiler would make two.
MOERT_DEVICE_INLINE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return (a & b) | c;
#endif
}

// Byte i is byte `selector >> 4 i & 7` of b and a, a's first (PRMT).
MOERT_DEVICE_INLINE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDACC__)
  return __byte_perm(a, b, selector);
#else
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return word;
#endif
}

// A positive count is a shift to the left.
MOERT_DEVICE_INLINE uint32_t shifted(uint32_t word, int count) { return count < 0 ? word >> -count : word << count; }

constexpr uint32_t both_halves(uint32_t half) { return half << 16 | half; }

// In T the bits of 2^kBits + code for codes below 2^kBits are kBeside | code; `minus_beside` are those of -2^kBits,
// with which `| zero` makes -(2^kBits + zero).
template <typename T>
constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
template <typename T>
constexpr uint32_t kOne = both_halves(kIsBf16<T> ? 0x3f80 : 0x3c00);
template <typename T>
constexpr uint32_t kMinusOne = kOne<T> | 0x80008000u;
template <typename T>
constexpr uint32_t kPairBeside = both_halves(kIsBf16<T> ? 0x4300 : 0x6400);
template <typename T>
constexpr uint32_t kMinusBeside = kPairBeside<T> | 0x80008000u;
constexpr uint32_t kMinusZero = 0x80008000u;

// What the lanes of a row share of a group: the bits of its scale, and of int4 its zero above them.
template <Format kFormat>
struct FragmentScale {
  MOERT_DEVICE_INLINE static uint32_t read(const PackedWeights& w, int64_t at) {
    if constexpr (kFormat == Format::mxfp4) {
      return static_cast<const uint8_t*>(w.matrix.scales)[at];
    } else if constexpr (kFormat == Format::fp8) {
      return float_to_bits(static_cast<const float*>(w.matrix.scales)[at]);
    } else {
      const uint32_t scale = static_cast<const f16*>(w.matrix.scales)[at].bits;
      if constexpr (kFormat != Format::int4) return scale;
      return scale | uint32_t(w.matrix.zeros ? w.matrix.zeros[at] : 8) << 16;
    }
  }
  MOERT_DEVICE_INLINE static float scale(uint32_t bits) {
    if constexpr (kFormat == Format::mxfp4)
      return e8m0_to_float(uint8_t(bits));
    else if constexpr (kFormat == Format::fp8)
      return bits_to_float(bits);
    else
      return to_float(f16{uint16_t(bits)});
  }
};

// Int4, symmetric or with zeros.  One LOP3 takes codes c and c + 4 of a word, (word >> 4 c & 0x000f000f) | kBeside, and
// one multiply-add leaves code - zero.
struct Int4Fragments : FragmentScale<Format::int4> {
  static constexpr Format kFormat = Format::int4;
  static constexpr int kPieces = 4;  // of 16 bytes in a row of a step
  // Where a piece lies in its row of shared memory, so that no two of what a warp reads at once meet in a bank.
  MOERT_DEVICE_INLINE static int place(int row, int piece) { return piece ^ (row / 2 % 4); }

  // The eight columns from 8 t on of a span, as pairs for two products of 16 columns.
  template <typename T>
  MOERT_DEVICE_INLINE static void pairs(const char* step, int row, int span, int t, uint32_t scale,
                                        uint32_t (&out)[4]) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(step + (row * kPieces + place(row, span)) * 16 + 4 * t);
    const uint32_t zero = kMinusBeside<T> | permute_bytes(scale, 0, 0x4242);
#pragma unroll
    for (int c = 0; c < 4; ++c) out[c] = fma_pair<T>(and_or(word >> 4 * c, 0x000f000fu, kPairBeside<T>), kOne<T>, zero);
  }
};

// The bits of an e2m1 code, moved to their place, are a power of two times its value, subnormals included.
struct Mxfp4Fragments : FragmentScale<Format::mxfp4> {
  static constexpr Format kFormat = Format::mxfp4;
  static constexpr int kPieces = 4;
  MOERT_DEVICE_INLINE static int place(int row, int piece) { return Int4Fragments::place(row, piece); }

  template <typename T>
  MOERT_DEVICE_INLINE static void pairs(const char* step, int row, int span, int t, uint32_t, uint32_t (&out)[4]) {
    constexpr int kAt = kIsBf16<T> ? 6 : 9;                                 // of the mantissa's one bit
    constexpr uint32_t kPower = both_halves(kIsBf16<T> ? 0x7e80 : 0x7400);  // 2^126, 2^14
    const uint32_t word = *reinterpret_cast<const uint32_t*>(step + (row * kPieces + place(row, span)) * 16 + 4 * t);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t sign = shifted(word, 12 - 4 * c) & 0x80008000u;
      out[c] = fma_pair<T>(and_or(shifted(word, kAt - 4 * c), both_halves(7u << kAt), sign), kPower, kMinusZero);
    }
  }
};

// Lanes of a row of bytes: eight side by side, in two words.
struct ByteFragments {
  static constexpr int kPieces = 8;
  MOERT_DEVICE_INLINE static int place(int row, int piece) { return piece ^ (row % 4 * 2); }
  MOERT_DEVICE_INLINE static void load(const char* step, int row, int span, int t, uint32_t (&words)[2]) {
    const uint2 both =
        *reinterpret_cast<const uint2*>(step + (row * kPieces + place(row, 2 * span + t / 2)) * 16 + t % 2 * 8);
    words[0] = both.x, words[1] = both.y;
  }
};

struct Int8Fragments : ByteFragments, FragmentScale<Format::int8> {
  static constexpr Format kFormat = Format::int8;

  template <typename T>
  MOERT_DEVICE_INLINE static void pairs(const char* step, int row, int span, int t, uint32_t, uint32_t (&out)[4]) {
    uint32_t words[2];
    load(step, row, span, t, words);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t selector = c % 2 ? 0x4342u : 0x4140u;  // two bytes, each below a high byte
      if constexpr (kIsBf16<T>) {
        // bf16 has room for seven bits: the sign bit makes the 128 that the others lie beside 256, and what has to be
        // taken off it is that sum's own upper part.
        const uint32_t pair = permute_bytes(words[c / 2], 0x43434343u, selector);
        out[c] = fma_pair<T>(pair & 0xff80ff80u, kMinusOne<T>, pair & 0xff7fff7fu);
      } else {
        const uint32_t pair = permute_bytes(words[c / 2] ^ 0x80808080u, 0x64646464u, selector);
        out[c] = fma_pair<T>(pair, kOne<T>, both_halves(0xe480));  // -(1024 + 128)
      }
    }
  }
};

struct Fp8Fragments : ByteFragments, FragmentScale<Format::fp8> {
  static constexpr Format kFormat = Format::fp8;

  template <typename T>
  MOERT_DEVICE_INLINE static void pairs(const char* step, int row, int span, int t, uint32_t, uint32_t (&out)[4]) {
    constexpr int kDown = kIsBf16<T> ? 4 : 1;                               // from below the sign to its place
    constexpr uint32_t kPower = both_halves(kIsBf16<T> ? 0x7b80 : 0x5c00);  // 2^120, 2^8
    uint32_t words[2];
    load(step, row, span, t, words);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t pair = permute_bytes(words[c / 2], 0, c % 2 ? 0x3424u : 0x1404u);
      const uint32_t moved = and_or(pair >> kDown, both_halves(0x7f00u >> kDown), pair & 0x80008000u);
      out[c] = fma_pair<T>(moved, kPower, kMinusZero);
    }
  }
};

struct Ternary2Fragments : FragmentScale<Format::ternary2> {
  static constexpr Format kFormat = Format::ternary2;
  static constexpr int kPieces = 2;
  MOERT_DEVICE_INLINE static int place(int row, int piece) { return piece ^ (row / 4 % 2); }

  template <typename T>
  MOERT_DEVICE_INLINE static void pairs(const char* step, int row, int span, int t, uint32_t, uint32_t (&out)[4]) {
    const char* from = step + (row * kPieces + place(row, span / 2)) * 16 + span % 2 * 8 + 2 * t;
    const uint32_t word = permute_bytes(*reinterpret_cast<const uint16_t*>(from), 0, 0x4140);
#pragma unroll
    for (int c = 0; c < 4; ++c)
      out[c] = fma_pair<T>(and_or(word >> 2 * c, 0x00030003u, kPairBeside<T>), kOne<T>, kMinusBeside<T> | 0x00010001u);
  }
};

}  // namespace moert::cuda
