// How the drivers cut grouped products into tiles, and the memory that a thread works in.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cpu/gemm_isa.h"

namespace moert::cpu {

struct FreeMemory {
  void operator()(void* p) const { std::free(p); }
};

// Memory aligned to a cache line; its contents are undefined.
template <typename T>
using Memory = std::unique_ptr<T[], FreeMemory>;

template <typename T>
Memory<T> allocate(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes ? bytes : 64);
  if (!p) throw std::bad_alloc();
  return Memory<T>(static_cast<T*>(p));
}

// What a thread needs for one tile: three tiles of values, two rows of them, and gemm()'s scratch.  Kept by the thread.
template <typename A>
struct TileMemory {
  A *c0, *c1, *c2, *row0, *row1, *scratch;
};

template <typename A>
TileMemory<A> tile_memory() {
  constexpr int64_t kTile = kTileRows * kTileColumns;
  static thread_local const Memory<A> memory = allocate<A>(3 * kTile + 2 * kTileColumns + kGemmScratch);
  A* p = memory.get();
  return {p, p + kTile, p + 2 * kTile, p + 3 * kTile, p + 3 * kTile + kTileColumns, p + 3 * kTile + 2 * kTileColumns};
}

// Rows [row, row + M) and columns [n, n + N) of the product of one expert.
struct TileTask {
  int64_t expert, row, M, n, N;
};

// The tiles of all experts' rows over `columns` columns, `width` <= kTileColumns at a time; the tiles that share
// columns of a weight follow each other.  An expert without rows has no tile.
inline std::vector<TileTask> tile_tasks(const int32_t* offsets, int64_t E, int64_t columns, int64_t width) {
  std::vector<TileTask> tasks;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t begin = offsets[e], rows = offsets[e + 1] - begin;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows, M = tiles ? (rows + tiles - 1) / tiles : 0;
    for (int64_t n = 0; n < columns; n += width)
      for (int64_t row = 0; row < rows; row += M)
        tasks.push_back({e, begin + row, std::min(M, rows - row), n, std::min(width, columns - n)});
  }
  return tasks;
}

// Operands of a tile.
inline const char* at(const void* p, DType dtype, int64_t elements) {
  return static_cast<const char*>(p) + elements * size_of(dtype);
}

// Rows from `row` on, columns from `column` on.
inline TileMatrix tile_of(const Rows& x, int64_t row, int64_t column) {
  const int64_t skip = x.index ? 0 : row * x.stride;
  return {at(x.data, x.dtype, skip + column), x.dtype, x.stride, 1, x.index ? x.index + row : nullptr};
}

inline TileMatrix tile_of(const ExpertMatrix& w, int64_t e, int64_t row, int64_t column) {
  const int64_t skip = e * w.expert_stride + row * w.row_stride + column * w.col_stride;
  return {at(w.data, w.dtype, skip), w.dtype, w.row_stride, w.col_stride, nullptr};
}

// b of a tile whose product runs over the columns (over_columns) or the rows of w, from (row, column) on.  Whichever
// way w lies, its stride-1 side becomes the side along which it is read.
inline void set_b(GemmTile& tile, const ExpertMatrix& w, int64_t e, int64_t row, int64_t column, bool over_columns) {
  tile.b = tile_of(w, e, row, column);
  tile.b_k_rows = !over_columns;
  if (w.col_stride > w.row_stride) {
    std::swap(tile.b.row_stride, tile.b.col_stride);
    tile.b_k_rows = over_columns;
  }
}

}  // namespace moert::cpu
