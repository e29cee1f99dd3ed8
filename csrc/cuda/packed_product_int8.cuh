// Rows of int8 on tensor cores: products of integers, whose sums are exact.
#pragma once

#include "cuda/packed_product_mma.cuh"

namespace moert::cuda {

// A float32 beside which the bits of an integer of 22 bits and a sign are that integer: the conversion is one
// subtraction.  A span's sum has at most 2^19.
constexpr uint32_t kIntegerBits = 0x4b400000u;  // 2^23 + 2^22

// kWhole: the scale of a weight row is one, and that of a row of x; their sum is an integer to the end.  Else every
// span is, and is then scaled in float32.
template <class Codes, bool kWhole>
struct Int8Rows {
  using Sum = std::conditional_t<kWhole, uint32_t, float>;
  static constexpr Int8Step kStep{step_columns(Codes::kFormat)};
  static constexpr int kSpans = kStep.spans(), kPairs = (kSpans + 1) / 2;
  static constexpr int kElement = 1, kStepBytes = kStep.bytes(), kPieces = kStepBytes / 16, kCodePieces = kPieces - 1;

  // The codes as FloatRows have theirs, then the scales of all rows.
  template <class Shape>
  MOERT_DEVICE_INLINE static int place(int row, int piece) {
    if (piece == kCodePieces) return Shape::kTokens * kCodePieces + row;
    return row * kCodePieces + (kCodePieces == 8 ? piece ^ row % 2 * 4 : piece);
  }

  // sums += the products of one step.
  template <class Shape, class Weights>
  MOERT_DEVICE_INLINE static void multiply_step(const Weights&, const char* x, const char* codes, int,
                                                const uint32_t (&scales)[Shape::kTiles][2], int rows,
                                                Sum (&sums)[Shape::kTiles][Shape::kTokens / 8][4]) {
#pragma unroll(Shape::kUnrolled ? kPairs : 1)
    for (int pair = 0; pair < kPairs; ++pair) multiply_pair<Shape>(x, codes, pair, scales, rows, sums);
  }

  // Of spans 2 pair and the next.
  template <class Shape>
  MOERT_DEVICE_INLINE static void multiply_pair(const char* x, const char* codes, int pair,
                                                const uint32_t (&scales)[Shape::kTiles][2], int rows,
                                                Sum (&sums)[Shape::kTiles][Shape::kTokens / 8][4]) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    const auto is_there = [&](int i) { return kSpans % 2 == 0 || 2 * pair + i < kSpans; };
    // Decode
    uint32_t a[Shape::kTiles][2][2][2] = {};
    float w_scale[Shape::kTiles][2][2] = {};
#pragma unroll
    for (int i = 0; i < Shape::kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const uint32_t bits = kWhole ? 0 : of_span(scales[i][half], 2 * pair + s);
          if constexpr (!kWhole) w_scale[i][half][s] = Codes::int8_scale(bits);
          if (is_there(s)) Codes::bytes(codes, 16 * i + 8 * half + g, 2 * pair + s, t, bits, a[i][half][s]);
        }
    // Multiply
#pragma unroll
    for (int n = 0; n < Shape::kTokens / 8; ++n) {
      if (n % 4 == 0 && n > 0 && n * 8 >= rows) break;
      const Chunk b = load_chunk(x + place<Shape>(n * 8 + g, pair * 4 + t) * 16);
      float2 x_scale[2] = {};
      if constexpr (!kWhole) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const char* from = x + place<Shape>(n * 8 + 2 * t + v, kCodePieces) * 16;
          x_scale[v] = reinterpret_cast<const float2*>(from)[pair];
        }
      }
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int i = 0; i < Shape::kTiles; ++i)
          if (is_there(s))
            add_span(a[i][0][s], a[i][1][s], b.words[2 * s], b.words[2 * s + 1], w_scale[i][0][s], w_scale[i][1][s],
                     s ? x_scale[0].y : x_scale[0].x, s ? x_scale[1].y : x_scale[1].x, sums[i][n]);
    }
  }

  MOERT_DEVICE_INLINE static void add_span(const uint32_t (&row0)[2], const uint32_t (&row8)[2], uint32_t b0,
                                           uint32_t b1, float w0, float w8, float x0, float x1, Sum (&sums)[4]) {
    if constexpr (kWhole) {
      MmaInt8::fma(sums[0], sums[1], sums[2], sums[3], row0[0], row8[0], row0[1], row8[1], b0, b1, sums[0], sums[1],
                   sums[2], sums[3]);
    } else {
      const uint32_t none = kIntegerBits;
      uint32_t c[4];
      MmaInt8::fma(c[0], c[1], c[2], c[3], row0[0], row8[0], row0[1], row8[1], b0, b1, none, none, none, none);
#pragma unroll
      for (int v = 0; v < 4; ++v)
        sums[v] += (bits_to_float(c[v]) - bits_to_float(none)) * ((v < 2 ? w0 : w8) * (v % 2 ? x1 : x0));
    }
  }

  // The scales of whole rows, as a CPU multiplies them.
  template <class Shape, class Weights>
  MOERT_DEVICE_INLINE static void finish(const PackedProduct<float>& p, const RowTile& tile, const Weights& weights,
                                         const Sum (&sums)[Shape::kTiles][Shape::kTokens / 8][4],
                                         float (&out)[Shape::kTiles][Shape::kTokens / 8][4]) {
    uint32_t bits[Shape::kTiles][2];
    if constexpr (kWhole) weights.read_scales(0, bits);
#pragma unroll
    for (int n = 0; n < Shape::kTokens / 8; ++n) {
      float x_scale[2] = {};
#pragma unroll
      for (int v = 0; kWhole && v < 2; ++v) {
        const int token = n * 8 + 2 * (lane_id() % 4) + v, s = tile.row + token;
        if (token >= tile.rows || p.x_stride == 0) continue;  // 0: rows without columns
        const char* row = static_cast<const char*>(p.x) + (p.index ? p.index[s] : s) * p.x_stride;
        x_scale[v] = *reinterpret_cast<const float*>(row + kStep.code_bytes());
      }
#pragma unroll
      for (int i = 0; i < Shape::kTiles; ++i)
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          if constexpr (kWhole)
            out[i][n][v] = float(int32_t(sums[i][n][v])) * Codes::int8_scale(bits[i][v / 2]) * x_scale[v % 2];
          else
            out[i][n][v] = sums[i][n][v];
        }
    }
  }
};

}  // namespace moert::cuda
