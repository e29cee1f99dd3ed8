// Products with codes of 4 and 8 bits as they lie, where integers belong to 32 columns.  16 bytes of a weight row, four
// words, are such a group, of 8 bits a half; the words of four vectors are transposed, so that a lane has all of them:
// its integers add up in one place, and become a float once.  A register block is M rows of x by R weight rows.
#pragma once

#include "cpu/packed_block.h"

namespace moert::cpu {
namespace {

// Where there are no vectors to keep in registers, code takes time to compile.
constexpr int kUnrolled = kVectorBytes > 16 ? 8 : 1;

template <typename Code, int M>
struct GroupDots {
  static constexpr int P = Code::kPlanes, V = kVectorBytes;
  static constexpr int64_t kColumns = kBlockSteps * kStepColumns<Code>;
  // Weight rows at a time, whose sums stay in registers: AVX-512 has 32 of these.
  static constexpr int R = kInOrder<M> ? 1 : kVectorBytes == 64 && M <= kBlockM ? kBlock : 2;
  VecF sums[M][kBlock];

  // The words of a block of a weight row, of which `left` bytes are the row's.
  template <bool kLast>
  MOERT_INLINE static void load_words(const uint8_t* bytes, int64_t left, VecI* words) {
#pragma GCC unroll kUnrolled
    for (int64_t i = 0; i < kBlockSteps; ++i, left -= V)
      if (!kLast || left >= V)
        words[i] = load_vector<VecI>(bytes + i * V);
      else
        words[i] = left > 0 ? bit_cast_vector<VecI>(load_last(bytes + i * V, left)) : VecI{};
    transpose_words(words);
  }

  // Block s of weight row `row`, the r-th of these at a time, times those of x.
  template <bool kLast>
  MOERT_INLINE void multiply(const DotBlock& b, const uint8_t* bytes, const DotRow* x, int64_t s, int row,
                             const VecI& lanes, VecF (&part)[M][R], int r) {
    const int64_t at = s * kBlockBytes<Code>, group = row * b.pitch + (s * kColumns >> b.shift);
    VecI words[kBlockSteps];
    ByteDots<Code::kMaxCode> dots[M];
    load_words<kLast>(bytes, b.last, words);
    VecB zeros{};
    if constexpr (Code::kZeros) zeros = bit_cast_vector<VecB>(pick(b.zeros + group, lanes));
#pragma GCC unroll kUnrolled
    for (int m = 0; m < M; ++m) dots[m].sums = load_vector<VecI>(x[m].data + at + kBlockSteps * P * V);
#pragma GCC unroll kUnrolled
    for (int64_t i = 0; i < kBlockSteps; ++i) {
      VecB planes[P];
      const VecB codes = bit_cast_vector<VecB>(words[i]);
      Code::unpack(&codes, zeros, planes);
#pragma GCC unroll kUnrolled
      for (int p = 0; p < P; ++p)
#pragma GCC unroll kUnrolled
        for (int m = 0; m < M; ++m)
          dots[m].add(planes[p], load_vector<VecS>(x[m].data + at + (i * P + p) * V), int(i * P + p));
    }
    VecF scale = pick(b.scales + group, lanes);
    if constexpr (kLast) {  // those behind the row are of the next one, and may be infinite
      const VecI there = group_of_block_lane<Code>(__builtin_ctz(kLaneColumns<Code>)) < int32_t(b.last / 16);
      scale = bit_cast_vector<VecF>(bit_cast_vector<VecI>(scale) & there);
    }
#pragma GCC unroll kUnrolled
    for (int m = 0; m < M; ++m)
      part[m][r] += to_floats(dots[m].total(kBlockSteps * P)) *
                    (scale * load_vector<VecF>(x[m].data + at + (kBlockSteps * P + 1) * V));
  }

  MOERT_INLINE void run(const DotBlock& b, const DotRow* x) {
    for (int r = 0; r < kBlock; r += R) run(b, x, r);
  }

  // The weight rows [first, first + R).
  MOERT_INLINE void run(const DotBlock& b, const DotRow* x, int first) {
    const VecI lanes = group_of_block_lane<Code>(b.shift);
    VecF part[M][R] = {};
    const uint8_t* bytes[R];
    for (int r = 0; r < R; ++r) bytes[r] = b.codes[first + r];
    const int64_t whole = row_blocks(b.layout) - (b.last ? 1 : 0);
    for (int64_t s = 0; s < whole; ++s)
#pragma GCC unroll kUnrolled
      for (int r = 0; r < R; ++r) {
        multiply<false>(b, bytes[r], x, s, first + r, lanes, part, r);
#pragma GCC unroll kUnrolled
        for (int64_t i = 0; i < kBlockSteps * V; i += 64) __builtin_prefetch(bytes[r] + bytes_ahead<R>(b) + i, 0, 2);
        bytes[r] += kBlockSteps * V;
      }
    if (b.last)
#pragma GCC unroll kUnrolled
      for (int r = 0; r < R; ++r) {
        multiply<true>(b, bytes[r], x, whole, first + r, lanes, part, r);
        for (int64_t i = 0; i < b.last; i += 64) __builtin_prefetch(bytes[r] + bytes_ahead<R>(b) + i, 0, 2);
      }
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) sums[m][first + r] = part[m][r];
  }
};

}  // namespace
}  // namespace moert::cpu
