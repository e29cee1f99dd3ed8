// Packed weights of some experts as numbers in memory, for grouped products that know no formats.
#pragma once

#include "cuda/packed_weights.h"

namespace moert::cuda {

constexpr int kUnpackWarps = 8, kUnpackThreads = kUnpackWarps * kWarp;

__global__ void __launch_bounds__(kUnpackThreads) clear_used(int64_t E, int32_t* used) {
  const int64_t e = int64_t(blockIdx.x) * kUnpackThreads + threadIdx.x;
  if (e < E) used[e] = 0;
}

// used[e] = 1 of the experts that a choice has; the others keep their 0.
__global__ void __launch_bounds__(kUnpackThreads)
    mark_used(const int32_t* ids, int64_t choices, int32_t E, int32_t* used) {
  const int64_t i = int64_t(blockIdx.x) * kUnpackThreads + threadIdx.x;
  if (i < choices && ids[i] >= 0 && ids[i] < E) used[ids[i]] = 1;
}

// The choices of experts [first, first + count) as those of experts [0, count).
__global__ void __launch_bounds__(kUnpackThreads)
    choose_part(const int32_t* ids, int64_t choices, int32_t first, int32_t count, int32_t* chosen) {
  const int64_t i = int64_t(blockIdx.x) * kUnpackThreads + threadIdx.x;
  if (i >= choices) return;
  const int64_t e = int64_t(ids[i]) - first;
  chosen[i] = 0 <= e && e < count ? int32_t(e) : -1;
}

// sums += part, from 0 on where `begins`; out, where there is one, is the sum in the type of the part.
template <typename T>
__global__ void __launch_bounds__(kUnpackThreads)
    add_part(const T* part, int64_t n, bool begins, Acc<T>* sums, T* out) {
  const int64_t i = int64_t(blockIdx.x) * kUnpackThreads + threadIdx.x;
  if (i >= n) return;
  const Acc<T> sum = (begins ? Acc<T>(0) : sums[i]) + widen(part[i]);
  sums[i] = sum;
  if (out) out[i] = narrow<T>(sum);
}

// The experts [first, first + count) of which some are used, [count, rows, columns] of `dtype`.
struct Unpacking {
  PackedWeights w;
  const int32_t* used;  // [E]
  int64_t first, count;
  DType dtype;
  void* out;
};

// Four neighbours from element i on, which is a multiple of four; those from `left` on are left out.
MOERT_DEVICE_INLINE void write_four(void* p, DType dtype, int64_t i, const float (&values)[4], int64_t left) {
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (c < left) write_element(p, dtype, i + c, values[c]);
}

template <typename Codes>
MOERT_DEVICE_INLINE void unpack_row(const Unpacking& p, int64_t e, int64_t n, int64_t to) {
  const PackedWeights w = Codes::expert(p.w, e);
  const CodeRow row = Codes::row(w, n);
  const int64_t columns = w.matrix.packing.columns;
#pragma unroll 1
  for (int i = lane_id(); i < w.chunks; i += kWarp) {
    Codes codes;
    codes.load(w, row, i);
#pragma unroll
    for (int first = 0; first < Codes::kColumns; first += Codes::kShared) {
      const Scale scale = codes.scale(w, row, i, first);
#pragma unroll Codes::kUnrolled
      for (int j = first; j < first + Codes::kShared; j += 4) {
        float values[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) values[c] = scale.scale * codes.value(j + c, scale);
        const int64_t column = int64_t(i) * Codes::kColumns + j;
        write_four(p.out, p.dtype, to + column, values, columns - column);
      }
    }
  }
}

MOERT_DEVICE_INLINE void unpack_codewords(const Unpacking& p, int64_t e, int64_t n, int64_t to) {
  const int64_t K = p.w.matrix.packing.columns;
  const int64_t end =
      for_digits(p.w, e, n, [&](int64_t column, float weight) { write_element(p.out, p.dtype, to + column, weight); });
  for (int64_t c = end + lane_id(); c < K; c += kWarp) write_element(p.out, p.dtype, to + c, 0.0f);
}

// A warp a row.
template <typename Codes>
__global__ void __launch_bounds__(kUnpackThreads) unpack_weights(const Unpacking p) {
  const int64_t rows = p.w.matrix.packing.rows, row = int64_t(blockIdx.x) * kUnpackWarps + warp_id();
  if (row >= p.count * rows) return;
  const int64_t e = p.first + row / rows, to = row * p.w.matrix.packing.columns;
  if (!p.used[e]) return;
  if constexpr (std::is_same_v<Codes, Sub1Codes>)
    unpack_codewords(p, e, row % rows, to);
  else
    unpack_row<Codes>(p, e, row % rows, to);
}

}  // namespace moert::cuda
