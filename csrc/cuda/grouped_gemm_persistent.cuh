// Grouped GEMM for sm_90a by as many thread blocks as there are multiprocessors, each of which walks over tiles of 128
// rows of x by 128 or 256 rows of w.  Four warps bring slices of 64 of the summed dimension into a ring in shared
// memory; two groups of four warps multiply them, 64 rows of the tile each, and store the sums while the first already
// fill the ring for the next tile.  Where experts have few rows a tile is 8 to 64 rows of x by 128 of w, of which the
// two groups have 64 rows of w each: the tensor cores' M side is never shorter, and weights are what there is much of.
// With tiles of 128 by 128 of rows in expert order the groups take turns: one stores while the other multiplies.  So
// they do with few rows of x where w is MN-major: of its 64 gates and 64 ups no group would have both, else.
//
// The weights are one tensor of which the copy engine takes boxes, with the expert as a coordinate: nothing is
// rewritten from expert to expert.  Rows of x that lie in expert order it brings as well; others are gathered in
// 16-byte pieces.  A tile's rows past its expert's end are read, or are zeros, and are not stored.  Two blocks of a
// cluster have neighbouring rows of x; each asks for half of the rows of w, for both.
//
// Slice n of all that a block multiplies lies in stage n % kRing.  full[stage] ends a phase when both slices are there,
// empty[stage] when all warps of the cluster that multiply have read them, so that both count the same uses of the
// stage.
#pragma once

#include "cuda/activation_backward.h"
#include "cuda/persistent_walk.cuh"

namespace moert::cuda {

constexpr int kConsumerWarps = 8, kConsumers = kConsumerWarps * kWarp, kProducers = kWarpgroup;
constexpr int kPersistentThreads = kConsumers + kProducers;
// Registers of a thread, in all as many as the 168 that each has at first.
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
static_assert(kProducers * kProducerRegisters + kConsumers * kConsumerRegisters <= 168 * kPersistentThreads);

// A kind of tile.
template <class Element_, int kX_, int kW_, bool kGathered_, bool kMajor_>
struct Tiling {
  using Element = Element_;
  static constexpr bool kGathered = kGathered_, kMajor = kMajor_;  // kMajor: neighbours of w along K lie side by side
  static constexpr int kX = kX_, kW = kW_;                         // rows of x and of w
  static constexpr bool kSwapped = kX < kWideX;                    // w on the M side
  // Of the groups of warps; else each has half of every tile.
  static constexpr bool kTurns = kSwapped ? !kMajor : kX == kWideX && kW == kNarrowW && !kGathered;
  static constexpr int kGroups = kTurns ? 1 : 2;                        // at work on a tile
  static constexpr int kRing = 192 * 1024 / ((kX + kW) * 2 * kSliceK);  // as many as fit
  // Rows of w of a box, of which an MN-major one has its 128 bytes along.
  static constexpr int kBox = kMajor && !kTurns ? 128 : 64, kBoxes = kW / kBox;
  using Pair =
      SlicePair<Element, kSwapped ? kX : kW, kRing, kSwapped ? kMajor : true, kSwapped ? true : kMajor, kGroups>;
};

// A warp's sums on their way from fragments to rows: of 16 rows of x by 64 of w at a time, or of all rows of x by 16
// of w, in groups of eight rows of w that are exchanged so that what is written at once meets in no bank.
template <class Tiling>
struct SumTile {
  static constexpr bool kSwapped = Tiling::kSwapped;
  static constexpr int kRows = kSwapped ? Tiling::kX : 16, kGroups = kSwapped ? 2 : 8;
  // One after the other, across w and then in the other 64 rows of x, or, of all rows of x, in the other 64 of w, if
  // they are the group's too.
  static constexpr int kAcross = kSwapped ? 1 : Tiling::kW / 64, kParts = kAcross * 2 / Tiling::kGroups;
  static constexpr int kSums = kRows * kGroups * kStoredColumns;

  static MOERT_HOST_DEVICE constexpr int place(int row, int group) {
    if constexpr (kSwapped) return row / 2 * 32 + ((row % 2 * 2 + group) ^ row / 2 % 4) * kStoredColumns;
    return row * 64 + (group ^ row % 8) * kStoredColumns;
  }
};

template <class Tiling>
struct PersistentShared {
  typename Tiling::Element x[Tiling::kRing][Tiling::kX * kSliceK], w[Tiling::kRing][Tiling::kW * kSliceK];
  alignas(16) float sums[kConsumerWarps][SumTile<Tiling>::kSums];
  Barrier full[Tiling::kRing], empty[Tiling::kRing], turn[2];  // turn: of a group of warps, where they take turns
};

template <class Tiling>
constexpr int kPersistentBytes = int(sizeof(PersistentShared<Tiling>)) + kSliceAlign;

// A thread's share of the gathered slices of a tile: one piece of every sixteenth row.
template <class Tiling, class T>
struct Gatherer {
  static constexpr int kRows = kProducers / kPieces, kCopies = Tiling::kX < kRows ? 1 : Tiling::kX / kRows;
  const T* from[kCopies];
  int row, piece;

  MOERT_DEVICE_INLINE explicit Gatherer(int thread) : row(thread / kPieces), piece(thread % kPieces) {}

  MOERT_DEVICE_INLINE void find(const RowsOf<T>& x, const RowTile& rows) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int m = row + i * kRows;
      from[i] = m < rows.rows ? x.row(rows.row + m) : nullptr;
    }
  }

  // Zeros for rows that are not there and past K, where w's boxes have zeros too: 0 times what lay there might be NaN.
  MOERT_DEVICE_INLINE void load(int64_t k, int64_t K, typename Tiling::Element* to) const {
    k += piece * kPiece;
    if (Tiling::kX < kRows && row >= Tiling::kX) return;
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

// Box i of a tile's rows of w, for the block's own ring or for the whole cluster's.
template <class Tiling, class Q>
MOERT_DEVICE_INLINE void copy_weights(const Q& q, const TileWork& work, int i, int k, Barrier& full,
                                      typename Tiling::Element* w) {
  const int first = work.first + i * (q.gated() ? Tiling::kBox / 2 : Tiling::kBox), expert = work.rows.expert;
  const Gating gating = q.gating();
  typename Tiling::Element* to = w + i * Tiling::kBox * kSliceK;
  const auto copy = [&](auto... at) {
    if (Tiling::kBoxes > 1 && q.tile.cluster > 1)
      copy_box_to_all(q.w, q.tile.cluster, full, to, at...);
    else
      copy_box(q.w, full, to, at...);
  };
  if constexpr (Tiling::kMajor) {
    if (gating == Gating::eights)
      copy(k, 0, 0, first / kStoredColumns, expert);
    else
      copy(k, first, expert);
  } else {
    if (gating == Gating::halves)
      copy(work.first + i / 2 * Tiling::kBox, k, i % 2, expert);
    else
      copy(gating == Gating::alternate ? 2 * first : first, k, expert);
  }
}

// One thread asks for a stage's boxes.
template <class Tiling, class Q>
MOERT_DEVICE_INLINE void copy_boxes(const Q& q, const TileWork& work, int rank, int k, Barrier& full,
                                    typename Tiling::Element* x, typename Tiling::Element* w) {
  constexpr int kRowBytes = 2 * kSliceK;
  const int boxes = Tiling::kGathered ? 0 : int(ceil_div(work.rows.rows, kXBox));
  arrive_expecting(full, (Tiling::kW + boxes * kXBox) * kRowBytes);
  const int blocks = q.tile.cluster, end = (rank + 1) * Tiling::kBoxes / blocks;
#pragma unroll 1
  for (int i = rank * Tiling::kBoxes / blocks; i < end; ++i) copy_weights<Tiling>(q, work, i, k, full, w);
  for (int i = 0; i < boxes; ++i) copy_box(q.x, full, x + i * kXBox * kSliceK, k, work.rows.row + i * kXBox);
}

template <class Tiling, class Q>
MOERT_DEVICE_INLINE void produce(const Q& q, PersistentShared<Tiling>& shared, int rank) {
  static_assert(kOnTheirWay <= Tiling::kRing - 2);
  const auto& p = q.p;
  const int thread = int(threadIdx.x) - kConsumers, blocks = q.tile.cluster;
  const bool leads = thread == 0;
  if (!Tiling::kGathered && thread >= kWarp) return;
  Gatherer<Tiling, typename Q::Type> gatherer(thread);
  RingPlace<Tiling::kRing> place, oldest;  // oldest: of the slices on their way
  int on_their_way = 0;
  TileWalk<Q> walk(q);
  for (int64_t unit = blockIdx.x / blocks;; unit += gridDim.x / blocks) {
    const TileWork work = walk.at(unit, rank);
    if (work.slices == 0) break;
    if constexpr (Tiling::kGathered) gatherer.find(p.x, work.rows);
#pragma unroll 1
    for (int slice = 0; slice < work.slices; ++slice, place.advance()) {
      const int stage = place.stage, k = (work.first_slice + slice) * kSliceK;
      // For the use before; of a first use there is none.  Who only looked on might miss a phase.
      if (Tiling::kGathered || leads) wait(shared.empty[stage], place.parity ^ 1);
      if (leads) copy_boxes<Tiling>(q, work, rank, k, shared.full[stage], shared.x[stage], shared.w[stage]);
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

// Which of a thread's sums comes to place i of a part.  They follow each other, but for halves: the 64 gates and 64 ups
// of two parts come as eight gates, the same eight of up, and so on, half of them in each.
template <class Tiling>
constexpr int sum_of_part(int part, int i, bool halves) {
  if (Tiling::kSwapped) {
    constexpr int kSums = Tiling::kX / 2;  // sums 2 and 3 of four are eight rows of w further
    return halves ? i / 2 % 2 * kSums + i / 4 * 4 + part * 2 + i % 2 : part * kSums + i;
  }
  const int group = i / 4, pair = part / 2 * 2;
  return halves ? (pair + group % 2) * 32 + (part % 2 * 4 + group / 2) * 4 + i % 4 : part * 32 + i;
}

// A part of the sums of a warp.  Registers have no index: there is code for each part, but only one copy of the
// epilogue.
template <class Tiling, class Sums>
MOERT_DEVICE_INLINE void spread_part(const Sums& c, int part, [[maybe_unused]] bool halves, float* sums) {
  using To = SumTile<Tiling>;
  constexpr int kSums = Tiling::kSwapped ? Tiling::kX / 2 : 32;
  const int lane = lane_id();
  const auto sum = [&](int known, int i) {
    const float plain = c.sum(sum_of_part<Tiling>(known, i, false));
    if constexpr (Tiling::kMajor) return plain;
    return halves ? c.sum(sum_of_part<Tiling>(known, i, true)) : plain;
  };
#pragma unroll
  for (int known = 0; known < To::kParts; ++known) {
    if (known != part) continue;
#pragma unroll
    for (int i = 0; i < kSums; i += 2) {
      const int row = sum_row(lane, i), column = sum_column(lane, i);  // of the tensor cores' tile
      const float a = sum(known, i), b = sum(known, i + 1);
      if constexpr (Tiling::kSwapped) {
        sums[To::place(column, row / kStoredColumns) + row % kStoredColumns] = a;
        sums[To::place(column + 1, row / kStoredColumns) + row % kStoredColumns] = b;
      } else {
        *reinterpret_cast<float2*>(sums + To::place(row, column / kStoredColumns) + column % kStoredColumns) =
            make_float2(a, b);
      }
    }
  }
}

MOERT_DEVICE_INLINE void read_sums(const float* from, float (&to)[kStoredColumns]) {
#pragma unroll
  for (int j = 0; j < kStoredColumns; j += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + j);
    to[j] = four.x, to[j + 1] = four.y, to[j + 2] = four.z, to[j + 3] = four.w;
  }
}

// The sums of a warp, of rows `first_row` on of x and of groups `first_group` on of eight rows of w, through the
// epilogue, or as they are where other parts of K are to be added; a lane stores eight columns of y at once.
template <class Tiling, class Q>
MOERT_DEVICE_INLINE void store_part(const Q& q, const TileWork& work, int64_t unit, int first_row, int first_group,
                                    const float* sums) {
  using From = SumTile<Tiling>;
  [[maybe_unused]] const Gating gating = q.gating();
  const int pair = q.gated() ? 2 : 1, groups = From::kGroups / pair, rows = work.rows.rows - first_row;
#pragma unroll 1
  for (int i = lane_id(); i < From::kRows * groups; i += kWarp) {
    const int row = i / groups, group = i % groups * pair;
    const int64_t column = work.first + (first_group + group) / pair * kStoredColumns;
    if (row >= rows || column >= q.p.N) continue;
    float gate[kStoredColumns], up[kStoredColumns];
    read_sums(sums + From::place(row, group), gate);
    read_sums(sums + From::place(row, group + pair - 1), up);
    if constexpr (!Tiling::kMajor)
      if (gating == Gating::alternate) separate(gate, up);
    if (!q.sums) {
      q.p.epilogue.store(work.rows.expert, work.rows.row + first_row + row, column, gate, up);
      continue;
    }
    float* to = q.sums + (unit * Tiling::kX + first_row + row) * Tiling::kW + (first_group + group) * kStoredColumns;
#pragma unroll
    for (int j = 0; j < kStoredColumns; ++j) {
      to[j] = gate[j];
      if (pair == 2) to[kStoredColumns + j] = up[j];
    }
  }
}

// The same where an epilogue sums along rows, which a warp's 64 columns are enough for.
template <class Tiling, class Q>
MOERT_DEVICE_INLINE void store_part_and_sums(const Q& q, const TileWork& work, int first_row, int first_group,
                                             const float* sums) {
  using From = SumTile<Tiling>;
  static_assert(!Tiling::kSwapped && From::kGroups == kDotColumns / kStoredColumns);
#pragma unroll 1
  for (int i = lane_id(); i < From::kRows * From::kGroups; i += kWarp) {
    const int row = i / From::kGroups, group = i % From::kGroups;
    const int64_t column = work.first + (first_group + group) * kStoredColumns, slot = work.rows.row + first_row + row;
    const bool inside = row < work.rows.rows - first_row && column < q.p.N;
    float g[kStoredColumns];
    read_sums(sums + From::place(row, group), g);
    const float part = inside ? q.p.epilogue.store(work.rows.expert, slot, column, g, g) : 0.0f;
    const float sum = warp_sum<From::kGroups>(part);
    if (inside && group == 0) q.p.epilogue.put_sum(slot, column, sum);
  }
}

template <class Tiling, class Sums, class Q>
MOERT_DEVICE_INLINE void store_sums(const Q& q, const TileWork& work, int64_t unit, const Sums& c, float* sums) {
  using From = SumTile<Tiling>;
  const int warp = Tiling::kTurns ? warp_id() % 4 : warp_id();
  const bool halves = q.gating() == Gating::halves;
#pragma unroll 1
  for (int part = 0; part < From::kParts; ++part) {
    const int first_row = Tiling::kSwapped ? 0 : From::kRows * warp + part / From::kAcross * 64;
    if (work.rows.rows <= first_row) return;
    // Of w a warp has 16 rows in each 64, or, of halves, 32 that follow each other once they are spread.
    const int across = Tiling::kSwapped ? (halves ? 2 * warp + part : warp + part * 4) : part % From::kAcross;
    spread_part<Tiling>(c, part, halves, sums);
    __syncwarp();
    if constexpr (Q::Stores::kSumsRows)
      store_part_and_sums<Tiling>(q, work, first_row, From::kGroups * across, sums);
    else
      store_part<Tiling>(q, work, unit, first_row, From::kGroups * across, sums);
    __syncwarp();
  }
}

// Whether none of a group's rows of the tile, of x or of w, is there.
template <class Tiling, class Q>
MOERT_DEVICE_INLINE bool has_none(const Q& q, const TileWork& work, int group) {
  if constexpr (Tiling::kSwapped) return !Tiling::kTurns && work.first + group * q.columns() / 2 >= q.p.N;
  return work.rows.rows <= (Tiling::kTurns ? 0 : group * 64);
}

// Whose turn it is, where the two groups of warps take turns with tiles: a group waits for slices only when the other
// has seen all of its own, as who looks two phases ahead takes an old one for a new one.
template <class Tiling>
class Turns {
  PersistentShared<Tiling>& shared_;
  const int group_;
  bool mine_;
  uint32_t parity_;  // of a barrier without a past, parity 1 has ended: group 0 begins

 public:
  MOERT_DEVICE_INLINE Turns(PersistentShared<Tiling>& shared, int group)
      : shared_(shared), group_(group), mine_(group == 1), parity_(group == 0) {}

  // Of the next tile.
  MOERT_DEVICE_INLINE bool is_mine() {
    if constexpr (!Tiling::kTurns) return true;
    return mine_ = !mine_;
  }

  MOERT_DEVICE_INLINE void begin() {
    if constexpr (!Tiling::kTurns) return;
    wait(shared_.turn[group_], parity_);
    parity_ ^= 1;
  }

  MOERT_DEVICE_INLINE void end() {
    if constexpr (!Tiling::kTurns) return;
    __syncwarp();
    if (lane_id() == 0) arrive(shared_.turn[1 - group_]);
  }
};

template <class Tiling, class Q>
MOERT_DEVICE_INLINE void consume(const Q& q, PersistentShared<Tiling>& shared, int rank, int group) {
  const auto& p = q.p;
  const int blocks = q.tile.cluster;
  typename Tiling::Pair product(Tiling::kSwapped ? shared.w[0] : shared.x[0],
                                Tiling::kSwapped ? shared.x[0] : shared.w[0], Tiling::kTurns ? 0 : group);
  RingPlace<Tiling::kRing> place;
  const auto leave = [&](int stage) {
    if (lane_id() < blocks) arrive_at(shared.empty[stage], lane_id());
  };
  TileWalk<Q> walk(q);
  Turns<Tiling> turns(shared, group);
  for (int64_t unit = blockIdx.x / blocks;; unit += gridDim.x / blocks) {
    const TileWork work = walk.at(unit, rank);
    if (work.slices == 0) break;
    if (!turns.is_mine()) {
      place.advance(work.slices);
      continue;
    }
    turns.begin();

    // The tensor cores are left to those who have something to multiply
    if (has_none<Tiling>(q, work, group)) {
#pragma unroll 1
      for (int slice = 0; slice < work.slices; ++slice, place.advance()) {
        wait(shared.full[place.stage], place.parity);
        __syncwarp();  // the other lanes have seen this phase
        leave(place.stage);
      }
      turns.end();
      continue;
    }

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
    turns.end();
    product.template finish<0>();
    leave(before);
    store_sums<Tiling>(q, work, unit, product, shared.sums[warp_id()]);
  }

  // The slots that no expert has
  const int64_t used = p.offsets[p.E] < 0 ? 0 : p.offsets[p.E];
  for (int64_t row = used + blockIdx.x; row < p.S; row += gridDim.x)
    for (int64_t column = threadIdx.x; column < p.N; column += kConsumers) p.epilogue.clear(row, column);
}

template <class Tiling, class Q>
__global__ void __launch_bounds__(kPersistentThreads, 1) grouped_gemm_persistent_kernel(const __grid_constant__ Q q) {
  MOERT_SHARED(char, memory);
  auto& shared = *reinterpret_cast<PersistentShared<Tiling>*>(memory + (-shared_address(memory) & (kSliceAlign - 1)));
  const int rank = q.tile.cluster > 1 ? cluster_rank() : 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tiling::kRing; ++i) {
      init(shared.full[i], kFullArrivals<Tiling>);
      init(shared.empty[i], kConsumerWarps / (Tiling::kTurns ? 2 : 1) * q.tile.cluster);
    }
    for (Barrier& turn : shared.turn) init(turn, kConsumerWarps / 2);
    publish_barriers();
  }
  sync_cluster();
  const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0);
  if (group == kConsumers / kWarpgroup) {
    give_registers<kProducerRegisters>();
    produce(q, shared, rank);
  } else {
    take_registers<kConsumerRegisters>();
    consume(q, shared, rank, group);
  }
  // Until then the other block writes here
  sync_cluster();
}

}  // namespace moert::cuda
