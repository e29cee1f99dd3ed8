// Rows of x rounded to codes of a scale a row or group, by a CPU's rule.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/packed_product_mma.h"

namespace moert::cuda {

constexpr int kRoundThreads = 128;

struct RowRounding {
  const void* x;  // rows `stride` elements apart, of `dtype`
  DType dtype;
  int64_t stride, K;
  const int32_t* count;  // how many rows there are, or null: one a block
  int64_t group;         // columns that share a scale, at most 256; 0: the row
  ColumnOrder order;
  int64_t length;  // order.length(K)
  void* rows;      // of CodeStep, or of float32: code times scale, for kernels that multiply floats
};

MOERT_DEVICE_INLINE uint32_t magnitude(float x) { return float_to_bits(x) & 0x7fffffffu; }

struct Int8Code {
  static constexpr float kLargest = kLargestInt8;
  MOERT_DEVICE_INLINE static uint8_t round(float x) {
#if defined(__CUDA_ARCH__)
    return uint8_t(__float2int_rn(x));
#else
    return uint8_t(int32_t(std::nearbyint(x)));
#endif
  }
  MOERT_DEVICE_INLINE static float value(uint8_t code) { return int8_t(code); }
};

struct E4m3Code {
  static constexpr float kLargest = kLargestE4m3;
  MOERT_DEVICE_INLINE static uint8_t round(float x) { return to_e4m3(x); }
  MOERT_DEVICE_INLINE static float value(uint8_t code) { return e4m3_to_float(code); }
};

// The largest magnitude of a row, for all threads of the block.
MOERT_DEVICE_INLINE uint32_t largest_of_row(const RowRounding& p, int64_t row) {
  __shared__ uint32_t of_warps[kRoundThreads / kWarp];
  uint32_t most = 0;
  for (int64_t c = threadIdx.x; c < p.K; c += kRoundThreads) {
    const uint32_t bits = magnitude(read_element<float>(p.x, p.dtype, row * p.stride + c));
    most = bits > most ? bits : most;
  }
  most = warp_max(most);
  if (lane_id() == 0) of_warps[warp_id()] = most;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRoundThreads / kWarp; ++i) most = of_warps[i] > most ? of_warps[i] : most;
  return most;
}

// Eight elements of a thread: those of lane i % 4 of span i / 4, or neighbours.
template <class Code, bool kCodes>
MOERT_DEVICE_INLINE void store_rounded(const RowRounding& p, int64_t row, int64_t i, const uint8_t (&codes)[8],
                                       float scale) {
  if constexpr (kCodes) {
    const CodeStep step{p.order.step};
    const int64_t span = i / 4, steps = p.length / step.columns;
    const int at = int(span % step.spans()), t = int(i % 4);
    char* to = static_cast<char*>(p.rows) + (row * steps + span / step.spans()) * step.bytes();
    Neighbours<uint32_t, 2> words{};
#pragma unroll
    for (int e = 0; e < 8; ++e) words.values[e / 4] |= uint32_t(codes[e]) << 8 * (e % 4);
    *reinterpret_cast<Neighbours<uint32_t, 2>*>(to + step.place(at, t)) = words;
    if (t == 0 && at < 4) reinterpret_cast<float*>(to + step.code_bytes())[at] = scale;
  } else {
    float* to = static_cast<float*>(p.rows) + row * p.length;
#pragma unroll
    for (int e = 0; e < 8; ++e) to[p.order.position(8 * i + e)] = Code::value(codes[e]) * scale;
  }
}

// A block a row.
template <class Code, bool kCodes>
__global__ void __launch_bounds__(kRoundThreads) round_rows(const RowRounding p) {
  const int64_t row = blockIdx.x, chunks = p.length / 8;
  if (p.count && row >= *p.count) return;
  const float all = p.group ? 0 : row_scale(largest_of_row(p, row), Code::kLargest);
  for (int64_t first = warp_id() * kWarp; first < chunks; first += kRoundThreads) {
    const int64_t i = first + lane_id();
    float values[8];
    uint32_t most = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int64_t column = kCodes ? p.order.column(8 * i + e) : 8 * i + e;
      values[e] = i < chunks && column < p.K ? read_element<float>(p.x, p.dtype, row * p.stride + column) : 0.0f;
      most = magnitude(values[e]) > most ? magnitude(values[e]) : most;
    }
    for (int step = 1; step < p.group / 8; step *= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, most, step);
      most = other > most ? other : most;
    }
    const float scale = p.group ? row_scale(most, Code::kLargest) : all;
    uint8_t codes[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) codes[e] = scale > 0 ? Code::round(values[e] / scale) : uint8_t(0);
    if (i < chunks) store_rounded<Code, kCodes>(p, row, i, codes, scale);
  }
}

}  // namespace moert::cuda
