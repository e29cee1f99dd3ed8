// The way of the persistent grouped GEMM through its tiles, the same for all that work on them.
#pragma once

#include "cuda/grouped_gemm_product.h"
#include "cuda/hopper.h"
#include "cuda/persistent_choice.h"

namespace moert::cuda {

// Columns of y that eight rows of w, or eight of the gate and eight of up, give, stored at once.
constexpr int kStoredColumns = 8;

template <class T, class To = Epilogue<T>>
struct PersistentProduct {
  using Type = T;
  using Stores = To;
  TensorMap w;  // of three dimensions, or, of eights, of five, of halves, of four
  TensorMap x;  // of rows in expert order
  Product<T, To> p;
  PersistentTile tile;
  float* sums;  // [tiles, splits, x, w] where there are splits

  MOERT_HOST_DEVICE bool gated() const { return p.epilogue.takes_up(); }
  MOERT_HOST_DEVICE Gating gating() const {
    if (!gated()) return Gating::none;
    return p.w.column == 1 ? Gating::eights : p.w.row == 1 ? Gating::halves : Gating::alternate;
  }
  MOERT_HOST_DEVICE int columns() const { return gated() ? tile.w / 2 : tile.w; }
  // An upper bound, which depends on nothing that only the device knows.
  MOERT_HOST_DEVICE int64_t num_tiles_at_most() const {
    return most_row_tiles(p.S, p.E, tile.x * tile.cluster) * ceil_div(p.N, columns());
  }
};

// The stage of a slice and the parity of the phases that its barriers end for it.
template <int kRing>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  MOERT_HOST_DEVICE void advance(int slices = 1) {
    stage += slices;
    parity ^= uint32_t(stage / kRing) & 1;
    stage %= kRing;
  }
};

struct TileWork {
  RowTile rows;                 // of a cluster, or of a block of it, for which there may be none
  int32_t first;                // column of y
  int32_t first_slice, slices;  // 0 after the last tile
};

// The tiles of clusters follow each other expert by expert, so that blocks that run at the same time share weights and
// rows, and without a hole, so that all blocks get as many.  A warp walks over them, each lane with one of 32 experts.
template <class Q>
class TileWalk {
  const Q& q_;
  const int32_t tile_rows_, slices_;
  const int64_t columns_;        // in tiles
  const int64_t most_;           // tiles, which bad offsets might have more of
  int32_t expert_ = -kWarp;      // of lane 0
  int64_t begin_ = 0, end_ = 0;  // rows of tiles before these experts, and with them
  Slots slots_{0, 0};
  int32_t before_ = 0;  // rows of tiles of the lanes before

  MOERT_DEVICE_INLINE int32_t row_tiles(const Slots& slots) const {
    return (slots.count + tile_rows_ - 1) / tile_rows_;
  }

  MOERT_DEVICE_INLINE void next_experts() {
    expert_ += kWarp;
    const int32_t e = expert_ + lane_id();
    slots_ = e < q_.p.E ? slots_of(q_.p.offsets, e, q_.p.S) : Slots{0, 0};
    before_ = warp_exclusive(row_tiles(slots_));
    begin_ = end_;
    end_ += __shfl_sync(kAllLanes, before_ + row_tiles(slots_), kWarp - 1);
  }

 public:
  MOERT_DEVICE_INLINE explicit TileWalk(const Q& q)
      : q_(q),
        tile_rows_(q.tile.x * q.tile.cluster),
        slices_(int32_t(ceil_div(q.p.K, kSliceK))),
        columns_(ceil_div(q.p.N, q.columns())),
        most_(q.num_tiles_at_most()) {}

  // The same in every lane; `unit`, a tile's part of K, ascends from call to call.
  MOERT_DEVICE_INLINE TileWork at(int64_t unit) {
    const int splits = q_.tile.splits;  // mostly 1, and divisions of 64 bits are slow
    const int64_t tile = splits == 1 ? unit : unit / splits;
    if (tile >= most_) return {{0, 0, 0}, 0, 0, 0};
    while (tile >= end_ * columns_) {
      if (expert_ + kWarp >= q_.p.E) return {{0, 0, 0}, 0, 0, 0};
      next_experts();
    }
    const int64_t rest = tile - begin_ * columns_;
    const int lane = __popc(__ballot_sync(kAllLanes, before_ * columns_ <= rest)) - 1;
    const Slots slots{__shfl_sync(kAllLanes, slots_.begin, lane), __shfl_sync(kAllLanes, slots_.count, lane)};
    const int64_t inside = rest - __shfl_sync(kAllLanes, before_, lane) * columns_;
    const TileIndex at = banded(inside, row_tiles(slots), columns_, kBand * kMmaTile / q_.tile.w);
    const auto row = int32_t(at.row * tile_rows_);
    const int32_t left = slots.count - row;
    const auto slices_before = [&](int64_t part) {
      return int32_t(splits == 1 ? part * slices_ : part * slices_ / splits);
    };
    const int64_t part = unit - tile * splits;
    const int32_t first_slice = slices_before(part);
    return {{expert_ + lane, slots.begin + row, left < tile_rows_ ? left : tile_rows_},
            int32_t(at.column * q_.columns()),
            first_slice,
            slices_before(part + 1) - first_slice};
  }

  // The part of the cluster's work that a block of it has.
  MOERT_DEVICE_INLINE TileWork at(int64_t unit, int rank) {
    TileWork work = at(unit);
    const int32_t skipped = rank * q_.tile.x, left = work.rows.rows - skipped;
    work.rows.row += skipped;
    work.rows.rows = left < 0 ? 0 : left < q_.tile.x ? left : q_.tile.x;
    return work;
  }
};

// The sums of a tile's parts, in order, through the epilogue; one block a tile.
constexpr int kAddThreads = 256;

template <class T>
__global__ void __launch_bounds__(kAddThreads) add_split_sums(const __grid_constant__ PersistentProduct<T> q) {
  const int x = q.tile.x, w = q.tile.w, splits = q.tile.splits, groups = q.columns() / kStoredColumns;
  const TileWork work = TileWalk<PersistentProduct<T>>(q).at(int64_t(blockIdx.x) * splits);
  if (work.slices == 0) return;
  const float* sums = q.sums + int64_t(blockIdx.x) * splits * x * w;
  for (int i = int(threadIdx.x); i < work.rows.rows * groups; i += kAddThreads) {
    const int row = i / groups, group = i % groups;
    const int64_t column = work.first + group * kStoredColumns;
    if (column >= q.p.N) continue;
    float gate[kStoredColumns] = {}, up[kStoredColumns] = {};
    for (int part = 0; part < splits; ++part) {
      const float* from = sums + (part * x + row) * w + group * kStoredColumns * (q.gated() ? 2 : 1);
#pragma unroll
      for (int j = 0; j < kStoredColumns; ++j) {
        gate[j] += from[j];
        if (q.gated()) up[j] += from[kStoredColumns + j];
      }
    }
    q.p.epilogue.store(work.rows.expert, work.rows.row + row, column, gate, up);
  }
}

}  // namespace moert::cuda
