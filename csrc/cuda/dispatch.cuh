// Rows packed for the ranks that hold their experts: memory-bound, a warp for each record.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "cuda/simt.h"
#include "moert/dispatch.h"
#include "moert/fp8.h"

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

// What follows a row of `begin` bytes.
MOERT_DEVICE_INLINE void finish_record(const Packing& p, const RecordLayout& layout, int64_t begin, int64_t n,
                                       int64_t token, unsigned char* record) {
  const int64_t rank = rank_of_slot(p.offsets, p.R, n);
  for (int64_t byte = begin + 2 * lane_id(); byte < layout.bytes; byte += 2 * kWarp)
    *reinterpret_cast<uint16_t*>(record + byte) = after_row(p, layout, byte, token, rank);
}

// records[n - first]: the row of tokens[n], H units of Unit, and what follows it.
template <typename Unit>
__global__ void __launch_bounds__(kRecordWarps* kWarp)
    pack_kernel(const Packing p, const RecordLayout layout, int64_t x_stride, int64_t units, unsigned char* records) {
  const int64_t i = int64_t(blockIdx.x) * kRecordWarps + warp_id(), n = p.first + i;
  if (n >= p.last) return;
  const int32_t asked = p.tokens[n];
  const int64_t token = asked >= 0 && asked < p.T ? asked : -1;
  const Unit* from = static_cast<const Unit*>(p.x) + (token < 0 ? 0 : token) * x_stride;
  unsigned char* record = records + i * layout.bytes;
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
  finish_record(p, layout, units * int64_t(sizeof(Unit)), n, token, record);
}

MOERT_DEVICE_INLINE uint32_t code_of(float x, Payload payload) {
  if (payload == Payload::int8) return uint32_t(int32_t(rintf(x))) & 0xffu;
  return to_e4m3(x);
}

// The same of rounded rows: four elements, a word, to a lane.
template <typename T>
__global__ void __launch_bounds__(kRecordWarps* kWarp)
    pack_rounded_kernel(const Packing p, const RecordLayout layout, unsigned char* records) {
  const int64_t i = int64_t(blockIdx.x) * kRecordWarps + warp_id(), n = p.first + i;
  if (n >= p.last) return;
  const int32_t asked = p.tokens[n];
  const int64_t token = asked >= 0 && asked < p.T ? asked : -1, H = token < 0 ? 0 : p.H;
  const T* row = static_cast<const T*>(p.x) + (token < 0 ? 0 : token) * p.x_stride;
  uint32_t most = 0;  // as integers magnitudes keep their order, and what is not finite is above all
  for (int64_t h = lane_id(); h < H; h += kWarp) {
    const uint32_t magnitude = float_to_bits(widen(row[h])) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  most = warp_max(most);
  const float largest = largest_of(p.payload);
  const float scale = most < 0x7f800000u ? bits_to_float(most) / largest : bits_to_float(0x7fc00000u);
  unsigned char* record = records + i * layout.bytes;
  const int64_t place = scale_place(p.H);
  for (int64_t word = lane_id(); word < place / 4; word += kWarp) {
    uint32_t codes = 0;
    for (int b = 0; b < 4; ++b) {
      const int64_t h = 4 * word + b;
      if (h >= H || !(scale > 0)) continue;
      // A scale that is not normal may be too small by a third.
      const float x = fminf(fmaxf(widen(row[h]) / scale, -largest), largest);
      codes |= code_of(x, p.payload) << 8 * b;
    }
    reinterpret_cast<uint32_t*>(record)[word] = codes;
  }
  if (lane_id() == 0) *reinterpret_cast<float*>(record + place) = scale;
  finish_record(p, layout, place + 4, n, token, record);
}

MOERT_DEVICE_INLINE float value_of(uint8_t code, Payload payload) {
  return payload == Payload::int8 ? float(int8_t(code)) : e4m3_to_float(code);
}

// A warp for each row.
template <typename T>
__global__ void __launch_bounds__(kRecordWarps* kWarp) unpack_kernel(const Unpacking u, T* rows) {
  const int64_t m = int64_t(blockIdx.x) * kRecordWarps + warp_id();
  if (m >= u.M) return;
  const unsigned char* record = static_cast<const unsigned char*>(u.records) + m * u.bytes;
  float scale;
  memcpy(&scale, record + scale_place(u.H), 4);  // records may begin anywhere
  for (int64_t h = lane_id(); h < u.H; h += kWarp) {
    const float x = value_of(record[h], u.payload) * scale;
    // The largest magnitude times its scale may round past float32; NaN stays.
    rows[m * u.H + h] = narrow<T>(x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x);
  }
}

}  // namespace moert::cuda
