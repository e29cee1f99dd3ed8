// Codes in registers to the operand of a tensor core: pairs of bf16 or f16, or fours of int8, that hold exactly what
// the code stands for, without its scale (mxfp4 as int8: twice that).
//
// No format stores what a lane of mma.m16n8k16 wants side by side (columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9), and none
// needs to: a sum may take its columns in any order if both operands do.  Lane t of the four that share a row takes the
// eight columns from 8 t on of a span of 32, which is one group of every format; they lie in 8 bytes of shared memory
// (8 bits), 4 (4 bits) or 2 (2 bits), and the same eight columns of x in one load of 16.  A byte of ternary5 has
// columns of two groups: it is taken where a row has one scale, and lane t has a trit of each of 8 bytes.
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

// Byte i is byte `selector >> 4 i & 7` of b and a, a's first; with bit 3 of those four its sign eight times (PRMT).
MOERT_DEVICE_INLINE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
#else
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15, byte = uint32_t(both >> 8 * (nibble & 7) & 0xff);
    word |= (nibble < 8 ? byte : byte < 128 ? 0u : 0xffu) << 8 * i;
  }
  return word;
#endif
}

// 128 in every byte, beside which is a code below it: a byte is subtracted and nothing is borrowed across.
constexpr uint32_t kBytesBeside = 0x80808080u;
MOERT_DEVICE_INLINE uint32_t subtract_bytes(uint32_t beside, uint32_t bytes) { return (beside - bytes) ^ kBytesBeside; }

// The upper word of high and low shifted to the left, by at most 31 (SHF).
MOERT_DEVICE_INLINE uint32_t shift_pair(uint32_t low, uint32_t high, int count) {
#if defined(__CUDACC__)
  return __funnelshift_l(low, high, count);
#else
  return uint32_t((uint64_t(high) << 32 | low) << count >> 32);
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
  // Of int8 codes.
  MOERT_DEVICE_INLINE static float int8_scale(uint32_t bits) {
    return kFormat == Format::mxfp4 ? 0.5f * scale(bits) : scale(bits);
  }
};

// Int4, symmetric or with zeros.  One LOP3 takes codes c and c + 4 of a word, (word >> 4 c & 0x000f000f) | kBeside, and
// one multiply-add leaves code - zero.
struct Int4Fragments : FragmentScale<Format::int4> {
  static constexpr Format kFormat = Format::int4;
  static constexpr int kPieces = 4;  // of 16 bytes in a row of a step
  // Where a piece lies in its row of shared memory, so that no two of what a warp reads at once meet in a bank.
  MOERT_DEVICE_INLINE static int place(int row, int piece) { return piece ^ (row / 2 % 4); }
  MOERT_DEVICE_INLINE static uint32_t load(const char* step, int row, int span, int t) {
    return *reinterpret_cast<const uint32_t*>(step + (row * kPieces + place(row, span)) * 16 + 4 * t);
  }

  // The eight columns from 8 t on of a span, as pairs for two products of 16 columns.
  template <typename T>
  MOERT_DEVICE_INLINE static void pairs(const char* step, int row, int span, int t, uint32_t scale,
                                        uint32_t (&out)[4]) {
    const uint32_t word = load(step, row, span, t);
    const uint32_t zero = kMinusBeside<T> | permute_bytes(scale, 0, 0x4242);
#pragma unroll
    for (int c = 0; c < 4; ++c) out[c] = fma_pair<T>(and_or(word >> 4 * c, 0x000f000fu, kPairBeside<T>), kOne<T>, zero);
  }
  // The same as int8, those of a half of a product of 32 columns in each word.
  MOERT_DEVICE_INLINE static void bytes(const char* step, int row, int span, int t, uint32_t scale,
                                        uint32_t (&out)[2]) {
    const uint32_t word = load(step, row, span, t), zeros = permute_bytes(scale, 0, 0x2222);
#pragma unroll
    for (int c = 0; c < 2; ++c) out[c] = subtract_bytes(and_or(word >> 4 * c, 0x0f0f0f0fu, kBytesBeside), zeros);
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
    const uint32_t word = Int4Fragments::load(step, row, span, t);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t sign = shifted(word, 12 - 4 * c) & 0x80008000u;
      out[c] = fma_pair<T>(and_or(shifted(word, kAt - 4 * c), both_halves(7u << kAt), sign), kPower, kMinusZero);
    }
  }
  // Twice the values: four codes choose among eight magnitudes at once, and their signs between those and their
  // negatives.
  MOERT_DEVICE_INLINE static void bytes(const char* step, int row, int span, int t, uint32_t, uint32_t (&out)[2]) {
    const uint32_t word = Int4Fragments::load(step, row, span, t), even = word << 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t which = word >> 16 * half & 0x7777u;
      const uint32_t plus = permute_bytes(0x03020100u, 0x0c080604u, which);
      const uint32_t minus = permute_bytes(0xfdfeff00u, 0xf4f8fafcu, which);
      const uint32_t negative = permute_bytes(even, word, half ? 0xfbeau : 0xd9c8u);
      out[half] = (plus & ~negative) | (minus & negative);
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
  MOERT_DEVICE_INLINE static void bytes(const char* step, int row, int span, int t, uint32_t, uint32_t (&out)[2]) {
    load(step, row, span, t, out);
  }
};

// Four e4m3 codes as two pairs.
template <typename T>
MOERT_DEVICE_INLINE void e4m3_pairs(uint32_t word, uint32_t* out) {
  constexpr int kDown = kIsBf16<T> ? 4 : 1;                               // from below the sign to its place
  constexpr uint32_t kPower = both_halves(kIsBf16<T> ? 0x7b80 : 0x5c00);  // 2^120, 2^8
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const uint32_t pair = permute_bytes(word, 0, c ? 0x3424u : 0x1404u);
    const uint32_t moved = and_or(pair >> kDown, both_halves(0x7f00u >> kDown), pair & 0x80008000u);
    out[c] = fma_pair<T>(moved, kPower, kMinusZero);
  }
}

struct Fp8Fragments : ByteFragments, FragmentScale<Format::fp8> {
  static constexpr Format kFormat = Format::fp8;

  template <typename T>
  MOERT_DEVICE_INLINE static void pairs(const char* step, int row, int span, int t, uint32_t, uint32_t (&out)[4]) {
    uint32_t words[2];
    load(step, row, span, t, words);
#pragma unroll
    for (int half = 0; half < 2; ++half) e4m3_pairs<T>(words[half], out + 2 * half);
  }
};

// Rows of two bits a column.
struct TwoBitFragments {
  static constexpr int kPieces = 2;
  MOERT_DEVICE_INLINE static int place(int row, int piece) { return piece ^ (row / 4 % 2); }
  MOERT_DEVICE_INLINE static uint32_t load(const char* step, int row, int span, int t) {
    return *reinterpret_cast<const uint16_t*>(step + (row * kPieces + place(row, span / 2)) * 16 + span % 2 * 8 +
                                              2 * t);
  }
};

struct Ternary2Fragments : TwoBitFragments, FragmentScale<Format::ternary2> {
  static constexpr Format kFormat = Format::ternary2;

  template <typename T>
  MOERT_DEVICE_INLINE static void pairs(const char* step, int row, int span, int t, uint32_t, uint32_t (&out)[4]) {
    const uint32_t word = permute_bytes(load(step, row, span, t), 0, 0x4140);
#pragma unroll
    for (int c = 0; c < 4; ++c)
      out[c] = fma_pair<T>(and_or(word >> 2 * c, 0x00030003u, kPairBeside<T>), kOne<T>, kMinusBeside<T> | 0x00010001u);
  }
  MOERT_DEVICE_INLINE static void bytes(const char* step, int row, int span, int t, uint32_t, uint32_t (&out)[2]) {
    const uint32_t half = load(step, row, span, t),
                   word = half | half << 14;  // codes c and c + 4, then c + 1 and c + 5
#pragma unroll
    for (int c = 0; c < 2; ++c) out[c] = subtract_bytes(and_or(word >> 4 * c, 0x03030303u, kBytesBeside), 0x01010101u);
  }
};

// A step is two pieces, 160 columns; span p of it is trit p of every byte.  Trit p of a byte is the carry above 8 bits
// of 3 times (3^p times the byte, of which 8 bits are kept), two bytes at once in the halves of a word.
struct Ternary5Fragments : TwoBitFragments, FragmentScale<Format::ternary5> {
  static constexpr Format kFormat = Format::ternary5;

  // Bytes 8 .. 9 and 24 .. 25 of the words are the trits of bytes 0, 1 and 2, 3 of word t of a piece.
  MOERT_DEVICE_INLINE static void carries(const char* step, int row, int span, int t, int piece, uint32_t (&out)[2]) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(step + (row * kPieces + place(row, piece)) * 16 + 4 * t);
    const uint32_t power = span == 4 ? 81 : 0x1b090301u >> 8 * span & 0xff;
    out[0] = (permute_bytes(word, 0, 0x4140) * power & 0x00ff00ffu) * 3;
    out[1] = (permute_bytes(word, 0, 0x4342) * power & 0x00ff00ffu) * 3;
  }
  template <typename T>
  MOERT_DEVICE_INLINE static void pairs(const char* step, int row, int span, int t, uint32_t, uint32_t (&out)[4]) {
#pragma unroll
    for (int c = 0; c < 4; c += 2) {
      uint32_t words[2];
      carries(step, row, span, t, c / 2, words);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        out[c + i] =
            fma_pair<T>(and_or(words[i] >> 8, 0x00030003u, kPairBeside<T>), kOne<T>, kMinusBeside<T> | 0x00010001u);
    }
  }
  MOERT_DEVICE_INLINE static void bytes(const char* step, int row, int span, int t, uint32_t, uint32_t (&out)[2]) {
#pragma unroll
    for (int piece = 0; piece < 2; ++piece) {
      uint32_t words[2];
      carries(step, row, span, t, piece, words);
      out[piece] = subtract_bytes(permute_bytes(words[0], words[1], 0x7531) | kBytesBeside, 0x01010101u);
    }
  }
};

}  // namespace moert::cuda
