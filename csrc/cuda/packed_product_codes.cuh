// Rows of codes on tensor cores: products of integers, whose sums are exact, or of e4m3.
#pragma once

#include "cuda/packed_product_mma.cuh"

namespace moert::cuda {

// A float32 beside which the bits of an integer of 22 bits and a sign are that integer: the conversion is one
// subtraction.  A span's sum has at most 2^19.
constexpr uint32_t kIntegerBits = 0x4b400000u;  // 2^23 + 2^22

// How they lie: the codes as FloatRows has its elements, then the scales of all rows.
template <class Codes>
struct CodeRows {
  static constexpr CodeStep kStep{step_columns(Codes::kFormat)};
  static constexpr int kSpans = kStep.spans(), kPairs = (kSpans + 1) / 2;
  static constexpr int kElement = 1, kStepBytes = kStep.bytes(), kPieces = kStepBytes / 16, kCodePieces = kPieces - 1;

  template <class Shape>
  MOERT_DEVICE_INLINE static int place(int row, int piece) {
    if (piece == kCodePieces) return Shape::kTokens * kCodePieces + row;
    return row * kCodePieces + (kCodePieces == 8 ? piece ^ row % 2 * 4 : piece);
  }
};

// kWhole: the scale of a weight row is one, and that of a row of x; their sum is an integer to the end.  Else every
// span is, and is then scaled in float32.
template <class Codes, bool kWhole>
struct Int8Rows : CodeRows<Codes> {
  using Sum = std::conditional_t<kWhole, uint32_t, float>;
  using Layout = CodeRows<Codes>;
  static constexpr int kSpans = Layout::kSpans, kPairs = Layout::kPairs, kCodePieces = Layout::kCodePieces;

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
      const Chunk b = load_chunk(x + Layout::template place<Shape>(n * 8 + g, pair * 4 + t) * 16);
      float2 x_scale[2] = {};
      if constexpr (!kWhole) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const char* from = x + Layout::template place<Shape>(n * 8 + 2 * t + v, kCodePieces) * 16;
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
        x_scale[v] = *reinterpret_cast<const float*>(row + Layout::kStep.code_bytes());
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

// c += the product of 16 rows and 8 tokens over 32 columns of e4m3.  Tensor cores that multiply it as it is (sm_89,
// sm_120) add with fewer bits than float32 has, which is why no sum is longer than a group.  nvcc 13.0 makes products
// of float16 of it on sm_90a and sm_100a, as are written out for sm_80: fp8 has the speed of 16 bits there.
MOERT_DEVICE_INLINE void multiply_e4m3(const uint32_t (&row0)[2], const uint32_t (&row8)[2], uint32_t b0, uint32_t b1,
                                       float (&c)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(row0[0]), "r"(row8[0]), "r"(row0[1]), "r"(row8[1]), "r"(b0), "r"(b1));
#else
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    uint32_t upper[2], lower[2], b[2];
    e4m3_pairs<f16>(row0[k], upper);
    e4m3_pairs<f16>(row8[k], lower);
    e4m3_pairs<f16>(k ? b1 : b0, b);
    MmaF16::fma(c[0], c[1], c[2], c[3], upper[0], lower[0], upper[1], lower[1], b[0], b[1], c[0], c[1], c[2], c[3]);
  }
#endif
}

// e4m3 rows and weights: a step is a group of both, scaled once.
struct E4m3Rows : CodeRows<Fp8Fragments> {
  using Sum = float;
  using Layout = CodeRows<Fp8Fragments>;
  static_assert(step_columns(Format::fp8) == kFp8Block);

  template <class Shape, class Weights>
  MOERT_DEVICE_INLINE static void multiply_step(const Weights&, const char* x, const char* codes, int,
                                                const uint32_t (&scales)[Shape::kTiles][2], int rows,
                                                float (&sums)[Shape::kTiles][Shape::kTokens / 8][4]) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    uint32_t a[Shape::kTiles][2][Layout::kSpans][2];
#pragma unroll
    for (int i = 0; i < Shape::kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int span = 0; span < Layout::kSpans; ++span)
          Fp8Fragments::load(codes, 16 * i + 8 * half + g, span, t, a[i][half][span]);
#pragma unroll
    for (int n = 0; n < Shape::kTokens / 8; ++n) {
      if (n % 4 == 0 && n > 0 && n * 8 >= rows) break;
      Chunk b[Layout::kPairs];
      float x_scale[2];
#pragma unroll
      for (int pair = 0; pair < Layout::kPairs; ++pair)
        b[pair] = load_chunk(x + Layout::template place<Shape>(n * 8 + g, pair * 4 + t) * 16);
#pragma unroll
      for (int v = 0; v < 2; ++v)
        x_scale[v] = *reinterpret_cast<const float*>(
            x + Layout::template place<Shape>(n * 8 + 2 * t + v, Layout::kCodePieces) * 16);
#pragma unroll
      for (int i = 0; i < Shape::kTiles; ++i) {
        float c[4] = {};
#pragma unroll
        for (int span = 0; span < Layout::kSpans; ++span)
          multiply_e4m3(a[i][0][span], a[i][1][span], b[span / 2].words[span % 2 * 2],
                        b[span / 2].words[span % 2 * 2 + 1], c);
#pragma unroll
        for (int v = 0; v < 4; ++v) sums[i][n][v] += c[v] * (Fp8Fragments::scale(scales[i][v / 2]) * x_scale[v % 2]);
      }
    }
  }

  template <class Shape, class Weights>
  MOERT_DEVICE_INLINE static void finish(const PackedProduct<float>&, const RowTile&, const Weights&,
                                         const float (&sums)[Shape::kTiles][Shape::kTokens / 8][4],
                                         float (&out)[Shape::kTiles][Shape::kTokens / 8][4]) {
    copy_sums<Shape>(sums, out);
  }
};

}  // namespace moert::cuda
