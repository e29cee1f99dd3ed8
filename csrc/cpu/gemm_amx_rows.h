// Weights that lie along K are the left operand, as they lie: they are read once and never laid out anew.  The rows of
// x become panels of pairs, and the product comes out transposed.
#pragma once

#include "cpu/gemm_amx.h"

namespace moert::cpu {
namespace {

// Where one product's sums go: rows of c are rows of x, columns are weight rows.
struct Transposed {
  const TileMatrix& weights;
  float* c;
};

// Elements along K at a time: the panels of all rows of x and a block of copied weights lie in the scratch.
int64_t steps_k(int64_t panels, int64_t K) {
  const int64_t most = (kGemmScratch - kSumsEdge * kEdge) / (kEdge * (panels + 1)) / kStep * kStep;
  const int64_t blocks = std::max<int64_t>(1, (K + most - 1) / most);
  return std::max(kStep, ((K + blocks - 1) / blocks + kStep - 1) / kStep * kStep);
}

// Weight rows [n, n + N), N <= kSumsEdge, for the kernel: as they lie, or where a tile would reach past them a copy
// with zeros around it.
LeftRows left_rows(const TileMatrix& w, int64_t n, int64_t N, int64_t k, int64_t K, Pair* copy) {
  TileMatrix from = w;
  from.data = static_cast<const bf16*>(w.data) + k * w.col_stride;
  if (!w.index && N % kEdge == 0 && K % kStep == 0)
    return {reinterpret_cast<const char*>(row_of(from, n)), w.row_stride * int64_t(sizeof(bf16))};
  if (w.index)
    from.index += n;
  else
    from.data = row_of(from, n);
  const int64_t pitch = (K + kStep - 1) / kStep * kEdge + kEdge;
  copy_pairs(from, N, K, kStep, copy, pitch);
  std::fill(copy + N * pitch, copy + (N + kEdge - 1) / kEdge * kEdge * pitch, Pair(0));
  return {reinterpret_cast<const char*>(copy), pitch * int64_t(sizeof(Pair))};
}

// All weight rows of one K block with all rows of x.
void add_transposed(const GemmTile& t, const Transposed& product, const Pair* panels, int64_t panel_size, int64_t k,
                    int64_t K, Pair* copy, bool accumulate) {
  const int64_t steps = (K + kStep - 1) / kStep;
  alignas(64) float block[kSumsEdge * kSumsEdge];
  for (int64_t n = 0; n < t.N; n += kSumsEdge) {
    const int64_t N = std::min(kSumsEdge, t.N - n);
    const LeftRows left = left_rows(product.weights, n, N, k, K, copy);
    const bool more = n + kSumsEdge < t.N;
    for (int64_t m = 0; m < t.M; m += kSumsEdge) {
      const int64_t M = std::min(kSumsEdge, t.M - m);
      float* c = product.c + m * kTileColumns + n;
      with_sums(N, M, [&](auto sums) {
        if (accumulate) {
          transpose_block(c, kTileColumns, M, block, kSumsEdge, N);
          sums.load(block, kSumsEdge);
        } else {
          sums.zero();
        }
        sums.add(left, panels + m / kSumsEdge * panel_size, steps, more && m == 0);
        sums.store(block, kSumsEdge);
      });
      transpose_block(block, kSumsEdge, N, c, kTileColumns, M);
    }
  }
}

void gemm_weight_rows(const GemmTile& t) {
  const int64_t panels = (t.M + kSumsEdge - 1) / kSumsEdge, block = steps_k(panels, t.K);
  const int64_t panel_size = block / 2 * kSumsEdge;
  Pair *x = static_cast<Pair*>(t.scratch), *copy = x + panels * panel_size;
  const TileRegisters registers;
  for (int64_t k = 0; k < t.K || k == 0; k += block) {
    const int64_t K = std::min(block, t.K - k);
    for (int64_t p = 0; p < panels; ++p)
      pack_steps(t.a, p * kSumsEdge, k, std::min(kSumsEdge, t.M - p * kSumsEdge), K, x + p * panel_size);
    const bool accumulate = t.accumulate || k > 0;
    add_transposed(t, {t.b.matrix, static_cast<float*>(t.c)}, x, panel_size, k, K, copy, accumulate);
    if (t.c2) add_transposed(t, {t.b2.matrix, static_cast<float*>(t.c2)}, x, panel_size, k, K, copy, accumulate);
  }
}

}  // namespace
}  // namespace moert::cpu
