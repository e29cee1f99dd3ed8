// Products of bfloat16 in tile registers.  One holds 16 rows of 64 bytes; one instruction adds the product of 16 rows
// by 32 elements along K and 32 by 16 columns to 16 x 16 sums, one after the other along K, so that the bits of a sum
// depend on nothing but its row and its column.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/gemm_panels.h"

namespace moert::cpu {
namespace {

constexpr int64_t kStepK = 32;  // elements along K in one product
static_assert(kSumsEdge == kPanel<Pair>);

// The left operand: bfloat16 along K, rows `pitch` bytes apart.
struct LeftRows {
  const char* data;
  int64_t pitch;
};

// The right one: [K / 2, kSumsEdge] pairs, rows `pitch` pairs apart.
struct RightPairs {
  const Pair* data;
  int64_t pitch = kSumsEdge;
};

// sums += left . right.
template <int R, int C>
void add_product(Sums<R, C>, const LeftRows& left, const RightPairs& right, int64_t steps, Ahead& ahead) {
  before_tile_loads();
  const char* row = left.data;
  const Pair* pairs = right.data;
  for (int64_t i = 0; i < steps; ++i, row += 4 * kEdge, pairs += kEdge * right.pitch) {
    _tile_loadd(6, pairs, 4 * right.pitch);
    if constexpr (C > 1) _tile_loadd(7, pairs + kEdge, 4 * right.pitch);
    _tile_loadd(4, row, left.pitch);
    if constexpr (R > 1) _tile_loadd(5, row + kEdge * left.pitch, left.pitch);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
    ahead.fetch();
  }
}

// out[j][i] = in[i][j], i < rows, j < columns, both up to kSumsEdge.  out is written in whole vectors.
void transpose_block(const float* in, int64_t in_pitch, int64_t rows, float* out, int64_t out_pitch, int64_t columns) {
  for (int64_t r = 0; r < rows; r += kEdge)
    for (int64_t c = 0; c < columns; c += kEdge) {
      VecF lanes[kEdge];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kEdge; ++i) lanes[i] = r + i < rows ? load(in + (r + i) * in_pitch + c) : VecF{};
      transpose<kEdge / 2>(lanes);
#pragma GCC unroll 16
      for (int64_t j = 0; j < kEdge; ++j)
        if (c + j < columns) store(out + (c + j) * out_pitch + r, lanes[j]);
    }
}

// Rows [r, r + R), R <= kSumsEdge, of a matrix along K, as they lie, or where tiles would reach past them a copy with
// zeros around it.
LeftRows left_rows(const TileMatrix& in, int64_t r, int64_t R, int64_t k, int64_t K, Pair* copy) {
  TileMatrix from = in;
  from.data = static_cast<const bf16*>(in.data) + k * in.col_stride;
  if (!in.index && in.col_stride == 1 && R % kEdge == 0 && K % kStepK == 0)
    return {reinterpret_cast<const char*>(row_of(from, r)), in.row_stride * int64_t(sizeof(bf16))};
  if (in.index)
    from.index += r;
  else
    from.data = row_of(from, r);
  const int64_t pitch = (K + kStepK - 1) / kStepK * kEdge + kEdge;
  copy_pairs(from, R, K, kStepK, copy, pitch);
  std::fill(copy + R * pitch, copy + (R + kEdge - 1) / kEdge * kEdge * pitch, Pair(0));
  return {reinterpret_cast<const char*>(copy), pitch * int64_t(sizeof(Pair))};
}

// The panel of pairs (n, k), zeros up to a whole step.
void pack_steps(const TileOperand& operand, int64_t n, int64_t k, int64_t N, int64_t K, Pair* panel) {
  pack_panel(operand, n, k, N, K, panel);
  const int64_t rows = (K + 1) / 2, all = (K + kStepK - 1) / kStepK * kEdge;
  std::fill(panel + rows * kPanel<Pair>, panel + all * kPanel<Pair>, Pair(0));
}

}  // namespace
}  // namespace moert::cpu
