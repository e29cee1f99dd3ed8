// Tile registers: their shapes, and what is read while they multiply.
#pragma once

#include "cpu/ahead.h"

namespace moert::cpu {
namespace {

constexpr int64_t kEdge = 16;             // rows of a tile; its columns of four bytes
constexpr int64_t kSumsEdge = 2 * kEdge;  // rows and columns of the sums in registers: 4 tiles of 8
constexpr int64_t kSums = kSumsEdge * kSumsEdge;

// All registers are whole; what is smaller is padded.  In static memory, since GCC takes only its first 8 bytes for
// read.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kEdge, kEdge, kEdge, kEdge, kEdge, kEdge, kEdge, kEdge};
};
static_assert(sizeof(TileShapes) == 64);
alignas(64) constexpr TileShapes kTileShapes;

// The registers are ours while this lives.
class TileRegisters {
 public:
  TileRegisters() { _tile_loadconfig(&kTileShapes); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// What is written must be in memory before a tile is loaded: GCC does not know that tiles are read from there.
MOERT_INLINE void before_tile_loads() { asm volatile("" ::: "memory"); }

// Whose rows of x a thread has laid out last (GemmTile::same_a), and where.
struct LaidOut {
  const void* scratch = nullptr;
  int64_t number = 0;
};

// 16 R x 16 C sums, of four bytes, in the registers 0 (and 1 beside it, 2 and 3 below).
template <int R, int C>
struct Sums {
  static void zero() {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
  }

  template <typename T>
  static void load(const T* c, int64_t pitch) {
    static_assert(sizeof(T) == 4);
    before_tile_loads();
    _tile_loadd(0, c, 4 * pitch);
    if constexpr (C > 1) _tile_loadd(1, c + kEdge, 4 * pitch);
    if constexpr (R > 1) _tile_loadd(2, c + kEdge * pitch, 4 * pitch);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, c + kEdge * pitch + kEdge, 4 * pitch);
  }

  template <typename T>
  static void store(T* c, int64_t pitch) {
    static_assert(sizeof(T) == 4);
    _tile_stored(0, c, 4 * pitch);
    if constexpr (C > 1) _tile_stored(1, c + kEdge, 4 * pitch);
    if constexpr (R > 1) _tile_stored(2, c + kEdge * pitch, 4 * pitch);
    if constexpr (R > 1 && C > 1) _tile_stored(3, c + kEdge * pitch + kEdge, 4 * pitch);
  }
};

// f(Sums) for so many rows and columns.
template <typename F>
MOERT_INLINE void with_sums(int64_t rows, int64_t columns, const F& f) {
  if (rows > kEdge)
    columns > kEdge ? f(Sums<2, 2>{}) : f(Sums<2, 1>{});
  else
    columns > kEdge ? f(Sums<1, 2>{}) : f(Sums<1, 1>{});
}

}  // namespace
}  // namespace moert::cpu
