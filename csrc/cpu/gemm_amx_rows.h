// Weights that lie along K are the left operand, as they lie, but where K has no whole steps or a tile would reach past
// the last of them.  The rows of x become panels of pairs, and the product comes out transposed.
#pragma once

#include "cpu/gemm_amx.h"

namespace moert::cpu {
namespace {

// The panels of x, [M / kPanel, block / 2, kPanel] pairs of `block` elements along K, and what follows them in scratch.
struct PairPanels {
  Pair* data;
  int64_t count, size;  // size: of a panel
  int64_t block;
  float* sums;  // [N / kSumsEdge, count] blocks of [weight row, row of x]
  Pair* copy;   // of kSumsEdge weight rows
};

// With all rows and columns of a tile there is room for a step along K, and more.
static_assert(kTileRows * kTileColumns + kSumsEdge * kEdge + kEdge * (kTileRows / kSumsEdge + 1) * kStepK <=
              kGemmScratch);

// As many elements along K as there is room for, in equal blocks of whole steps.  What calls with the same a find laid
// out depends on M and K alone: they may have other weights, and other numbers of them.
PairPanels place_panels(const GemmTile& t) {
  const int64_t count = (t.M + kSumsEdge - 1) / kSumsEdge, sums = count * (kTileColumns / kSumsEdge) * kSums;
  const int64_t most = (kGemmScratch - sums - kSumsEdge * kEdge) / (kEdge * (count + 1)) / kStepK * kStepK;
  const int64_t blocks = std::max<int64_t>(1, (t.K + most - 1) / most);
  const int64_t block = std::max(kStepK, ((t.K + blocks - 1) / blocks + kStepK - 1) / kStepK * kStepK);
  const int64_t size = block / 2 * kSumsEdge;
  float* scratch = static_cast<float*>(t.scratch);
  Pair* data = reinterpret_cast<Pair*>(scratch + sums);
  return {data, count, size, block, scratch, data + count * size};
}

// Of two panels or more so many elements along K are multiplied at a time, so that those of x and of a few weight rows
// stay in the level-2 cache.  The level-1 cache does not hold 32 weight rows: where they are 4 KB apart they share a
// set.
constexpr int64_t kNearK = 1024;

// Where rows of weights are read next; nowhere that is known if `weights` is null.
struct NextRows {
  const TileMatrix* weights;
  int64_t row, k;

  Ahead ahead(int64_t lines, int64_t at_once) const {
    if (!weights || weights->index) return {};
    return {reinterpret_cast<const char*>(row_of(*weights, row) + k), weights->row_stride * int64_t(sizeof(bf16)),
            lines, at_once};
  }
};

// One K block of one product, for all rows of x and of the weights.
void add_transposed(const GemmTile& t, const TileMatrix& weights, const PairPanels& x, int64_t k, int64_t K, float* out,
                    bool accumulate, const NextRows& after) {
  // f(n, N, sums) for every kSumsEdge weight rows; sums: of all panels.
  const auto for_weight_rows = [&](const auto& f) {
    for (int64_t n = 0, i = 0; n < t.N; n += kSumsEdge, ++i)
      f(n, std::min(kSumsEdge, t.N - n), x.sums + i * x.count * kSums);
  };
  const auto rows = [&](int64_t p) { return std::min(kSumsEdge, t.M - p * kSumsEdge); };
  const auto c = [&](int64_t p, int64_t n) { return out + p * kSumsEdge * kTileColumns + n; };
  if (accumulate)
    for_weight_rows([&](int64_t n, int64_t N, float* sums) {
      for (int64_t p = 0; p < x.count; ++p)
        transpose_block(c(p, n), kTileColumns, rows(p), sums + p * kSums, kSumsEdge, N);
    });
  const int64_t step = x.count > 1 ? kNearK : std::max(K, kStepK);
  for (int64_t near = 0; near < K || near == 0; near += step) {
    const int64_t part = std::min(step, K - near), steps = (part + kStepK - 1) / kStepK;
    for_weight_rows([&](int64_t n, int64_t N, float* sums) {
      const LeftRows left = left_rows(weights, n, N, k + near, part, x.copy);
      const NextRows next = n + N < t.N       ? NextRows{&weights, n + N, k + near}
                            : near + step < K ? NextRows{&weights, 0, k + near + step}
                                              : after;
      // Every panel brings its part of them: memory is read while all are multiplied.
      Ahead ahead = next.ahead(steps, (kSumsEdge + x.count - 1) / x.count);
      for (int64_t p = 0; p < x.count; ++p)
        with_sums(N, rows(p), [&](auto tiles) {
          near > 0 || accumulate ? tiles.load(sums + p * kSums, kSumsEdge) : tiles.zero();
          add_product(tiles, left, {x.data + p * x.size + near / 2 * kSumsEdge}, steps, ahead);
          tiles.store(sums + p * kSums, kSumsEdge);
        });
    });
  }
  for_weight_rows([&](int64_t n, int64_t N, float* sums) {
    for (int64_t p = 0; p < x.count; ++p)
      transpose_block(sums + p * kSums, kSumsEdge, N, c(p, n), kTileColumns, rows(p));
  });
}

// `ready`: the panels of x are those of the last call with this scratch.
void gemm_weight_rows(const GemmTile& t, bool ready) {
  const PairPanels x = place_panels(t);
  const TileRegisters registers;
  for (int64_t k = 0; k < t.K || k == 0; k += x.block) {
    const int64_t K = std::min(x.block, t.K - k);
    for (int64_t m = 0; m < t.M && !(ready && x.block >= t.K); m += kSumsEdge)
      pack_steps(t.a, m, k, std::min(kSumsEdge, t.M - m), K, x.data + m / kSumsEdge * x.size);
    const bool accumulate = t.accumulate || k > 0;
    const NextRows block = k + K < t.K ? NextRows{&t.b.matrix, 0, k + K} : NextRows{};
    const NextRows second{&t.b2.matrix, 0, k};
    add_transposed(t, t.b.matrix, x, k, K, static_cast<float*>(t.c), accumulate, t.c2 ? second : block);
    if (t.c2) add_transposed(t, t.b2.matrix, x, k, K, static_cast<float*>(t.c2), accumulate, block);
  }
}

}  // namespace
}  // namespace moert::cpu
