// Rows of bf16 or f16 on tensor cores: the codes become bf16 or f16 in registers, exactly, and every span of 32 columns
// is multiplied from zero on and then scaled in float32.
#pragma once

#include "cuda/packed_product_mma.cuh"

namespace moert::cuda {

template <typename T>
struct MmaFor;
template <>
struct MmaFor<bf16> {
  using Type = MmaBf16;
};
template <>
struct MmaFor<f16> {
  using Type = MmaF16;
};

template <class Codes, typename T>
struct FloatRows {
  using Sum = float;
  static constexpr int kColumns = step_columns(Codes::kFormat), kSpans = kColumns / kSpanColumns;
  static constexpr int kElement = 2, kStepBytes = 2 * kColumns, kPieces = kStepBytes / 16;

  // The two rows that eight lanes read share no bank: of 128 columns half a 128-byte line is exchanged in every second
  // row.
  template <class Shape>
  MOERT_DEVICE_INLINE static int place(int row, int piece) {
    return row * kPieces + (kPieces == 16 ? piece ^ row % 2 * 4 : piece);
  }

  // sums += the products of one step.
  template <class Shape, class Weights>
  MOERT_DEVICE_INLINE static void multiply_step(const Weights& weights, const char* x, const char* codes, int step,
                                                const uint32_t (&scales)[Shape::kTiles][2], int rows,
                                                float (&sums)[Shape::kTiles][Shape::kTokens / 8][4]) {
#pragma unroll(Shape::kUnrolled ? kSpans : 1)
    for (int span = 0; span < kSpans; ++span)
#pragma unroll Weights::kTermsTogether
      for (int term = 0; term < weights.template terms<T>(); ++term)
        multiply_span<Shape>(weights, x, codes, step, span, term, scales, rows, sums);
  }

  template <class Shape, class Weights>
  MOERT_DEVICE_INLINE static void multiply_span(const Weights& weights, const char* x, const char* codes, int step,
                                                int span, int term, const uint32_t (&scales)[Shape::kTiles][2],
                                                int rows, float (&sums)[Shape::kTiles][Shape::kTokens / 8][4]) {
    using Mma = typename MmaFor<T>::Type;
    const int g = lane_id() / 4, t = lane_id() % 4;
    // Decode
    uint32_t a[Shape::kTiles][2][4];
    float scale[Shape::kTiles][2];
#pragma unroll
    for (int i = 0; i < Shape::kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bits = of_span(scales[i][half], span);
        scale[i][half] = weights.template scale<T>(term, half, step, span, bits);
        weights.template pairs<T>(term, codes, 16 * i + 8 * half + g, span, bits, a[i][half]);
      }
    // Multiply
#pragma unroll
    for (int first = 0; first < Shape::kTokens / 8; first += Shape::kBeside) {
      if (first > 0 && first * 8 >= rows) break;
      Chunk b[Shape::kBeside];
#pragma unroll
      for (int n = 0; n < Shape::kBeside; ++n)
        b[n] = load_chunk(x + place<Shape>((first + n) * 8 + g, span * 4 + t) * 16);
#pragma unroll
      for (int i = 0; i < Shape::kTiles; ++i) {
        float c[Shape::kBeside][4] = {};
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int n = 0; n < Shape::kBeside; ++n)
            Mma::fma(c[n][0], c[n][1], c[n][2], c[n][3], a[i][0][2 * k], a[i][1][2 * k], a[i][0][2 * k + 1],
                     a[i][1][2 * k + 1], b[n].words[2 * k], b[n].words[2 * k + 1], c[n][0], c[n][1], c[n][2], c[n][3]);
#pragma unroll
        for (int n = 0; n < Shape::kBeside; ++n)
#pragma unroll
          for (int v = 0; v < 4; ++v) sums[i][first + n][v] += scale[i][v / 2] * c[n][v];
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
