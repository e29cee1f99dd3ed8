// Rows of QMoE's code: codewords become pairs, a byte of two digits each, and permutations make weights of those.
#pragma once

#include "cpu/packed_floats.h"
#include "moert/sub1.h"

namespace moert::cpu {
namespace {

// The codewords of row n and of those behind it.  What a broken row_ptr says beyond the matrix's is not read.
struct Sub1Codes {
  const uint16_t *next, *end;

  Sub1Codes(const PackedRows& b, int64_t n) {
    const int64_t first = reinterpret_cast<const int32_t*>(b.zeros)[n];
    next = reinterpret_cast<const uint16_t*>(b.codes) + (first < 0 ? 0 : smaller(first, b.size));
    end = reinterpret_cast<const uint16_t*>(b.codes) + b.size;
  }
};

// The weights of row n by their digits, of which a permutation reads the low bits of an index and ignores the others.
struct Sub1Table {
  VecF by_first, by_second;  // digits in bits 0 and 1, in bits 2 and 3

  Sub1Table(const PackedRows& b, int64_t n) {
    const bf16* limits = static_cast<const bf16*>(b.scales) + 2 * n;
    const VecF low = splat(to_float(limits[0])), high = splat(to_float(limits[1]));
    const auto weights = [&](const VecI& digit) { return select(digit == 1, low, select(digit == 2, high, VecF{})); };
    VecI lane;
    for (int i = 0; i < kLanes<float>; ++i) lane[i] = i;
    by_first = weights(lane & 3), by_second = weights(lane >> 2 & 3);
  }

#if defined(__AVX512F__)
  MOERT_INLINE VecF first(const VecI& pairs) const {
    return VecF(_mm512_permutevar_ps(__m512(by_first), __m512i(pairs)));
  }
  MOERT_INLINE VecF second(const VecI& pairs) const {
    return VecF(_mm512_permutexvar_ps(__m512i(pairs), __m512(by_second)));
  }
#elif defined(__AVX2__)
  MOERT_INLINE VecF first(const VecI& pairs) const {
    return VecF(_mm256_permutevar_ps(__m256(by_first), __m256i(pairs)));
  }
  MOERT_INLINE VecF second(const VecI& pairs) const { return first(pairs >> 2); }
#else
  MOERT_INLINE VecF first(const VecI& pairs) const {
    VecF y;
    for (int i = 0; i < kLanes<float>; ++i) y[i] = by_first[pairs[i] & 3];
    return y;
  }
#endif
};

// Row n as floats.
void sub1_row(const PackedRows& b, int64_t n, float* out) {
  constexpr int L = kLanes<float>;
  const uint64_t* table = sub1_pairs();
  const Sub1Table weights(b, n);
  VecI place, upper;  // where a lane's digit is in four bytes of pairs, and whether these are the upper four
  for (int i = 0; i < L; ++i) place[i] = i / 2 % 4 * 8 + i % 2 * 2, upper[i] = -(i / 8);
  const int64_t K = b.packing.columns;
  int64_t column = 0;
  for (Sub1Codes codes(b, n); codes.next < codes.end && column < K; ++codes.next) {
    const uint64_t pairs = table[*codes.next];
    const VecI words[] = {splat(int32_t(pairs)), splat(int32_t(pairs >> 32))};
#pragma GCC unroll 8
    for (int t = 0; t < 32; t += L) {
      const VecI word = L > 8 ? select(upper, words[1], words[0]) : words[t / 8 % 2];
      const VecF y = weights.first(word >> (place + t / 16 * 4 + t % 8 * 4));
      const int64_t left = K - column - t;
      if (left >= L)
        store(out + column + t, y);
      else if (left > 0)
        store_first(out + column + t, y, left);
    }
    column += int64_t(pairs >> 60) * 2;
  }
  if (column < K) std::memset(out + column, 0, size_t(K - column) * sizeof(float));
}

#if defined(__AVX2__)
constexpr int64_t kPairBlock = 8 * kLanes<float>;  // columns of a vector of pairs
constexpr int64_t pair_bytes(int64_t columns) { return (columns + 1) / 2; }

// Writes 16 bytes that begin with a codeword's pairs, of each the upper four bits mean nothing; returns their number.
MOERT_INLINE int64_t unpack_codeword(const uint64_t* pairs, uint8_t* out) {
  store_vector(out, _mm_srlv_epi64(_mm_set1_epi64x(int64_t(*pairs)), _mm_set_epi64x(4, 0)));
  uint32_t upper;  // loaded by itself, or the vector would come from a register, which takes longer
  std::memcpy(&upper, reinterpret_cast<const char*>(pairs) + 4, 4);
  return upper >> 28;
}

// The pairs of row n and those behind it, row upon row, `bytes` in all and up to 64 more.  Where a row ends is not
// asked: the processor would guess that branch wrong in every one.
void unpack_pairs(const PackedRows& b, int64_t n, int64_t bytes, uint8_t* out) {
  constexpr int kUnrolled = 4;
  const uint64_t* table = sub1_pairs();
  Sub1Codes codes(b, n);
  const uint8_t* end = out + bytes;
  for (; out < end && codes.end - codes.next >= kUnrolled; codes.next += kUnrolled)
#pragma GCC unroll 4
    for (int i = 0; i < kUnrolled; ++i) out += unpack_codeword(table + codes.next[i], out);
  while (out < end && codes.next < codes.end) out += unpack_codeword(table + *codes.next++, out);
  if (out < end) std::memset(out, 0, size_t(end - out));
}

// x in the order in which the lanes of pairs meet it: of every kPairBlock columns, vector j has the columns j, j + 8,
// j + 16 ...  Columns of even places first turns the bits of a column's number by one, and this by three.
void order_for_pairs(float* x, int64_t K) {
  for (int64_t k = 0; k < K; k += kPairBlock) {
    VecF v[8], split[8];
    for (int i = 0; i < 8; ++i) v[i] = load(x + k + i * kLanes<float>);
#pragma GCC unroll 3
    for (int turn = 0; turn < 3; ++turn) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        split_even_odd(v[2 * i], v[2 * i + 1], std::make_index_sequence<kLanes<float>>{});
        split[i] = v[2 * i], split[i + 4] = v[2 * i + 1];
      }
      std::memcpy(v, split, sizeof v);
    }
    for (int i = 0; i < 8; ++i) store(x + k + i * kLanes<float>, v[i]);
  }
}

// c [M, kFewBlock] of `count` weight rows from n on, whose pairs are in t.scratch; the last stands for those that there
// are not.
template <int M>
void few_pairs(const FewRows& t, int64_t n, int64_t count, float* c) {
  const int64_t K = t.b.packing.columns;
  const auto row = [&](int r) { return smaller(r, count - 1); };
  const Sub1Table weights[kFewBlock] = {{t.b, n}, {t.b, n + row(1)}, {t.b, n + row(2)}, {t.b, n + row(3)}};
  VecF sums[M][kFewBlock] = {};
  for (int64_t k = 0; k < K; k += kPairBlock) {
    VecI bytes[kFewBlock];
    for (int r = 0; r < kFewBlock; ++r) bytes[r] = load_vector<VecI>(t.scratch + row(r) * pair_bytes(K) + k / 2);
#pragma GCC unroll 4
    for (int j = 0; j < 8; j += 2) {
      const float* x = t.x + k + j * kLanes<float>;
#pragma GCC unroll 4
      for (int r = 0; r < kFewBlock; ++r) {
        const VecF first = weights[r].first(bytes[r]), second = weights[r].second(bytes[r]);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          sums[m][r] += first * load(x + m * t.stride);
          sums[m][r] += second * load(x + m * t.stride + kLanes<float>);
        }
        bytes[r] >>= 8;
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    float total[kFewBlock];
    add_lanes_of_four<float>(sums[m], total, false);
    for (int r = 0; r < count; ++r) c[m * kTileColumns + r] = total[r];
  }
}

bool few_sub1(const FewRows& t) {
  using Function = void (*)(const FewRows&, int64_t, int64_t, float*);
  static constexpr Function products[] = {few_pairs<1>, few_pairs<2>, few_pairs<3>, few_pairs<4>};
  const int64_t K = t.b.packing.columns;
  for (int64_t m = 0; m < t.M; ++m) order_for_pairs(t.x + m * t.stride, K);
  // Four rows of pairs and x stay in the level-1 cache, through which the dictionary's entries stream.
  for (int64_t n = 0; n < t.N; n += kFewBlock) {
    const int64_t rows = smaller(t.N - n, kFewBlock);
    unpack_pairs(t.b, n, rows * pair_bytes(K), t.scratch);
    products[t.M - 1](t, n, rows, t.c + n);
  }
  return true;
}
#else
// Without permutations a row of floats is what costs least.
bool few_sub1(const FewRows&) { return false; }
#endif

}  // namespace
}  // namespace moert::cpu
