// All other products: a block of A is laid out along K, panels of B are pairs as for AVX512-BF16 and lie ready where
// the weights were packed before.
#pragma once

#include <cstring>

#include "cpu/gemm_amx.h"

namespace moert::cpu {
namespace {

// block[m][k / 2] = elements k and k + 1 of column m of `a`, [K, M], zeros up to whole steps.
void transpose_columns(const TileMatrix& a, int64_t K, int64_t M, Pair* block, int64_t pitch, Pair* scratch) {
  const int64_t width = (M + kEdge - 1) / kEdge * kEdge, pairs = (K + 1) / 2, all = (K + kStepK - 1) / kStepK * kEdge;
  interleave_rows(a, 0, K, M, width, scratch, kPitchKM);
  for (int64_t k = pairs; k < all; ++k) std::fill_n(scratch + k * kPitchKM, width, Pair(0));
  for (int64_t k = 0; k < all; k += kEdge)
    for (int64_t m = 0; m < M; m += kEdge) {
      Vec<Pair> rows[kEdge];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kEdge; ++i) rows[i] = load(scratch + (k + i) * kPitchKM + m);
      transpose<kEdge / 2>(rows);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kEdge; ++i) store(block + (m + i) * pitch + k, rows[i]);
    }
}

// One K block of A, [M, K], rows `pitch` pairs apart, zeros up to whole steps.
struct LeftBlock {
  Pair* data;
  int64_t pitch, k, K;

  int64_t steps() const { return (K + kStepK - 1) / kStepK; }
  LeftRows rows(int64_t m) const {
    return {reinterpret_cast<const char*>(data + m * pitch), pitch * int64_t(sizeof(Pair))};
  }
};

void lay_out_left(const GemmTile& t, const LeftBlock& block, Pair* scratch) {
  TileMatrix a = t.a.matrix;
  const int64_t skip = t.a.k_rows ? (a.index ? 0 : block.k * a.row_stride) : block.k * a.col_stride;
  a.data = static_cast<const bf16*>(a.data) + skip;
  if (!t.a.k_rows) return copy_pairs(a, t.M, block.K, kStepK, block.data, block.pitch);
  if (a.index) a.index += block.k;
  transpose_columns(a, block.K, t.M, block.data, block.pitch, scratch);
}

// The right operand of one K block.  Rows along N are laid out for all columns at once: the memory that they lie in is
// read row after row.
class RightBlock {
 public:
  RightBlock(const TileOperand& b, int64_t N, int64_t k, int64_t K, Pair* memory)
      : b_(b), N_(N), k_(k), K_(K), memory_(memory), whole_(b.k_rows && !b.panels) {
    if (!whole_) return;
    const int64_t width = (N + kSumsEdge - 1) / kSumsEdge * kSumsEdge;
    interleave_rows(b.matrix, k, K, N, width, memory, kPitchKM);
    for (int64_t i = pairs(); i < all_pairs(); ++i) std::fill_n(memory + i * kPitchKM, width, Pair(0));
  }

  bool is_whole() const { return whole_; }

  // Columns from n on, kSumsEdge or all of them, zeros from N on.
  RightPairs columns(int64_t n) const {
    if (whole_) return {memory_ + n, kPitchKM};
    if (!b_.panels) {
      pack_steps(b_, n, k_, std::min(kSumsEdge, N_ - n), K_, memory_);
      return {memory_};
    }
    const Pair* ready = lying_pairs(b_, n, k_);
    if (K_ % kStepK == 0) return {ready};
    std::memcpy(memory_, ready, size_t(pairs() * kSumsEdge) * sizeof(Pair));
    std::fill(memory_ + pairs() * kSumsEdge, memory_ + all_pairs() * kSumsEdge, Pair(0));
    return {memory_};
  }

 private:
  int64_t pairs() const { return (K_ + 1) / 2; }
  int64_t all_pairs() const { return (K_ + kStepK - 1) / kStepK * kEdge; }

  const TileOperand& b_;
  int64_t N_, k_, K_;
  Pair* memory_;
  bool whole_;
};

// c [M, kSumsEdge] (+)= left . right.
void add_block(const LeftRows& left, const RightPairs& right, Ahead& ahead, int64_t M, int64_t steps, float* c,
               bool accumulate) {
  alignas(64) float padded[kSumsEdge * kSumsEdge];  // where a tile would reach past the rows of c
  const bool whole = M % kEdge == 0;
  float* sums_at = whole ? c : padded;
  const int64_t pitch = whole ? kTileColumns : kSumsEdge;
  if (accumulate && !whole)
    for (int64_t i = 0; i < M; ++i) std::copy_n(c + i * kTileColumns, kSumsEdge, padded + i * kSumsEdge);
  with_sums(M, kSumsEdge, [&](auto sums) {
    accumulate ? sums.load(sums_at, pitch) : sums.zero();
    add_product(sums, left, right, steps, ahead);
    sums.store(sums_at, pitch);
  });
  if (!whole)
    for (int64_t i = 0; i < M; ++i) std::copy_n(padded + i * kSumsEdge, kSumsEdge, c + i * kTileColumns);
}

// Of weights that lie in panels, what is multiplied after the panel of column n: it is fetched while M rows are
// multiplied by that.
Ahead next_panel(const GemmTile& t, const TileOperand& b, const LeftBlock& block, int64_t n) {
  constexpr int64_t kLines = kEdge * kSumsEdge * int64_t(sizeof(Pair)) / 64;  // of a step
  const bool last = n + kSumsEdge >= t.N, first_product = &b == &t.b;
  if (!b.panels || (last && !(first_product && t.c2))) return {};
  const TileMatrix& next = last ? t.b2.matrix : b.matrix;
  const bf16* panel = static_cast<const bf16*>(next.data) + (last ? 0 : (n + kSumsEdge) * next.row_stride);
  const int64_t blocks = (t.M + kSumsEdge - 1) / kSumsEdge;
  return {reinterpret_cast<const char*>(panel + block.k * kSumsEdge), 0, block.steps() * kLines,
          (kLines + blocks - 1) / blocks};
}

// One K block of one product.  Where all columns are laid out, rows are finished in one piece, which memory prefers.
void add_panels(const GemmTile& t, const TileOperand& b, const LeftBlock& block, Pair* memory, float* c,
                bool accumulate) {
  const RightBlock right(b, t.N, block.k, block.K, memory);
  const StoreTile* finish = block.k + block.K >= t.K && c == t.c ? t.finish : nullptr;
  const int64_t width = right.is_whole() ? t.N : kSumsEdge;
  for (int64_t first = 0; first < t.N; first += width) {
    const int64_t end = std::min(first + width, t.N);
    const RightPairs columns = right.columns(first);
    Ahead ahead = next_panel(t, b, block, first);
    for (int64_t m = 0; m < t.M; m += kSumsEdge) {
      const int64_t M = std::min(kSumsEdge, t.M - m);
      for (int64_t n = first; n < end; n += kSumsEdge)
        add_block(block.rows(m), {columns.data + n - first, columns.pitch}, ahead, M, block.steps(),
                  c + m * kTileColumns + n, accumulate);
      if (finish) finish_part<float>(*finish, m, first, M, end - first);
    }
  }
}

// Elements along K in one block.  Where panels lie ready, as many as there is room for: memory is then read in its
// order, panel after panel.
int64_t block_of_k(const GemmTile& t) {
  if (!t.b.panels || t.a.k_rows) return 2 * kTileK;
  const int64_t rows = (t.M + kSumsEdge - 1) / kSumsEdge * kSumsEdge;
  return (kTileBlock / rows - kEdge) * 2 / kStepK * kStepK;
}
static_assert((kTileBlock / kTileRows - kEdge) * 2 == 2 * kTileK && 2 * kTileBlock <= kGemmScratch);

void gemm_tile_panels(const GemmTile& t) {
  Pair *data = static_cast<Pair*>(t.scratch), *memory = data + kTileBlock;
  const TileRegisters registers;
  const int64_t most = block_of_k(t), pitch = most / 2 + kEdge;
  for (int64_t k = 0, K; k < t.K || k == 0; k += std::max<int64_t>(K, 1)) {
    K = std::min(most, t.K - k);
    if (t.b.panels && K > kStepK) K -= K % kStepK;  // a panel of whole steps is multiplied where it lies
    const LeftBlock block{data, pitch, k, K};
    lay_out_left(t, block, memory);
    add_panels(t, t.b, block, memory, static_cast<float*>(t.c), t.accumulate || k > 0);
    if (t.c2) add_panels(t, t.b2, block, memory, static_cast<float*>(t.c2), t.accumulate || k > 0);
  }
}

}  // namespace
}  // namespace moert::cpu
