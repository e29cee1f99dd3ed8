// Grouped products with packed weights: a warp multiplies a few weight rows, which it streams once, by up to kMostRows
// rows of one expert.
//
// The order of every sum is that of the columns and lanes alone, so a row's bits do not depend on the other rows.
#pragma once

#include "cuda/activation.h"
#include "cuda/expert_tiles.h"
#include "cuda/packed_weights.h"

namespace moert::cuda {

constexpr int kPackedWarps = 4, kPackedThreads = kPackedWarps * kWarp;

// Rows of x that a warp has at a time.
template <typename A>
constexpr int kMostRows = sizeof(A) == 8 ? 1 : 4;

// rows [T, length] of `to`, the columns of x [T, H] in another order, zeros where that has more.
template <typename A>
__global__ void __launch_bounds__(kPackedThreads)
    order_columns(const void* x, DType dtype, int64_t stride, int64_t T, int64_t H, ColumnOrder order, int64_t length,
                  DType to, void* rows) {
  const int64_t i = int64_t(blockIdx.x) * kPackedThreads + threadIdx.x;
  if (i >= T * length) return;
  const int64_t column = order.column(i % length);
  write_element(rows, to, i, column < H ? read_element<A>(x, dtype, i / length * stride + column) : A(0));
}

// y[s, n] = x[s] . w[n] of each slot s, or its activation.
template <typename A>
struct PackedProduct {
  int32_t S, E;
  int64_t N;               // outputs a slot; a gated activation's weights have 2 N rows
  const int32_t* offsets;  // [E + 1]
  const int32_t* index;    // the row of x of each slot; null: the slot's number
  const void* x;           // rows in the order of the weights, of A; on tensor cores of `dtype`
  int64_t x_stride;
  PackedWeights w;
  DType dtype;                 // of the biases, and of y where nothing is activated
  const void *bias, *up_bias;  // or null; [N] of each expert
  int64_t bias_expert, bias_step;
  const A* scale;  // [S], times the sums, or null
  bool activates;
  ActivationForm<A> form;
  void* y;  // [S, N]; activated: rows in the next product's order
  int64_t y_stride;
  DType act;  // of y where it is activated
  ColumnOrder order;
  int64_t written;  // columns of y, of which those from N on are zeros
  int64_t tiles;
  bool by_slot;  // a tile's number is its first slot

  void tile_rows(int64_t rows) {
    const int64_t all = num_row_tiles(S, E, rows);
    by_slot = S <= all, tiles = by_slot ? S : all;
  }
  MOERT_HOST_DEVICE bool gated() const { return activates && form.gated; }
  template <int kRows>
  MOERT_DEVICE_INLINE RowTile tile(int64_t i) const {
    return by_slot ? row_tile_of_slot(offsets, E, S, kRows, int32_t(i)) : row_tile(offsets, E, S, kRows, int32_t(i));
  }
  MOERT_DEVICE_INLINE A finished(A sum, const void* to_add, int64_t e, int64_t s, int64_t n) const {
    if (scale) sum *= scale[s];
    return to_add ? sum + read_element<A>(to_add, dtype, e * bias_expert + n * bias_step) : sum;
  }
  MOERT_DEVICE_INLINE void store(int64_t e, int64_t s, int64_t n, A sum, A up) const {
    if (n >= written) return;
    if (!activates) return write_element(y, dtype, s * y_stride + n, finished(sum, bias, e, s, n));
    A value = 0;
    if (n < N) value = activate(form, finished(sum, bias, e, s, n), form.gated ? finished(up, up_bias, e, s, n) : A(0));
    write_element(y, act, s * y_stride + order.position(n), value);
  }
};

// The totals of Count values over the lanes: lane l has that of value l / (kWarp / Count).
template <typename A, int Count>
MOERT_DEVICE_INLINE A sum_lanes(A (&v)[Count]) {
#pragma unroll
  for (int step = kWarp / 2, half = Count / 2; step > 0; step /= 2, half /= 2) {
    const bool upper = lane_id() & step;
    if (half == 0) v[0] += __shfl_xor_sync(kAllLanes, v[0], step);
#pragma unroll
    for (int i = 0; i < Count / 2; ++i) {
      if (i >= half) continue;
      const A mine = upper ? v[i + half] : v[i], other = upper ? v[i] : v[i + half];
      v[i] = mine + __shfl_xor_sync(kAllLanes, other, step);
    }
  }
  return v[0];
}

// The weight rows of a warp: from row n of the outputs on, of gated ones half of them gate and half up.
template <typename A, int R>
struct WeightRows {
  const PackedProduct<A>& p;
  int64_t n;

  MOERT_DEVICE_INLINE int half() const { return p.gated() ? R / 2 : R; }
  MOERT_DEVICE_INLINE int64_t row(int r) const {
    const int64_t output = n + r % half();
    return (output < p.N ? output : p.N - 1) + r / half() * p.N;
  }
  // sums [R][M], which the lanes have parts of, to y.
  template <int M>
  MOERT_DEVICE_INLINE void store(const RowTile& tile, A (&sums)[R * M]) const {
    const A sum = sum_lanes<A, R * M>(sums), up = __shfl_xor_sync(kAllLanes, sum, kWarp / 2);
    const int i = lane_id() / (kWarp / (R * M)), r = i / M, m = i % M;
    if (lane_id() % (kWarp / (R * M)) == 0 && m < tile.rows && r < half())
      p.store(tile.expert, tile.row + m, n + r, sum, up);
  }
};

// Four values from p on, aligned to 16 bytes.
template <typename A>
MOERT_DEVICE_INLINE void load_four(const A* p, A (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += kChunk<A>) {
    const Chunk c = load_chunk(p + i);
#pragma unroll
    for (int j = 0; j < kChunk<A>; ++j) out[i + j] = element<A>(c, j);
  }
}

// sums += what one lane's chunk i brings.
template <typename A, typename Codes, int M>
MOERT_DEVICE_INLINE void add_chunk(const PackedWeights& w, const CodeRow (&rows)[Codes::kRows],
                                   const Codes (&codes)[Codes::kRows], const A* const (&x)[M], int i,
                                   A (&sums)[Codes::kRows * M]) {
  constexpr int R = Codes::kRows;
  constexpr bool kScaled = sizeof(A) == 8;  // what the weights are in float32 shows in sums of float64
  const int at = i / kWarp * kWarp * Codes::kColumns + 4 * lane_id();
#pragma unroll
  for (int first = 0; first < Codes::kColumns; first += Codes::kShared) {
    Scale scales[R];
#pragma unroll
    for (int r = 0; r < R; ++r) scales[r] = codes[r].scale(w, rows[r], i, first);
    A parts[R * M] = {};
#pragma unroll Codes::kUnrolled
    for (int j = first; j < first + Codes::kShared; j += 4) {
      A values[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) load_four(x[m] + at + j * kWarp, values[m]);
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float value = codes[r].value(j + c, scales[r]);
          const A weight = kScaled ? A(scales[r].scale * value) : A(value);
#pragma unroll
          for (int m = 0; m < M; ++m) parts[r * M + m] += weight * values[m][c];
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int m = 0; m < M; ++m) sums[r * M + m] += (kScaled ? A(1) : A(scales[r].scale)) * parts[r * M + m];
  }
}

// x = the M rows of a tile; those past its last repeat it.
template <int M, typename A>
MOERT_DEVICE_INLINE void rows_of_tile(const PackedProduct<A>& p, const RowTile& tile, const A* (&x)[M]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int64_t s = tile.row + (m < tile.rows ? m : tile.rows - 1);
    x[m] = static_cast<const A*>(p.x) + (p.index ? p.index[s] : s) * p.x_stride;
  }
}

// The products of a warp's weight rows and M rows of x.
template <int M, typename Codes, typename A>
MOERT_DEVICE_INLINE void multiply_packed(const PackedProduct<A>& p, const RowTile& tile, int64_t n) {
  constexpr int R = Codes::kRows;
  const WeightRows<A, R> weights{p, n};
  const PackedWeights w = Codes::expert(p.w, tile.expert);
  CodeRow rows[R];
#pragma unroll
  for (int r = 0; r < R; ++r) rows[r] = Codes::row(w, weights.row(r));
  const A* x[M];
  rows_of_tile(p, tile, x);
  A sums[R * M] = {};
  constexpr int kAhead = M == 1 ? Codes::kAhead : 1;  // more rows are work enough to wait with
#pragma unroll 1
  for (int first = lane_id(); first < w.chunks; first += kAhead * kWarp) {
    Codes codes[kAhead][R];
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (first + a * kWarp < w.chunks) codes[a][r].load(w, rows[r], first + a * kWarp);
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (first + a * kWarp < w.chunks) add_chunk<A, Codes, M>(w, rows, codes[a], x, first + a * kWarp, sums);
  }
  weights.template store<M>(tile, sums);
}

template <int M, typename A>
MOERT_DEVICE_INLINE void multiply_codewords(const PackedProduct<A>& p, const RowTile& tile, int64_t n) {
  constexpr int R = Sub1Codes::kRows;
  const WeightRows<A, R> weights{p, n};
  const A* x[M];
  rows_of_tile(p, tile, x);
  A sums[R * M] = {};
#pragma unroll 1
  for (int r = 0; r < R; ++r) {
    A row[M] = {};
    for_digits(p.w, tile.expert, weights.row(r), [&](int64_t column, float weight) {
#pragma unroll
      for (int m = 0; m < M; ++m) row[m] += A(weight) * x[m][column];
    });
#pragma unroll
    for (int m = 0; m < M; ++m) (r ? sums[M + m] : sums[m]) = row[m];
  }
  weights.template store<M>(tile, sums);
}

// Blocks that follow each other have the tiles of one expert and the same weight rows.
template <typename A, typename Codes>
__global__ void __launch_bounds__(kPackedThreads, 3) packed_product(const PackedProduct<A> p) {
  const RowTile tile = p.template tile<kMostRows<A>>(blockIdx.x % p.tiles);
  if (tile.rows == 0 || tile.expert >= p.E) return;
  const int outputs = WeightRows<A, Codes::kRows>{p, 0}.half();
  const int64_t n = (blockIdx.x / p.tiles * kPackedWarps + warp_id()) * outputs;
  if (n >= p.written) return;
  constexpr int M = kMostRows<A>;
  if constexpr (std::is_same_v<Codes, Sub1Codes>)
    tile.rows == 1 ? multiply_codewords<1>(p, tile, n) : multiply_codewords<M>(p, tile, n);
  else
    tile.rows == 1 ? multiply_packed<1, Codes>(p, tile, n) : multiply_packed<M, Codes>(p, tile, n);
}

}  // namespace moert::cuda
