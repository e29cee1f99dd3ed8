// A block of weight rows that are multiplied by a few rows of x.
#pragma once

#include "cpu/packed_scales.h"

namespace moert::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kBlock = 4, kBlockM = 4;
#elif defined(__AVX2__)
constexpr int kBlock = 4, kBlockM = 2;
#else
constexpr int kBlock = 2, kBlockM = 2;
#endif
// Of codes that are kTransposed, where they fit a level-1 cache.
#if defined(__AVX512VNNI__)
constexpr int kGroupM = 8;
#else
constexpr int kGroupM = kVectorBytes > 16 ? 4 : kBlockM;
#endif

// Rows of x that share what was unpacked of a weight row.
template <typename Code>
constexpr int kRowsOfX = kTransposed<Code> ? kGroupM : kBlockM;

// Of many rows there are kernels for even numbers alone, or the build takes too long.
constexpr int rows_of_kernel(int m) { return m > kBlockM ? (m + 1) / 2 * 2 : m; }

// What becomes of the integer sums of a step.
enum class Scales {
  none,         // added up along the row: one scale a row of either side
  activations,  // times the scales of the activations
  both          // times those of the weights, too
};

// A quantized row: its data and its scales.
struct DotRow {
  const char* data;
  const float* scales;
};

struct DotBlock {
  int64_t rows;  // of the weights, at most kBlock; codes repeat the last, and what their scales are does not matter
  const uint8_t* codes[kBlock];
  int64_t vector;        // bytes from one of a code's kVectors to the next
  int64_t last;          // bytes of the last step (or block of steps) that are the row's; 0: it is a whole one
  int shift;             // 2^shift columns have one scale of the weights
  int code_shift;        // sums of codes are shifted by it before the bias is added
  const float* scales;   // [rows, pitch]
  const int32_t* zeros;  // [rows, pitch]
  int64_t pitch, ahead;  // ahead: bytes to what is prefetched
  RowLayout layout;
};

// Up to two rows of x are multiplied by one weight row after the other, where four beside one another are read more
// slowly: with vectors of AVX2 by a fifth (measured on a Zen 3 alone).
template <int M>
constexpr bool kInOrder = kVectorBytes == 32 && M <= 2;

// Bytes to what is prefetched: one row after the other is a stream, and of several rows at a time the same columns of
// later blocks come next.
template <int R>
MOERT_INLINE int64_t bytes_ahead(const DotBlock& b) {
  return R == 1 ? kAheadBytes / 2 : b.ahead;
}

// c[m, r], m < M, at most `rows` of the latter, from lanes that were scaled so far.
template <typename V>
void store_block(const DotBlock& b, const DotRow* x, int64_t M, const V (*sums)[kBlock], Scales scaled, float* c) {
  using Sum = std::remove_cv_t<std::remove_reference_t<decltype(sums[0][0][0])>>;
  for (int64_t m = 0; m < M; ++m) {
    Sum total[4];
    if constexpr (kBlock == 4)
      add_lanes_of_four<Sum>(sums[m], total, false);
    else
      for (int r = 0; r < kBlock; ++r) total[r] = sum_lanes(sums[m][r]);
    for (int r = 0; r < b.rows; ++r) {
      float y = float(total[r]);
      if (scaled != Scales::both) y *= b.scales[r * b.pitch];
      if (scaled == Scales::none) y *= x[m].scales[0];
      c[m * kTileColumns + r] = y;
    }
  }
}

}  // namespace
}  // namespace moert::cpu
