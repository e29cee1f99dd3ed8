// How the drivers cut grouped products into tiles, and the memory that a thread works in.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/gemm_isa.h"
#include "cpu/pages.h"

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
  advise_huge_pages(p, bytes);
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

// Tasks that a thread should find, so that the last ones end together.
constexpr int64_t kTasksPerThread = 32;
constexpr int64_t kNarrowTile = 32;  // columns; less and widening the rows of x is felt

// Experts by their rows, most first: what is started last is short.  An expert without rows is left out.
inline std::vector<int64_t> busiest_first(const int32_t* offsets, int64_t E) {
  const auto rows = [&](int64_t e) { return offsets[e + 1] - offsets[e]; };
  std::vector<int64_t> experts;
  for (int64_t e = 0; e < E; ++e)
    if (rows(e) > 0) experts.push_back(e);
  std::stable_sort(experts.begin(), experts.end(), [&](int64_t a, int64_t b) { return rows(a) > rows(b); });
  return experts;
}

// Where no expert has more rows, what a task takes is the time in which its weights come from memory.
constexpr int64_t kFewTaskRows = 8;

// Such tasks are alike, and a thread takes several that follow each other: the longer the piece of memory that it
// reads, the better the CPU foresees it.
inline bool in_runs(const std::vector<TileTask>& tasks) { return !tasks.empty() && tasks.front().M <= kFewTaskRows; }

// The tiles of all experts' rows over the columns [first, last), `width` <= kTileColumns at a time or less if these are
// too few tasks; the tiles that share columns of a weight follow each other.
inline std::vector<TileTask> tile_tasks(const int32_t* offsets, int64_t E, int64_t first, int64_t last, int64_t width,
                                        int64_t threads) {
  const std::vector<int64_t> experts = busiest_first(offsets, E);
  const auto tiles_of = [&](int64_t e) { return (offsets[e + 1] - offsets[e] + kTileRows - 1) / kTileRows; };
  int64_t row_tiles = 0;
  for (const int64_t e : experts) row_tiles += tiles_of(e);
  const auto tasks_of = [&](int64_t width) { return row_tiles * ((last - first + width - 1) / width); };
  while (threads > 1 && width > kNarrowTile && tasks_of(width) < kTasksPerThread * threads) width /= 2;

  std::vector<TileTask> tasks;
  tasks.reserve(tasks_of(width));
  for (const int64_t e : experts) {
    const int64_t begin = offsets[e], rows = offsets[e + 1] - begin, tiles = tiles_of(e),
                  M = (rows + tiles - 1) / tiles;
    for (int64_t n = first; n < last; n += width)
      for (int64_t row = 0; row < rows; row += M)
        tasks.push_back({e, begin + row, std::min(M, rows - row), n, std::min(width, last - n)});
  }
  return tasks;
}

// The first of n numbers that nobody else has: GemmTile::same_a for the tasks of n rows.
inline int64_t new_numbers(int64_t n) {
  static std::atomic<int64_t> next{1};
  return next.fetch_add(n, std::memory_order_relaxed);
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

// w from (row, column) on as an operand whose product runs over its columns (over_columns) or its rows.  Whichever way
// w lies, its stride-1 side becomes the side along which it is read.
inline TileOperand operand_of(const ExpertMatrix& w, int64_t e, int64_t row, int64_t column, bool over_columns) {
  TileOperand b{tile_of(w, e, row, column), !over_columns, w.panels};
  if (w.col_stride > w.row_stride) {
    std::swap(b.matrix.row_stride, b.matrix.col_stride);
    b.k_rows = over_columns;
  }
  return b;
}

inline TileOperand operand_of(const Rows& x, int64_t row, int64_t column, bool k_rows = false) {
  return {tile_of(x, row, column), k_rows};
}

}  // namespace moert::cpu
