// All other products: a block of A is laid out along K, panels of B are pairs as for AVX512-BF16 and lie ready where
// the weights were packed before.
#pragma once

#include "cpu/gemm_amx.h"

namespace moert::cpu {
namespace {

// block[m][k / 2] = elements k and k + 1 of column m of `a`, [K, M], zeros up to whole steps.
void transpose_columns(const TileMatrix& a, int64_t K, int64_t M, Pair* block, Pair* scratch) {
  const int64_t width = (M + kEdge - 1) / kEdge * kEdge, pairs = (K + 1) / 2, all = (K + kStep - 1) / kStep * kEdge;
  interleave_rows(a, 0, K, M, width, scratch, kPitchKM);
  for (int64_t k = pairs; k < all; ++k) std::fill_n(scratch + k * kPitchKM, width, Pair(0));
  for (int64_t k = 0; k < all; k += kEdge)
    for (int64_t m = 0; m < M; m += kEdge) {
      Vec<Pair> rows[kEdge];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kEdge; ++i) rows[i] = load(scratch + (k + i) * kPitchKM + m);
      transpose<kEdge / 2>(rows);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kEdge; ++i) store(block + (m + i) * kPitchMK + k, rows[i]);
    }
}

// The block of A from k on, [M, K] with rows kPitchMK apart, zeros up to whole steps.
void lay_out_left(const GemmTile& t, int64_t k, int64_t K, Pair* block, Pair* scratch) {
  TileMatrix a = t.a.matrix;
  const int64_t skip = t.a.k_rows ? (a.index ? 0 : k * a.row_stride) : k * a.col_stride;
  a.data = static_cast<const bf16*>(a.data) + skip;
  if (!t.a.k_rows) return copy_pairs(a, t.M, K, kStep, block, kPitchMK);
  if (a.index) a.index += k;
  transpose_columns(a, K, t.M, block, scratch);
}

// The panel of columns [n, n + N): where it lies, or in `panel`.
const Pair* right_panel(const TileOperand& b, int64_t n, int64_t k, int64_t N, int64_t K, Pair* panel) {
  if (!b.panels) {
    pack_steps(b, n, k, N, K, panel);
    return panel;
  }
  const Pair* ready = ready_panel(b, n, k, K, panel);
  if (K % kStep == 0) return ready;
  const int64_t pairs = (K + 1) / 2, all = (K + kStep - 1) / kStep * kEdge;
  std::copy_n(ready, pairs * kSumsEdge, panel);
  std::fill(panel + pairs * kSumsEdge, panel + all * kSumsEdge, Pair(0));
  return panel;
}

// One K block of one product.
void add_panels(const GemmTile& t, const TileOperand& b, const Pair* block, int64_t k, int64_t K, Pair* panel, float* c,
                bool accumulate) {
  const StoreTile* finish = k + K >= t.K && c == t.c ? t.finish : nullptr;
  const int64_t steps = (K + kStep - 1) / kStep;
  alignas(64) float padded[kSumsEdge * kSumsEdge];  // where a tile would reach past the rows of c
  for (int64_t n = 0; n < t.N; n += kSumsEdge) {
    const int64_t N = std::min(kSumsEdge, t.N - n);
    const Pair* columns = right_panel(b, n, k, N, K, panel);
    for (int64_t m = 0; m < t.M; m += kSumsEdge) {
      const int64_t M = std::min(kSumsEdge, t.M - m);
      float* out = c + m * kTileColumns + n;
      const bool whole = M % kEdge == 0;
      float* sums_at = whole ? out : padded;
      const int64_t pitch = whole ? kTileColumns : kSumsEdge;
      if (accumulate && !whole)
        for (int64_t i = 0; i < M; ++i) std::copy_n(out + i * kTileColumns, kSumsEdge, padded + i * kSumsEdge);
      with_sums(M, kSumsEdge, [&](auto sums) {
        accumulate ? sums.load(sums_at, pitch) : sums.zero();
        sums.add({reinterpret_cast<const char*>(block + m * kPitchMK), kPitchMK * int64_t(sizeof(Pair))}, columns,
                 steps, false);
        sums.store(sums_at, pitch);
      });
      if (!whole)
        for (int64_t i = 0; i < M; ++i) std::copy_n(padded + i * kSumsEdge, kSumsEdge, out + i * kTileColumns);
      if (finish) finish_part<float>(*finish, m, n, M, N);
    }
  }
}

void gemm_tile_panels(const GemmTile& t) {
  constexpr int64_t kBlockK = 2 * kTileK;
  static_assert(2 * kTileBlock + kSumsEdge * kTileK <= kGemmScratch);
  Pair *block = static_cast<Pair*>(t.scratch), *panel = block + kTileBlock, *scratch = panel + kSumsEdge * kTileK;
  const TileRegisters registers;
  for (int64_t k = 0; k < t.K || k == 0; k += kBlockK) {
    const int64_t K = std::min(kBlockK, t.K - k);
    lay_out_left(t, k, K, block, scratch);
    add_panels(t, t.b, block, k, K, panel, static_cast<float*>(t.c), t.accumulate || k > 0);
    if (t.c2) add_panels(t, t.b2, block, k, K, panel, static_cast<float*>(t.c2), t.accumulate || k > 0);
  }
}

}  // namespace
}  // namespace moert::cpu
