// Rows to expert order and back: memory-bound, 16 bytes a lane where every row is aligned to that.
#pragma once

#include "cuda/onto.h"
#include "cuda/simt.h"

namespace moert::cuda {

constexpr int kRowWarps = 8;

// The columns of a row that one lane has in one piece of it: a chunk, or every 32nd where rows are not aligned.
template <typename T, bool Aligned>
struct Piece {
  using A = Acc<T>;
  static constexpr int kColumns = kChunk<T>, kPiece = kWarp * kColumns;

  int64_t first, H;

  MOERT_DEVICE_INLINE Piece(int64_t piece, int64_t H)
      : first(piece * kPiece + (Aligned ? lane_id() * kColumns : lane_id())), H(H) {}

  MOERT_DEVICE_INLINE int64_t column(int i) const { return first + (Aligned ? i : i * kWarp); }
  MOERT_DEVICE_INLINE bool has(int i) const { return column(i) < H; }

  // Aligned rows end with a chunk: the first column says it for all of them.
  MOERT_DEVICE_INLINE Chunk load(const T* row) const {
    Chunk c{};
    if constexpr (Aligned) {
      if (has(0)) c = load_chunk(row + first);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        if (has(i)) set_element<T>(c, i, widen(row[column(i)]));
    }
    return c;
  }

  MOERT_DEVICE_INLINE void store(T* row, const A (&values)[kColumns]) const {
    if constexpr (Aligned) {
      if (!has(0)) return;
      Chunk c;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) set_element<T>(c, i, values[i]);
      store_chunk(row + first, c);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        if (has(i)) row[column(i)] = narrow<T>(values[i]);
    }
  }
};

template <typename T>
MOERT_HOST_DEVICE constexpr int64_t pieces_of(int64_t H) {
  return (H + kWarp * kChunk<T> - 1) / (kWarp * kChunk<T>);
}

// rows[s] = x[tokens[s]].  A row is H units of Unit: chunks, or elements where rows are not aligned.  A warp copies
// kCopies * 32 of them.
constexpr int kCopies = 8;

template <typename Unit>
__global__ void __launch_bounds__(kRowWarps* kWarp)
    permute_kernel(const Unit* x, int64_t x_stride, const int32_t* tokens, int64_t T, int64_t S, int64_t H,
                   Unit* rows) {
  const int64_t s = int64_t(blockIdx.x) * kRowWarps + warp_id();
  if (s >= S) return;
  const int32_t t = tokens[s];
  const bool used = t >= 0 && t < T;
  const Unit* from = x + (used ? t : 0) * x_stride;
  const int64_t first = int64_t(blockIdx.y) * kCopies * kWarp + lane_id();
  Unit copies[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int64_t h = first + i * kWarp;
    copies[i] = Unit{};
    if (!used || h >= H) continue;
    if constexpr (sizeof(Unit) == sizeof(Chunk))
      copies[i] = load_chunk(from + h);
    else
      copies[i] = from[h];
  }
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int64_t h = first + i * kWarp;
    if (h >= H) continue;
    if constexpr (sizeof(Unit) == sizeof(Chunk))
      store_chunk(rows + s * H + h, copies[i]);
    else
      rows[s * H + h] = copies[i];
  }
}

// combine_rows.  A warp: one piece of one token.
template <typename T>
struct UnpermuteCall {
  const T *rows, *own;  // as SlotRows has them
  int64_t rows_stride, own_stride, first, O;
  const int32_t* slots;   // [T, k]
  const Acc<T>* weights;  // [T, k] or null
  OntoOf<T> onto;
  int64_t tokens, k, S, H;
  T* y;

  MOERT_DEVICE_INLINE const T* row(int64_t slot) const {
    const int64_t here = slot - first;
    if (here >= 0 && here < O) return own + here * own_stride;
    return rows + (here < 0 ? slot : slot - O) * rows_stride;
  }
};

template <typename T, bool Aligned>
__global__ void __launch_bounds__(kRowWarps* kWarp) unpermute_kernel(const UnpermuteCall<T> p) {
  using A = Acc<T>;
  constexpr int kColumns = Piece<T, Aligned>::kColumns, kAhead = 4;
  const int64_t pieces = pieces_of<T>(p.H), task = int64_t(blockIdx.x) * kRowWarps + warp_id(), t = task / pieces;
  if (t >= p.tokens) return;
  const Piece<T, Aligned> piece(task % pieces, p.H);
  A sum[kColumns] = {};
  p.onto.for_rows(t, p.H, [&](A factor, const T* row) {
    const Chunk c = piece.load(row);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[i] += factor * element<T>(c, i);
  });
  for (int64_t first = 0; first < p.k; first += kAhead) {
    Chunk rows[kAhead];
    A weights[kAhead];
    bool used[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t choice = t * p.k + first + j, slot = first + j < p.k ? p.slots[choice] : -1;
      used[j] = slot >= 0 && slot < p.S;
      if (!used[j]) continue;
      rows[j] = piece.load(p.row(slot));
      weights[j] = p.weights ? p.weights[choice] : A(1);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (!used[j]) continue;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum[i] += element<T>(rows[j], i) * weights[j];
    }
  }
  piece.store(p.y + t * p.H, sum);
}

// The gradients of unpermute; blocks from S on see to the choices that no slot belongs to.
template <typename T>
struct UnpermuteBackwardCall {
  const T *dy, *rows;
  int64_t dy_stride, rows_stride;
  const int32_t *tokens, *slots;  // [S], [T, k]
  const Acc<T>* weights;          // [T, k]
  int64_t T_, k, S, H;
  T* drows;
  Acc<T>* dweights;
};

constexpr int kBackwardThreads = 128;

template <typename T>
MOERT_DEVICE_INLINE void clear_dropped(const UnpermuteBackwardCall<T>& p, int64_t i) {
  if (i >= p.T_ * p.k) return;
  const int64_t slot = p.slots[i];
  const bool used = slot >= 0 && slot < p.S && p.tokens[slot] == i / p.k;
  if (!used) p.dweights[i] = 0;
}

// The sum over a block's threads, in every thread.
template <typename A>
MOERT_DEVICE_INLINE A sum_of_block(A x) {
  constexpr int kWarps = kBackwardThreads / kWarp;
  __shared__ A parts[kWarps];
  x = warp_sum(x);
  if (lane_id() == 0) parts[warp_id()] = x;
  __syncthreads();
  A sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += parts[w];
  return sum;
}

// By slot, not by token: every row of drows then has one writer, whatever the plan says.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(kBackwardThreads) unpermute_backward_kernel(const UnpermuteBackwardCall<T> p) {
  using A = Acc<T>;
  constexpr int kColumns = Piece<T, Aligned>::kColumns;
  const int64_t s = blockIdx.x;
  if (s >= p.S) return clear_dropped(p, (s - p.S) * kBackwardThreads + threadIdx.x);
  const int64_t token = p.tokens[s], t = token < p.T_ ? token : -1;
  A weight = 0, dot = 0;
  bool used = false;
  for (int64_t i = t * p.k; t >= 0 && i < (t + 1) * p.k; ++i) {
    if (p.slots[i] != s) continue;
    used = true;
    weight += p.weights[i];
  }
  for (int64_t n = warp_id(); n < pieces_of<T>(p.H); n += kBackwardThreads / kWarp) {
    const Piece<T, Aligned> piece(n, p.H);
    A drow[kColumns] = {};
    if (used) {
      const Chunk dy = piece.load(p.dy + t * p.dy_stride), row = piece.load(p.rows + s * p.rows_stride);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const A d = element<T>(dy, i);
        dot += d * element<T>(row, i);
        drow[i] = d * weight;
      }
    }
    piece.store(p.drows + s * p.H, drow);
  }
  if (!used) return;
  dot = sum_of_block(dot);
  for (int64_t i = t * p.k + threadIdx.x; i < (t + 1) * p.k; i += kBackwardThreads)
    if (p.slots[i] == s) p.dweights[i] = dot;
}

template <typename Id>
__global__ void __launch_bounds__(256) narrow_ids_kernel(const Id* ids, int64_t row_stride, int64_t column_stride,
                                                         int64_t T, int64_t k, int64_t E, int32_t* out) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= T * k) return;
  const Id id = ids[i / k * row_stride + i % k * column_stride];
  // Compared in 64 bits: 2^32 + 3 is not expert 3, and a negative id is far above E.
  out[i] = uint64_t(id) < uint64_t(E) ? int32_t(id) : -1;
}

}  // namespace moert::cuda
