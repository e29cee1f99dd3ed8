// Rows of x rounded to int8, by a CPU's rule: codes of a scale a row or every 32 columns.
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
  bool whole;            // a scale a row
  ColumnOrder order;
  int64_t length;  // order.length(K)
  void* rows;      // of Int8Step, or of float32: code times scale, for kernels that have no products of integers
};

MOERT_DEVICE_INLINE uint32_t magnitude(float x) { return float_to_bits(x) & 0x7fffffffu; }

MOERT_DEVICE_INLINE int32_t int8_code(float x, float scale) {
  if (!(scale > 0)) return 0;
#if defined(__CUDA_ARCH__)
  return __float2int_rn(x / scale);
#else
  return int32_t(std::nearbyint(x / scale));
#endif
}

// int8_scale of the largest of a row, for all threads of the block.
MOERT_DEVICE_INLINE float row_scale(const RowRounding& p, int64_t row) {
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
  return int8_scale(most);
}

// Eight elements of a thread: those of lane i % 4 of span i / 4, or neighbours.
template <bool kCodes>
MOERT_DEVICE_INLINE void store_rounded(const RowRounding& p, int64_t row, int64_t i, const int32_t (&codes)[8],
                                       float scale) {
  if constexpr (kCodes) {
    const Int8Step step{p.order.step};
    const int64_t span = i / 4, steps = p.length / step.columns;
    const int at = int(span % step.spans()), t = int(i % 4);
    char* to = static_cast<char*>(p.rows) + (row * steps + span / step.spans()) * step.bytes();
    Neighbours<uint32_t, 2> words{};
#pragma unroll
    for (int e = 0; e < 8; ++e) words.values[e / 4] |= uint32_t(codes[e] & 0xff) << 8 * (e % 4);
    *reinterpret_cast<Neighbours<uint32_t, 2>*>(to + step.place(at, t)) = words;
    if (t == 0 && at < 4) reinterpret_cast<float*>(to + step.code_bytes())[at] = scale;
  } else {
    float* to = static_cast<float*>(p.rows) + row * p.length;
#pragma unroll
    for (int e = 0; e < 8; ++e) to[p.order.position(8 * i + e)] = float(codes[e]) * scale;
  }
}

// A block a row.
template <bool kCodes>
__global__ void __launch_bounds__(kRoundThreads) round_rows(const RowRounding p) {
  const int64_t row = blockIdx.x, chunks = p.length / 8;
  if (p.count && row >= *p.count) return;
  const float all = p.whole ? row_scale(p, row) : 0;
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
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, most, step);
      most = other > most ? other : most;
    }
    const float scale = p.whole ? all : int8_scale(most);
    int32_t codes[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) codes[e] = int8_code(values[e], scale);
    if (i < chunks) store_rounded<kCodes>(p, row, i, codes, scale);
  }
}

}  // namespace moert::cuda
