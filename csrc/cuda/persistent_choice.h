// Which tiles the persistent grouped GEMM takes, from sizes that the host knows.  Nothing here has been measured by
// this project: the thresholds follow from bytes and operations, and from what others have published.
#pragma once

#include "cuda/expert_tiles.h"

namespace moert::cuda {

struct PersistentSizes {
  int64_t S, E, N, K;  // N: columns of y
  bool gated;          // a column of y needs two rows of w
  bool gathered;       // rows of x do not lie in expert order
  bool invariant;      // the bits of a row of y may not depend on how many rows there are
  bool may_split;      // there is memory for sums in parts
  int sms;             // multiprocessors
};

struct PersistentTile {
  int32_t x, w;     // rows of x and of w; x < 128: w's rows are on the M side of the tensor cores
  int32_t cluster;  // blocks that have neighbouring rows of x and share what they read of w
  int32_t splits;   // parts of K, each a tile of its own
};

// How a tile's rows of w hold gates and ups, so that both of a column of y end in one thread or one warp:
//   eights      K-major rows: eight of the gate, the same eight of up, and so on
//   halves      MN-major, the gate half before the up half: 64 of the gate, the same 64 of up, and so on
//   alternate   MN-major, in turns as they lie in memory
enum class Gating { none, eights, halves, alternate };

constexpr int64_t kWideX = 128, kNarrowW = 128, kWideW = 256;
// Below this K wide tiles are not taken of rows in expert order.
constexpr int64_t kTurnsBelow = 1024;
// A part has at least this many slices of 64, which fill the ring once; beyond so few tiles nothing is split.
constexpr int64_t kFewestSlices = 8;

// Of tiles that have rows, however the rows are spread over the experts.
MOERT_HOST_DEVICE constexpr int64_t most_row_tiles(int64_t S, int64_t E, int64_t tile_rows) {
  const int64_t experts = S < E ? S : E;
  return S == 0 || E == 0 ? 0 : experts + (S - experts) / tile_rows;
}

// Rows of x that a tile has where experts have few each.  The product then takes as long as its weights take to read
// until about 180 rows share them (790 TFLOP/s over 4.3 TB/s), and the M side of wgmma is never less than 64 rows: so
// w's rows are put there, 128 a tile, and N is 8, 16, 32 or 64 rows of x, twice the mean, so that an expert with more
// than its share seldom needs a second tile.  Published kernels choose like this: vLLM's 8-bit ones on Hopper multiply
// up to 64 rows with the operands swapped, N = 16.  DeepGEMM's issue 192 is the other way: on an H100 at 32 rows an
// expert swapped took 175 us and not swapped 168, both near the memory's speed; so beyond 32 rows the tile is 128 rows
// of x.  0 where it is.
MOERT_HOST_DEVICE constexpr int32_t few_rows_tile(int64_t S, int64_t E) {
  const int64_t experts = S < E ? S : E;
  for (const int32_t x : {8, 16, 32, 64})
    if (2 * S <= x * experts) return x;
  return 0;
}

// Of 128 rows of x by 256 of w a multiprocessor multiplies 64 along K in 1,024 cycles at best and has 48 KiB to read
// for it: 48 bytes a cycle, about twice what the L2 cache gives each.  Two blocks that share w read 32 KiB each, and
// so do the published kernels (CUTLASS's and PyTorch's default of 128 x 256 in clusters of two).  A pair's second block
// idles where an expert's rows end in the first, on average in half of the pairs: only experts with a pair's 256 rows
// or more have them.  Narrow tiles, 128 of w, are for products that have too few wide ones for every multiprocessor.
//
// Where K is short, storing a tile takes as long as a good part of multiplying it, and both groups of warps of a wide
// tile store at the same time.  With 128 of w a group has a whole tile in its registers, and one stores while the other
// multiplies.  SonicMoE takes tiles by turns (128 x 192, of which the sums alone are 192 registers a thread: with this
// epilogue they spill) for the second product up to I = 1024, and 128 x 256 beyond; gathered rows are those of the
// first product, whose K is long.
MOERT_HOST_DEVICE constexpr PersistentTile persistent_tile(const PersistentSizes& s) {
  const auto columns = [&](int64_t w) { return s.gated ? w / 2 : w; };
  const auto tiles_across = [&](int64_t w) { return (s.N + columns(w) - 1) / columns(w); };
  PersistentTile tile{int32_t(kWideX), int32_t(kNarrowW), 1, 1};
  const int32_t few = s.invariant ? 0 : few_rows_tile(s.S, s.E);
  if (few) {
    tile.x = few;
  } else if (s.S / kWideX * tiles_across(kWideW) >= s.sms) {
    if (s.K >= kTurnsBelow || s.gathered) tile.w = int32_t(kWideW);
    tile.cluster = s.S >= 2 * kWideX * s.E && s.sms % 2 == 0 ? 2 : 1;
  }
  const int64_t tiles = most_row_tiles(s.S, s.E, tile.x) * tiles_across(tile.w);
  const int64_t slices = (s.K + 63) / 64, parts = slices / kFewestSlices;
  if (!s.may_split || s.invariant || tiles == 0 || 2 * tiles > s.sms || parts < 2) return tile;
  tile.splits = int32_t(s.sms / tiles < parts ? s.sms / tiles : parts);
  return tile;
}

}  // namespace moert::cuda
