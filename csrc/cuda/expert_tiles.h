// Which tile of a grouped product a thread block computes, from the experts' offsets alone: no list is built and
// nothing is scanned before the product starts.
#pragma once

#include "moert/dtype.h"

namespace moert::cuda {

// Up to `rows` slots of one expert, from slot `row` on.  Expert E stands for the slots that no expert has.
struct RowTile {
  int32_t expert, row, rows;
};

// Expert e's tiles begin at index offsets[e] / tile_rows + e.  That ascends with e and leaves each expert room for at
// least ceil(its slots / tile_rows) tiles, so that the expert of an index is a binary search, and the number of indices
// depends on nothing that only the device knows.  At most one index of each expert is without slots.
MOERT_HOST_DEVICE constexpr int64_t num_row_tiles(int64_t S, int64_t E, int64_t tile_rows) {
  return S / tile_rows + E + 1;
}

// The tile at `index`, in [0, num_row_tiles); its `rows` is 0 where there is nothing to do.  Whatever the offsets are,
// it lies within [0, S).
MOERT_HOST_DEVICE static inline RowTile row_tile(const int32_t* offsets, int32_t E, int32_t S, int32_t tile_rows,
                                                 int32_t index) {
  int32_t expert = 0, last = E;
  while (expert < last) {
    const int32_t middle = (expert + last + 1) / 2;
    if (offsets[middle] / tile_rows + middle <= index)
      expert = middle;
    else
      last = middle - 1;
  }
  const int64_t begin = offsets[expert], end = expert < E ? offsets[expert + 1] : S;
  const int64_t row = begin + (index - (begin / tile_rows + expert)) * int64_t(tile_rows);
  const int64_t left = (end < S ? end : S) - row;
  return {expert, int32_t(row), int32_t(row < 0 || left <= 0 ? 0 : left < tile_rows ? left : tile_rows)};
}

// The same tiles by their first slot, for so few slots that there are fewer of them than of indices.
MOERT_HOST_DEVICE static inline RowTile row_tile_of_slot(const int32_t* offsets, int32_t E, int32_t S,
                                                         int32_t tile_rows, int32_t slot) {
  int32_t expert = 0, last = E;  // the last that begins at or before the slot
  while (expert < last) {
    const int32_t middle = (expert + last + 1) / 2;
    if (offsets[middle] <= slot)
      expert = middle;
    else
      last = middle - 1;
  }
  const int32_t end = expert < E && offsets[expert + 1] < S ? offsets[expert + 1] : S, left = end - slot;
  const bool begins = (slot - offsets[expert]) % tile_rows == 0;
  return {expert, slot, !begins || left <= 0 ? 0 : left < tile_rows ? left : tile_rows};
}

struct Slots {
  int32_t begin, count;
};

// The slots of an expert, within [0, S) whatever the offsets are.
MOERT_HOST_DEVICE static inline Slots slots_of(const int32_t* offsets, int64_t e, int32_t S) {
  const int32_t begin = offsets[e] < 0 ? 0 : offsets[e], end = offsets[e + 1] < S ? offsets[e + 1] : S;
  return {begin, end > begin ? end - begin : 0};
}

struct TileIndex {
  int64_t row, column;  // in tiles
};

// Blocks that run at the same time share rows and columns: the tiles are taken in bands of `width` columns, a band's
// rows one after the other.  With one column at a time every expert's rows would be read again for each; with all
// columns at a time a large expert's weights would leave the L2 cache before the next rows need them.
MOERT_HOST_DEVICE static inline TileIndex banded(int64_t index, int64_t rows, int64_t columns, int64_t width) {
  const int64_t band = index / (rows * width), first = band * width, rest = index - band * rows * width;
  const int64_t here = columns - first < width ? columns - first : width;
  return {rest / here, first + rest % here};
}

}  // namespace moert::cuda
