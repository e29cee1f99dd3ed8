// Rows packed for the ranks that hold their experts: memory-bound, a warp for each record.
#pragma once

#include "cuda/simt.h"
#include "moert/dispatch.h"

namespace moert::cuda {

// The rank of an expert, -1 for what is none.
MOERT_DEVICE_INLINE int32_t rank_of(int32_t id, const int32_t* expert_to_rank, int64_t E, int64_t R) {
  const int32_t rank = id >= 0 && id < E ? expert_to_rank[id] : -1;
  return rank < R ? rank : -1;
}

// out [T, k]: where each choice goes, -1 where an earlier one of its token goes there too.
__global__ void __launch_bounds__(256)
    choice_ranks_kernel(const int32_t* ids, int64_t choices, int64_t k, const int32_t* expert_to_rank, int64_t E,
                        int64_t R, int32_t* out) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= choices) return;
  int32_t rank = rank_of(ids[i], expert_to_rank, E, R);
  for (int64_t other = i / k * k; other < i; ++other)
    if (rank_of(ids[other], expert_to_rank, E, R) == rank) rank = -1;
  out[i] = rank < 0 ? -1 : rank;
}

constexpr int kRecordWarps = 8;

// The rank whose slots slot n is one of.
MOERT_DEVICE_INLINE int64_t rank_of_slot(const int32_t* offsets, int64_t R, int64_t n) {
  int64_t low = 0, high = R;  // offsets[low] <= n < offsets[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle] <= n)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Two bytes of what follows the row in a record: weights, ids, and zeros between and after them.
MOERT_DEVICE_INLINE uint16_t after_row(const Packing& p, const RecordLayout& layout, int64_t byte, int64_t token,
                                       int64_t rank) {
  const bool is_weight = byte >= layout.weights && byte < layout.ids;
  const int64_t j = is_weight ? (byte - layout.weights) / p.weight_size : (byte - layout.ids) / 2;
  const uint16_t nothing = byte < layout.ids ? 0 : uint16_t(-1);
  if (byte < layout.weights || j >= p.k) return 0;
  if (token < 0) return nothing;
  const int32_t id = p.ids[token * p.k + j];
  if (rank_of(id, p.expert_to_rank, p.E, p.R) != rank) return nothing;
  const int32_t local = p.local_ids[id];
  if (local < 0 || local > kMostLocalExperts) return nothing;
  if (is_weight) {
    const auto* weights = static_cast<const uint16_t*>(p.weights) + token * p.k * (p.weight_size / 2);
    return weights[(byte - layout.weights) / 2];
  }
  return uint16_t(local);
}

// records[n]: the row of tokens[n], H units of Unit, and what follows it.
template <typename Unit>
__global__ void __launch_bounds__(kRecordWarps* kWarp)
    pack_kernel(const Packing p, const RecordLayout layout, int64_t x_stride, int64_t units, unsigned char* records) {
  const int64_t n = int64_t(blockIdx.x) * kRecordWarps + warp_id();
  if (n >= p.N) return;
  const int32_t asked = p.tokens[n];
  const int64_t token = asked >= 0 && asked < p.T ? asked : -1;
  const Unit* from = static_cast<const Unit*>(p.x) + (token < 0 ? 0 : token) * x_stride;
  unsigned char* record = records + n * layout.bytes;
  Unit* to = reinterpret_cast<Unit*>(record);
  constexpr int kAhead = 4;
  for (int64_t first = lane_id(); first < units; first += kAhead * kWarp) {
    Unit copies[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      copies[i] = Unit{};
      if (token < 0 || first + i * kWarp >= units) continue;
      if constexpr (sizeof(Unit) == sizeof(Chunk))
        copies[i] = load_chunk(from + first + i * kWarp);
      else
        copies[i] = from[first + i * kWarp];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i * kWarp >= units) continue;
      if constexpr (sizeof(Unit) == sizeof(Chunk))
        store_chunk(to + first + i * kWarp, copies[i]);
      else
        to[first + i * kWarp] = copies[i];
    }
  }
  const int64_t rank = rank_of_slot(p.offsets, p.R, n);
  for (int64_t byte = units * int64_t(sizeof(Unit)) + 2 * lane_id(); byte < layout.bytes; byte += 2 * kWarp)
    *reinterpret_cast<uint16_t*>(record + byte) = after_row(p, layout, byte, token, rank);
}

}  // namespace moert::cuda
