// Products of int8 rows with packed weights that have one scale a row, in tile registers.  Weights are the left
// operand: int8 as they lie, ternary codes as bytes.  The rows of x become quads, four bytes along K of 16 rows side by
// side, and the product comes out transposed.  Sums are integers and are scaled as the other kernels do: their bits are
// the same.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "cpu/amx_tiles.h"
#include "cpu/packed_scales.h"

namespace moert::cpu {
namespace {

static_assert(kVectorBytes == 64);

constexpr int64_t kVectorQuads = kEdge * 64;  // bytes of a vector of 16 rows of x

// Parts of the scratch (packed_scratch), and how much of K there is room for.
template <typename Code>
struct TileBlocks {
  int64_t bytes;           // of a row of codes
  int64_t steps, at_once;  // of a row, and of a block along K: vectors of packed bytes
  int64_t panels;          // of kSumsEdge rows of x
  int32_t* sums;           // [N / kSumsEdge, panels] blocks of [weight row, row of x]
  char* x;                 // [panels, 2, vectors, 16 quads, 16 rows]
  char* codes;             // [kSumsEdge] rows of `pitch` bytes

  TileBlocks(const PackedTile& t, const RowLayout& layout)
      : bytes(row_bytes(t.b.packing)),
        steps(layout.steps),
        at_once(std::min(steps, kTileBytes / 64 / Code::kPlanes)),
        panels((t.M + kSumsEdge - 1) / kSumsEdge),
        sums(reinterpret_cast<int32_t*>(t.scratch)),
        x(t.scratch + kTileRows * kTileColumns * 4),
        codes(x + panels * panel_bytes()) {}

  bool one() const { return at_once == steps; }
  int64_t vectors() const { return at_once * Code::kPlanes; }
  int64_t panel_bytes() const { return 2 * vectors() * kVectorQuads; }
  int64_t pitch() const { return vectors() * 64 + 64; }  // rows begin on different cache sets
};

// Row r of 16 has bytes [64 r, 64 r + 64) of every vector of quads: a transposition of words.
template <typename Code>
void lay_out_quads(const PackedTile& t, const RowLayout& layout, const TileBlocks<Code>& blocks, int64_t first,
                   int64_t steps) {
  for (int64_t p = 0; p < 2 * blocks.panels; ++p) {
    const int64_t M = std::min(kEdge, t.M - p * kEdge);
    char* out = blocks.x + p * blocks.vectors() * kVectorQuads;
    if (M <= 0) continue;  // no tile is read for them
    const char* rows[kEdge];
    for (int64_t m = 0; m < kEdge; ++m) rows[m] = quantized_row(t.a, p * kEdge + std::min(m, M - 1));
    for (int64_t s = first; s < first + steps; ++s)
      for (int64_t plane = 0; plane < Code::kPlanes; ++plane, out += kVectorQuads) {
        VecI words[kEdge];
#pragma GCC unroll 16
        for (int m = 0; m < kEdge; ++m) words[m] = load_vector<VecI>(rows[m] + s * layout.step_bytes + plane * 64);
        transpose<kEdge / 2>(words);
#pragma GCC unroll 16
        for (int m = 0; m < kEdge; ++m) store_vector(out + m * 64, words[m]);
      }
  }
}

struct LeftCodes {
  const char* data;
  int64_t pitch;
};

// The codes of R <= kSumsEdge weight rows from n on, signed or as Code::unpack leaves them, for a block of steps: rows
// in twice 16, zeros after the last one.
template <typename Code>
LeftCodes left_codes(const PackedTile& t, const TileBlocks<Code>& blocks, int64_t n, int64_t R, int64_t first,
                     int64_t steps) {
  constexpr bool kInt8 = std::is_same_v<Code, Int8Code>;
  const int64_t bytes = blocks.bytes;
  const uint8_t* codes = t.b.codes + n * bytes + first * 64;
  if (kInt8 && R % kEdge == 0 && (first + steps) * 64 <= bytes) return {reinterpret_cast<const char*>(codes), bytes};
  for (int64_t r = 0; r < round_up(R, kEdge); ++r) {
    char* out = blocks.codes + r * blocks.pitch();
    for (int64_t s = 0; s < steps; ++s, out += Code::kPlanes * 64) {
      const int64_t left = bytes - (first + s) * 64;
      const uint8_t* from = codes + r * bytes + s * 64;
      VecB packed{}, planes[Code::kPlanes];
      if (r < R && left >= 64)
        packed = load_vector<VecB>(from);
      else if (r < R)  // not load_last: while registers are ours, GCC takes a masked load for what may throw
        std::memcpy(&packed, from, size_t(left));
      if constexpr (kInt8)
        planes[0] = packed;
      else
        Code::unpack(&packed, VecB{}, planes);
      for (int p = 0; p < Code::kPlanes; ++p) store_vector(out + p * 64, planes[p]);
    }
  }
  return {blocks.codes, blocks.pitch()};
}

// sums += left . right, whose two halves of 16 rows of x lie `half` bytes apart.
template <bool kSigned, int R, int C>
void add_product(Sums<R, C>, const LeftCodes& left, const char* right, int64_t half, int64_t vectors, Ahead& ahead) {
  before_tile_loads();
  const char* row = left.data;
  for (int64_t v = 0; v < vectors; ++v, row += 64, right += kVectorQuads) {
    _tile_loadd(6, right, 64);
    if constexpr (C > 1) _tile_loadd(7, right + half, 64);
    _tile_loadd(4, row, left.pitch);
    if constexpr (R > 1) _tile_loadd(5, row + kEdge * left.pitch, left.pitch);
    if constexpr (kSigned) {
      _tile_dpbssd(0, 4, 6);
      if constexpr (C > 1) _tile_dpbssd(1, 4, 7);
      if constexpr (R > 1) _tile_dpbssd(2, 5, 6);
      if constexpr (R > 1 && C > 1) _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbusd(0, 4, 6);
      if constexpr (C > 1) _tile_dpbusd(1, 4, 7);
      if constexpr (R > 1) _tile_dpbusd(2, 5, 6);
      if constexpr (R > 1 && C > 1) _tile_dpbusd(3, 5, 7);
    }
    ahead.fetch();
  }
}

// c[m, n] of 16 weight rows and up to 16 rows of x: (sum + bias[m]) * scales[n] * scale of x, in the order of
// scale_integers().
void scale_sums(const int32_t* sums, int64_t M, const int32_t* bias, const float* scales, const float* x_scales,
                float* c) {
  VecI rows[kEdge];
#pragma GCC unroll 16
  for (int n = 0; n < kEdge; ++n) rows[n] = load_vector<VecI>(sums + n * kSumsEdge);
  transpose<kEdge / 2>(rows);
  const VecF of_rows = load(scales);
  for (int64_t m = 0; m < M; ++m) store(c + m * kTileColumns, to_floats(rows[m] + bias[m]) * of_rows * x_scales[m]);
}

// What every row of x is added and multiplied by.
struct RowsOfX {
  int32_t bias[kTileRows];
  float scales[kTileRows];

  template <typename Code>
  static RowsOfX of(const PackedTile& t, const RowLayout& layout, Code) {
    RowsOfX x;
    for (int64_t m = 0; m < t.M; ++m) {
      const char* row = quantized_row(t.a, m);
      x.bias[m] = 0;
      if (!std::is_same_v<Code, Int8Code>)  // int8 is multiplied as it is, signed
        for (int lane = 0; lane < kLanes<int32_t>; ++lane)
          x.bias[m] += reinterpret_cast<const int32_t*>(row + layout.whole)[lane];
      x.scales[m] = *reinterpret_cast<const float*>(row + layout.scales);
    }
    return x;
  }
};

template <typename Code>
int32_t* sums_of(const TileBlocks<Code>& blocks, int64_t n, int64_t m) {
  int32_t* block = blocks.sums + (n / kSumsEdge * blocks.panels + m / kSumsEdge) * kSums;
  return block + n % kSumsEdge * kSumsEdge + m % kSumsEdge;
}

// All sums; the quads of x are laid out unless they are `ready`.
template <typename Code>
void add_products(const PackedTile& t, const RowLayout& layout, const TileBlocks<Code>& blocks, bool ready) {
  const int64_t lines = kSumsEdge * blocks.bytes / 64;
  const bool comes_next = blocks.one() && !t.b.float_scales;  // else the rows are others, or were written just now
  const TileRegisters registers;
  for (int64_t first = 0; first < blocks.steps; first += blocks.at_once) {
    const int64_t steps = std::min(blocks.at_once, blocks.steps - first), vectors = steps * Code::kPlanes;
    if (!ready) lay_out_quads(t, layout, blocks, first, steps);
    for (int64_t n = 0; n < t.N; n += kSumsEdge) {
      const int64_t N = std::min(kSumsEdge, t.N - n);
      const LeftCodes left = left_codes<Code>(t, blocks, n, N, first, steps);
      // The rows that follow in memory, a part beside every vector of every panel.
      const int64_t times = blocks.panels * vectors;
      Ahead ahead{reinterpret_cast<const char*>(t.b.codes) + (n + N) * blocks.bytes, 0,
                  std::numeric_limits<int64_t>::max(), comes_next ? (lines + times - 1) / times : 0};
      for (int64_t p = 0; p < blocks.panels; ++p)
        with_sums(N, t.M - p * kSumsEdge, [&](auto tiles) {
          int32_t* sums = sums_of(blocks, n, p * kSumsEdge);
          first > 0 ? tiles.load(sums, kSumsEdge) : tiles.zero();
          add_product<std::is_same_v<Code, Int8Code>>(tiles, left, blocks.x + p * blocks.panel_bytes(),
                                                      blocks.panel_bytes() / 2, vectors, ahead);
          tiles.store(sums, kSumsEdge);
        });
    }
  }
}

// `ready`: the quads of x are those of the last call with this scratch.  True if they serve again.
template <typename Code>
bool packed_tiles(const PackedTile& t, bool ready) {
  const RowLayout layout = row_layout<Code>(t.b.packing.columns);
  const TileBlocks<Code> blocks(t, layout);
  add_products(t, layout, blocks, ready && blocks.one());
  const RowsOfX x = RowsOfX::of(t, layout, Code{});
  float scales[kTileColumns] = {};
  for (int64_t n = 0; n < t.N; ++n) widen_scales(t.b, n, 0, 1, scales + n);
  for (int64_t n = 0; n < t.N; n += kEdge)
    for (int64_t m = 0; m < t.M; m += kEdge)
      scale_sums(sums_of(blocks, n, m), std::min(kEdge, t.M - m), x.bias + m, scales + n, x.scales + m,
                 t.c + m * kTileColumns + n);
  return blocks.one();
}

}  // namespace
}  // namespace moert::cpu
