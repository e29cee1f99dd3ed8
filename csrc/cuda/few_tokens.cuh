// Experts for a few tokens, without a sort: every choice's weights are streamed once, in two kernels.
//
// A choice is a token and one of its experts.  `rows`: a warp has one row of the weights, 16 bytes a lane and load;
// `columns`: weights lie transposed, four lanes have 16 bytes each of one of their rows, and a block's 128 groups of
// four share the rows; `any`: as `rows`, an element at a time.
#pragma once

#include "cuda/activation.h"
#include "cuda/onto.h"
#include "cuda/simt.h"

namespace moert::cuda {

enum class Lie { rows, columns, any };

template <typename T>
struct StridedMatrix {
  const T* data;
  int64_t expert, row, column;  // strides
};

template <typename T>
struct FewTokens {
  using A = Acc<T>;

  const T* x;
  int64_t x_stride;
  const int32_t* ids;  // of choice j of token t: ids[t * ids_stride + j]
  int64_t ids_stride;
  const A* weights;  // of choice j of token t: weights[t * weights_stride + (by_expert ? its expert : j)]
  int64_t weights_stride;
  bool by_expert, scale_input;
  int64_t tokens, k, E, H, I;
  StridedMatrix<T> gate, up, down;  // [E, I, H], [E, H, I]
  const T *gate_bias, *up_bias, *down_bias;
  int64_t bias1_expert, bias1_step, down_bias_expert;
  ActivationForm<A> form;
  OntoOf<T> onto;
  A* act;  // [tokens * k, I]
  T* y;    // [tokens, H]

  MOERT_DEVICE_INLINE int64_t expert(int64_t t, int64_t j) const {
    const int64_t e = ids[t * ids_stride + j];
    return e >= 0 && e < E ? e : -1;
  }
  MOERT_DEVICE_INLINE A weight(int64_t t, int64_t j, int64_t e) const {
    return weights[t * weights_stride + (by_expert ? e : j)];
  }

  // The activation of row i from its sums.
  MOERT_DEVICE_INLINE void finish(int64_t choice, int64_t e, int64_t i, A g, A u) const {
    if (scale_input) {
      const A w = weight(choice / k, choice % k, e);
      g *= w;
      u *= w;
    }
    if (gate_bias) g += widen(gate_bias[e * bias1_expert + i * bias1_step]);
    if (up_bias) u += widen(up_bias[e * bias1_expert + i * bias1_step]);
    act[choice * I + i] = activate(form, g, u);
  }

  // Column h of token t from its sum, the biases of w2 and what else is added.
  MOERT_DEVICE_INLINE void store(int64_t t, int64_t h, A sum) const {
    sum += onto.at(t, h, H);
    for (int64_t j = 0; down_bias && j < k; ++j) {
      const int64_t e = expert(t, j);
      if (e >= 0) sum += (scale_input ? A(1) : weight(t, j, e)) * A(widen(down_bias[e * down_bias_expert + h]));
    }
    y[t * H + h] = narrow<T>(sum);
  }
};

// sum += the products of the elements of two chunks of T.
template <typename T>
MOERT_DEVICE_INLINE void add_products(const Chunk& a, const Chunk& b, Acc<T>& sum) {
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) sum += element<T>(a, i) * element<T>(b, i);
}

constexpr int kFewWarps = 8, kFewThreads = kFewWarps * kWarp;

// The first product, a warp for each row of each choice.
template <typename T, bool Gated>
__global__ void __launch_bounds__(kFewThreads) few_first_rows(const FewTokens<T> p) {
  using A = Acc<T>;
  constexpr int kAhead = Gated ? 4 : 8, V = kChunk<T>;
  const int64_t task = int64_t(blockIdx.x) * kFewWarps + warp_id(), choice = task / p.I, i = task % p.I;
  if (choice >= p.tokens * p.k) return;
  const int64_t t = choice / p.k, e = p.expert(t, choice % p.k);
  if (e < 0) return;
  const T* x = p.x + t * p.x_stride;
  const T *gate = p.gate.data + e * p.gate.expert + i * p.gate.row, *up = p.up.data + e * p.up.expert + i * p.up.row;
  A g = 0, u = 0;
  for (int64_t first = lane_id() * V; first < p.H; first += kAhead * kWarp * V) {
    Chunk gates[kAhead] = {}, ups[kAhead] = {};
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t h = first + a * kWarp * V;
      if (h >= p.H) continue;
      gates[a] = stream_chunk(gate + h);
      if constexpr (Gated) ups[a] = stream_chunk(up + h);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t h = first + a * kWarp * V;
      if (h >= p.H) continue;
      const Chunk row = load_chunk(x + h);
      add_products<T>(gates[a], row, g);
      if constexpr (Gated) add_products<T>(ups[a], row, u);
    }
  }
  g = warp_sum(g);
  u = warp_sum(u);
  if (lane_id() == 0) p.finish(choice, e, i, g, u);
}

// The second product and the sum over the choices, a warp for each column of each token.
template <typename T>
__global__ void __launch_bounds__(kFewThreads) few_second_rows(const FewTokens<T> p) {
  using A = Acc<T>;
  constexpr int kAhead = 8, V = kChunk<T>;
  const int64_t task = int64_t(blockIdx.x) * kFewWarps + warp_id(), t = task / p.H, h = task % p.H;
  if (t >= p.tokens) return;
  const int64_t pieces = p.I / V, all = p.k * pieces;
  A sum = 0;
  for (int64_t first = lane_id(); first < all; first += kAhead * kWarp) {
    Chunk down[kAhead] = {};
    A weights[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t n = first + a * kWarp, j = n / pieces;
      const int64_t e = n < all ? p.expert(t, j) : -1;
      weights[a] = 0;
      if (e < 0) continue;
      down[a] = stream_chunk(p.down.data + e * p.down.expert + h * p.down.row + n % pieces * V);
      weights[a] = p.scale_input ? A(1) : p.weight(t, j, e);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t n = first + a * kWarp;
      if (n >= all || p.expert(t, n / pieces) < 0) continue;
      const A* act = p.act + t * p.k * p.I + n * V;
      A part = 0;
#pragma unroll
      for (int i = 0; i < V; i += kChunk<A>) {
        const Chunk c = load_chunk(act + i);
#pragma unroll
        for (int m = 0; m < kChunk<A>; ++m) part += element<A>(c, m) * element<T>(down[a], i + m);
      }
      sum += weights[a] * part;
    }
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) p.store(t, h, sum);
}

template <typename T, bool Gated>
__global__ void __launch_bounds__(kFewThreads) few_first_any(const FewTokens<T> p) {
  using A = Acc<T>;
  const int64_t task = int64_t(blockIdx.x) * kFewWarps + warp_id(), choice = task / p.I, i = task % p.I;
  if (choice >= p.tokens * p.k) return;
  const int64_t t = choice / p.k, e = p.expert(t, choice % p.k);
  if (e < 0) return;
  const T *gate = p.gate.data + e * p.gate.expert + i * p.gate.row, *up = p.up.data + e * p.up.expert + i * p.up.row;
  A g = 0, u = 0;
#pragma unroll 4
  for (int64_t h = lane_id(); h < p.H; h += kWarp) {
    const A x = widen(p.x[t * p.x_stride + h]);
    g += x * A(widen(gate[h * p.gate.column]));
    if constexpr (Gated) u += x * A(widen(up[h * p.up.column]));
  }
  g = warp_sum(g);
  u = warp_sum(u);
  if (lane_id() == 0) p.finish(choice, e, i, g, u);
}

template <typename T>
__global__ void __launch_bounds__(kFewThreads) few_second_any(const FewTokens<T> p) {
  using A = Acc<T>;
  const int64_t task = int64_t(blockIdx.x) * kFewWarps + warp_id(), t = task / p.H, h = task % p.H;
  if (t >= p.tokens) return;
  A sum = 0;
  for (int64_t j = 0; j < p.k; ++j) {
    const int64_t e = p.expert(t, j);
    if (e < 0) continue;
    const T* down = p.down.data + e * p.down.expert + h * p.down.row;
    A part = 0;
#pragma unroll 4
    for (int64_t i = lane_id(); i < p.I; i += kWarp)
      part += p.act[(t * p.k + j) * p.I + i] * A(widen(down[i * p.down.column]));
    sum += (p.scale_input ? A(1) : p.weight(t, j, e)) * part;
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) p.store(t, h, sum);
}

constexpr int kColumnWarps = 16, kColumnThreads = kColumnWarps * kWarp, kAcross = 4;

// A block's columns [first, first + kAcross * V) of Halves matrices whose columns lie side by side, times a vector.
// terms(sums) adds what this thread's rows bring to its V columns; use(c, sum) is called in the first threads, one for
// each column c, and sum(half, c) is that of any column of the block.
template <typename T, int Halves, typename Terms, typename Use>
MOERT_DEVICE_INLINE void sum_columns(const Terms& terms, const Use& use) {
  using A = Acc<T>;
  constexpr int V = kChunk<T>, kColumns = kAcross * V;
  __shared__ A parts[kColumnWarps][Halves][kColumns];
  A sums[Halves][V] = {};
  terms(sums);
#pragma unroll
  for (int half = 0; half < Halves; ++half)
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int step = kAcross; step < kWarp; step *= 2)
        sums[half][i] += __shfl_xor_sync(kAllLanes, sums[half][i], step);
      if (lane_id() < kAcross) parts[warp_id()][half][lane_id() * V + i] = sums[half][i];
    }
  __syncthreads();
  if (int(threadIdx.x) >= kColumns) return;
  use(int(threadIdx.x), [&](int half, int c) {
    A total = 0;
#pragma unroll
    for (int w = 0; w < kColumnWarps; ++w) total += parts[w][half][c];
    return total;
  });
}

// This thread's first row, and how far it is to the next.
MOERT_DEVICE_INLINE int first_row() { return warp_id() * (kWarp / kAcross) + lane_id() / kAcross; }
constexpr int kRowStep = kColumnWarps * (kWarp / kAcross);

// The first product of transposed weights.  A block: kAcross * V raw columns of one choice; of alternating ones every
// pair is a gate and its up.
template <typename T, bool Gated, bool Alternate>
__global__ void __launch_bounds__(kColumnThreads, 1) few_first_columns(const FewTokens<T> p) {
  using A = Acc<T>;
  constexpr int V = kChunk<T>, kColumns = kAcross * V, kAhead = 4;
  constexpr bool kTwo = Gated && !Alternate;
  const int64_t raw = Alternate ? 2 * p.I : p.I, tiles = (raw + kColumns - 1) / kColumns;
  const int64_t choice = blockIdx.x / tiles, first = blockIdx.x % tiles * kColumns;
  const int64_t t = choice / p.k, e = p.expert(t, choice % p.k);
  if (e < 0) return;
  const int64_t column = first + lane_id() % kAcross * V;
  const T *x = p.x + t * p.x_stride, *gate = p.gate.data + e * p.gate.expert + column;
  const T* up = p.up.data + e * p.up.expert + column;
  const auto terms = [&](auto& sums) {
    for (int64_t row = first_row(); row < p.H && column < raw; row += kAhead * kRowStep) {
      Chunk gates[kAhead] = {};
      [[maybe_unused]] Chunk ups[kAhead] = {};
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t h = row + a * kRowStep;
        if (h >= p.H) continue;
        gates[a] = stream_chunk(gate + h * p.gate.column);
        if constexpr (kTwo) ups[a] = stream_chunk(up + h * p.up.column);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t h = row + a * kRowStep;
        if (h >= p.H) continue;
        const A value = widen(x[h]);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          sums[0][i] += value * element<T>(gates[a], i);
          if constexpr (kTwo) sums[1][i] += value * element<T>(ups[a], i);
        }
      }
    }
  };
  sum_columns<T, kTwo ? 2 : 1>(terms, [&](int c, const auto& sum) {
    if (first + c >= raw || (Alternate && c % 2)) return;
    const A g = sum(0, c), u = Alternate ? sum(0, c + 1) : kTwo ? sum(kTwo, c) : A(0);
    p.finish(choice, e, Alternate ? (first + c) / 2 : first + c, g, u);
  });
}

// The second product of transposed weights.  A block: kAcross * V columns of one token.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads) few_second_columns(const FewTokens<T> p) {
  using A = Acc<T>;
  constexpr int V = kChunk<T>, kColumns = kAcross * V, kAhead = 4;
  const int64_t tiles = (p.H + kColumns - 1) / kColumns;
  const int64_t t = blockIdx.x / tiles, first = blockIdx.x % tiles * kColumns;
  const int64_t column = first + lane_id() % kAcross * V;
  const auto terms = [&](auto& sums) {
    for (int64_t j = 0; j < p.k && column < p.H; ++j) {
      const int64_t e = p.expert(t, j);
      if (e < 0) continue;
      const A weight = p.scale_input ? A(1) : p.weight(t, j, e);
      const T* down = p.down.data + e * p.down.expert + column;
      const A* act = p.act + (t * p.k + j) * p.I;
      for (int64_t row = first_row(); row < p.I; row += kAhead * kRowStep) {
        Chunk chunks[kAhead] = {};
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
          if (row + a * kRowStep < p.I) chunks[a] = stream_chunk(down + (row + a * kRowStep) * p.down.column);
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          if (row + a * kRowStep >= p.I) continue;
          const A value = weight * act[row + a * kRowStep];
#pragma unroll
          for (int i = 0; i < V; ++i) sums[0][i] += value * element<T>(chunks[a], i);
        }
      }
    }
  };
  sum_columns<T, 1>(terms, [&](int c, const auto& sum) {
    if (first + c < p.H) p.store(t, first + c, sum(0, c));
  });
}

}  // namespace moert::cuda
