// Grouped GEMM for sm_90a by as many thread blocks as there are multiprocessors, each of which walks over tiles of 128
// rows of x by 128 or 256 rows of w.  Four warps bring slices of 64 of the summed dimension into a ring in shared
// memory; two groups of four warps multiply them, 64 rows of the tile each, and store the sums while the first already
// fill the ring for the next tile.
//
// The weights are one tensor of which the copy engine takes boxes, with the expert as a coordinate: nothing is
// rewritten from expert to expert.  Rows of x that lie in expert order it brings as well; others are gathered in
// 16-byte pieces.  A tile's rows past its expert's end are read, or are zeros, and are not stored.
//
// Slice n of all that a block multiplies lies in stage n % kRing.  full[stage] ends a phase when both slices are there,
// empty[stage] when all warps that multiply have read them, so that both count the same uses of the stage.
#pragma once

#include "cuda/hopper.h"

#include "cuda/expert_tiles.h"
#include "cuda/grouped_gemm_product.h"

namespace moert::cuda {

constexpr int kConsumerWarps = 8, kConsumers = kConsumerWarps * kWarp, kProducers = kWarpgroup;
constexpr int kPersistentThreads = kConsumers + kProducers;
// Registers of a thread, in all as many as the 168 that each has at first.
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
static_assert(kProducers * kProducerRegisters + kConsumers * kConsumerRegisters <= 168 * kPersistentThreads);

// A warp's sums on their way from fragments to rows, 64 columns at a time: [16, 64], groups of eight columns exchanged
// within a row so that the rows that half a warp writes at once meet in no bank.
constexpr int kSumRows = 16, kSumColumns = 64, kStoredColumns = 8, kSumGroups = kSumColumns / kStoredColumns;
MOERT_HOST_DEVICE constexpr int sum_place(int row, int group) {
  return row * kSumColumns + (group ^ row % kSumGroups) * kStoredColumns;
}

// A kind of tile.  With gates its rows of w are eight of the gate, the same eight of up, and so on.
template <class Element_, int kW_, bool kGathered_, bool kGated_>
struct Tiling {
  using Element = Element_;
  static constexpr bool kGathered = kGathered_, kGated = kGated_;
  static constexpr int kX = kMmaTile, kW = kW_;          // rows of x and of w
  static constexpr int kColumns = kGated ? kW / 2 : kW;  // of y
  static constexpr int kRing = kW == 128 ? 6 : 4;        // as many as fit
  static constexpr int kParts = kW / kSumColumns;        // of the sums, stored one after the other
};

template <class Tiling>
struct PersistentShared {
  typename Tiling::Element x[Tiling::kRing][Tiling::kX * kSliceK], w[Tiling::kRing][Tiling::kW * kSliceK];
  float sums[kConsumerWarps][kSumRows * kSumColumns];
  Barrier full[Tiling::kRing], empty[Tiling::kRing];
};

template <class Tiling>
constexpr int kPersistentBytes = int(sizeof(PersistentShared<Tiling>)) + kSliceAlign;

template <class T>
struct PersistentProduct {
  TensorMap w;  // of three dimensions, or, where it has gates, of five
  TensorMap x;  // of rows in expert order
  Product<T> p;
};

// The stage of a slice and the parity of the phases that its barriers end for it.
template <int kRing>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  MOERT_HOST_DEVICE void advance() {
    if (++stage < kRing) return;
    stage = 0;
    parity ^= 1;
  }
};

// An upper bound, which depends on nothing that only the device knows.
template <class Tiling, class T>
int64_t num_tiles_at_most(const Product<T>& p) {
  return num_row_tiles(p.S, p.E, Tiling::kX) * ceil_div(p.N, Tiling::kColumns);
}

struct TileWork {
  RowTile rows;
  int32_t first;   // column of y
  int32_t slices;  // 0 after the last tile
};

// The tiles follow each other expert by expert, so that blocks that run at the same time share weights and rows, and
// without a hole, so that all blocks get as many.  A warp walks over them, each lane with one of 32 experts.
template <class Tiling, class T>
class TileWalk {
  const Product<T>& p_;
  const int64_t columns_;
  int32_t expert_ = -kWarp;      // of lane 0
  int64_t begin_ = 0, end_ = 0;  // rows of tiles before these experts, and with them
  Slots slots_{0, 0};
  int32_t before_ = 0;  // rows of tiles of the lanes before

  static MOERT_DEVICE_INLINE int32_t tile_rows(const Slots& slots) {
    return int32_t(ceil_div(slots.count, Tiling::kX));
  }

  MOERT_DEVICE_INLINE void next_experts() {
    expert_ += kWarp;
    const int32_t e = expert_ + lane_id();
    slots_ = e < p_.E ? slots_of(p_.offsets, e, p_.S) : Slots{0, 0};
    before_ = warp_exclusive(tile_rows(slots_));
    begin_ = end_;
    end_ += __shfl_sync(kAllLanes, before_ + tile_rows(slots_), kWarp - 1);
  }

 public:
  MOERT_DEVICE_INLINE explicit TileWalk(const Product<T>& p) : p_(p), columns_(ceil_div(p.N, Tiling::kColumns)) {}

  // The same in every lane; `tile` ascends from call to call.
  MOERT_DEVICE_INLINE TileWork at(int64_t tile) {
    while (tile >= end_ * columns_) {
      if (expert_ + kWarp >= p_.E) return {{0, 0, 0}, 0, 0};
      next_experts();
    }
    const int64_t rest = tile - begin_ * columns_;
    const int lane = __popc(__ballot_sync(kAllLanes, before_ * columns_ <= rest)) - 1;
    const Slots slots{__shfl_sync(kAllLanes, slots_.begin, lane), __shfl_sync(kAllLanes, slots_.count, lane)};
    const int64_t inside = rest - __shfl_sync(kAllLanes, before_, lane) * columns_;
    const TileIndex at = banded(inside, tile_rows(slots), columns_, kBand * kMmaTile / Tiling::kW);
    const auto row = int32_t(at.row * Tiling::kX);
    const int32_t left = slots.count - row;
    return {{expert_ + lane, slots.begin + row, left < Tiling::kX ? left : Tiling::kX},
            int32_t(at.column * Tiling::kColumns),
            int32_t(ceil_div(p_.K, kSliceK))};
  }
};

// A thread's share of the gathered slices of a tile: one piece of every sixteenth row.
template <class Tiling, class T>
struct Gatherer {
  static constexpr int kRows = kProducers / kPieces, kCopies = Tiling::kX / kRows;
  const T* from[kCopies];
  int row, piece;

  MOERT_DEVICE_INLINE explicit Gatherer(int thread) : row(thread / kPieces), piece(thread % kPieces) {}

  MOERT_DEVICE_INLINE void find(const Product<T>& p, const RowTile& rows) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int m = row + i * kRows;
      from[i] = m < rows.rows ? p.x.row(rows.row + m) : nullptr;
    }
  }

  // Zeros for rows that are not there and past K, where w's boxes have zeros too: 0 times what lay there might be NaN.
  MOERT_DEVICE_INLINE void load(int64_t k, int64_t K, typename Tiling::Element* to) const {
    k += piece * kPiece;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool here = k < K && from[i];
      copy_async(to + piece_place(row + i * kRows, piece), here ? from[i] + k : nullptr, here);
    }
  }
};

// Gathered slices that are still on their way when the next is asked for.  A stage is asked for once the consumers have
// left it, which they do one slice late: at most kRing - 2 may be held back.
constexpr int kOnTheirWay = 2;

template <class Tiling>
constexpr int kFullArrivals = Tiling::kGathered ? 1 + kProducers / kWarp : 1;

// What the thread has copied into a stage is there; once its warp says so, wgmma may read it.
MOERT_DEVICE_INLINE void hand_over(Barrier& full) {
  publish_writes();
  __syncwarp();
  if (lane_id() == 0) arrive(full);
}

// Rows of a box of x: no more are read than a tile of few rows has boxes of.  What lies in the others' place in shared
// memory goes into sums that are not stored.
constexpr int kXBox = 32;

// One thread asks for a stage's boxes.
template <class Tiling, class T>
MOERT_DEVICE_INLINE void copy_boxes(const PersistentProduct<T>& q, const TileWork& work, int k, Barrier& full,
                                    typename Tiling::Element* x, typename Tiling::Element* w) {
  constexpr int kRowBytes = 2 * kSliceK;
  const int boxes = Tiling::kGathered ? 0 : int(ceil_div(work.rows.rows, kXBox));
  arrive_expecting(full, (Tiling::kW + boxes * kXBox) * kRowBytes);
  if constexpr (Tiling::kGated)
    copy_box(q.w, full, w, k, 0, 0, work.first / kStoredColumns, work.rows.expert);
  else
    copy_box(q.w, full, w, k, work.first, work.rows.expert);
  for (int i = 0; i < boxes; ++i) copy_box(q.x, full, x + i * kXBox * kSliceK, k, work.rows.row + i * kXBox);
}

template <class Tiling, class T>
MOERT_DEVICE_INLINE void produce(const PersistentProduct<T>& q, PersistentShared<Tiling>& shared) {
  static_assert(kOnTheirWay <= Tiling::kRing - 2);
  const Product<T>& p = q.p;
  const int thread = int(threadIdx.x) - kConsumers;
  const bool leads = thread == 0;
  if (!Tiling::kGathered && thread >= kWarp) return;
  Gatherer<Tiling, T> gatherer(thread);
  RingPlace<Tiling::kRing> place, oldest;  // oldest: of the slices on their way
  int on_their_way = 0;
  TileWalk<Tiling, T> walk(p);
  for (int64_t tile = blockIdx.x;; tile += gridDim.x) {
    const TileWork work = walk.at(tile);
    if (work.slices == 0) break;
    if constexpr (Tiling::kGathered) gatherer.find(p, work.rows);
#pragma unroll 1
    for (int slice = 0; slice < work.slices; ++slice, place.advance()) {
      const int stage = place.stage, k = slice * kSliceK;
      // For the use before; of a first use there is none.  Who only looked on might miss a phase.
      if (Tiling::kGathered || leads) wait(shared.empty[stage], place.parity ^ 1);
      if (leads) copy_boxes<Tiling>(q, work, k, shared.full[stage], shared.x[stage], shared.w[stage]);
      if constexpr (Tiling::kGathered) {
        gatherer.load(k, p.K, shared.x[stage]);
        close_group();
        if (on_their_way < kOnTheirWay) {
          ++on_their_way;
          continue;
        }
        wait_groups<kOnTheirWay>();
        hand_over(shared.full[oldest.stage]);
        oldest.advance();
      }
    }
  }
  if constexpr (Tiling::kGathered) {
    wait_groups<0>();
    for (; on_their_way; --on_their_way, oldest.advance()) hand_over(shared.full[oldest.stage]);
  }
}

// A part of the sums of a warp.  Registers have no index: there is code for each part, but only one copy of the
// epilogue.
template <class Tiling, class Sums>
MOERT_DEVICE_INLINE void spread_part(const Sums& c, int part, float* sums) {
  constexpr int kSums = kSumColumns / 2;
#pragma unroll
  for (int known = 0; known < Tiling::kParts; ++known) {
    if (known != part) continue;
#pragma unroll
    for (int i = 0; i < kSums; i += 2) {
      const int lane = lane_id(), column = sum_column(lane, i);
      float* to = sums + sum_place(sum_row(lane, i), column / kStoredColumns) + column % kStoredColumns;
      *reinterpret_cast<float2*>(to) = make_float2(c.sum(known * kSums + i), c.sum(known * kSums + i + 1));
    }
  }
}

// The sums of a warp, rows 16 warp to 16 warp + 15 of the tile, through the epilogue; a lane stores eight columns of y
// at once.
template <class Tiling, class Sums, class T>
MOERT_DEVICE_INLINE void store_sums(const Product<T>& p, const TileWork& work, int warp, const Sums& c, float* sums) {
  constexpr bool kGated = Tiling::kGated;
  constexpr int kGroups = kGated ? kSumGroups / 2 : kSumGroups;
  const int first_row = kSumRows * warp, rows = work.rows.rows - first_row, lane = lane_id();
  if (rows <= 0) return;
#pragma unroll 1
  for (int part = 0; part < Tiling::kParts; ++part) {
    spread_part<Tiling>(c, part, sums);
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < kSumRows * kGroups; i += kWarp) {
      const int row = i / kGroups, group = i % kGroups;
      const int64_t column = work.first + (part * kGroups + group) * kStoredColumns;
      if (row >= rows || column >= p.N) continue;
      float gate[kStoredColumns], up[kStoredColumns];
      const float* gates = sums + sum_place(row, kGated ? 2 * group : group);
      const float* ups = sums + sum_place(row, kGated ? 2 * group + 1 : group);
#pragma unroll
      for (int j = 0; j < kStoredColumns; j += 4) {
        const float4 g = *reinterpret_cast<const float4*>(gates + j), u = *reinterpret_cast<const float4*>(ups + j);
        gate[j] = g.x, gate[j + 1] = g.y, gate[j + 2] = g.z, gate[j + 3] = g.w;
        up[j] = u.x, up[j + 1] = u.y, up[j + 2] = u.z, up[j + 3] = u.w;
      }
      p.epilogue.store(work.rows.expert, work.rows.row + first_row + row, column, gate, up);
    }
    __syncwarp();
  }
}

template <class Tiling, class T>
MOERT_DEVICE_INLINE void consume(const PersistentProduct<T>& q, PersistentShared<Tiling>& shared, int group) {
  const Product<T>& p = q.p;
  SlicePair<typename Tiling::Element, Tiling::kW, Tiling::kRing> product(shared.x[0], shared.w[0], group);
  RingPlace<Tiling::kRing> place;
  const auto leave = [&](int stage) {
    if (lane_id() == 0) arrive(shared.empty[stage]);
  };
  TileWalk<Tiling, T> walk(p);
  for (int64_t tile = blockIdx.x;; tile += gridDim.x) {
    const TileWork work = walk.at(tile);
    if (work.slices == 0) break;

    // A stage is left one slice late, so that one product always runs
    int before = 0;
#pragma unroll 1
    for (int slice = 0; slice < work.slices; ++slice, place.advance()) {
      wait(shared.full[place.stage], place.parity);
      product.start(place.stage, slice == 0);
      product.template finish<1>();
      if (slice > 0) leave(before);
      before = place.stage;
    }
    product.template finish<0>();
    leave(before);
    store_sums<Tiling>(p, work, warp_id(), product, shared.sums[warp_id()]);
  }

  // The slots that no expert has
  const int64_t used = p.offsets[p.E] < 0 ? 0 : p.offsets[p.E];
  for (int64_t row = used + blockIdx.x; row < p.S; row += gridDim.x)
    for (int64_t column = threadIdx.x; column < p.N; column += kConsumers) p.epilogue.clear(row, column);
}

template <class Tiling, class T>
__global__ void __launch_bounds__(kPersistentThreads, 1)
    grouped_gemm_persistent_kernel(const __grid_constant__ PersistentProduct<T> q) {
  MOERT_SHARED(char, memory);
  auto& shared = *reinterpret_cast<PersistentShared<Tiling>*>(memory + (-shared_address(memory) & (kSliceAlign - 1)));
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tiling::kRing; ++i) {
      init(shared.full[i], kFullArrivals<Tiling>);
      init(shared.empty[i], kConsumerWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
  if (group == kConsumers / kWarpgroup) {
    give_registers<kProducerRegisters>();
    produce(q, shared);
  } else {
    take_registers<kConsumerRegisters>();
    consume(q, shared, group);
  }
}

}  // namespace moert::cuda
