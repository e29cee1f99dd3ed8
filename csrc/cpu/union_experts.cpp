#include "moert/union_experts.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tile_tasks.h"

namespace moert::cpu {

namespace {

// Columns of an output tile: few, so that one token's row still makes work for several threads.
constexpr int64_t kColumns = 64;

template <typename A>
struct Problem {
  const UnionRows& tokens;
  const ExpertWeights& w;
  std::vector<int32_t> ids;  // those in [0, E)
  DType between;
  Memory<char> act;  // [T, n * I] of between, gains included
  Memory<A> gains;   // [T, n], where b2 is multiplied by them

  int64_t width() const { return int64_t(ids.size()) * w.I; }
};

template <typename A>
Problem<A> problem_of(const UnionRows& tokens, const ExpertWeights& w) {
  Problem<A> p{tokens, w, {}, between_gemms(tokens.x.dtype), nullptr, nullptr};
  std::copy_if(tokens.ids, tokens.ids + tokens.n, std::back_inserter(p.ids),
               [&](int32_t e) { return 0 <= e && e < w.E; });
  p.act = allocate<char>(tokens.T * p.width() * size_of(p.between));
  if (!w.down_bias.data) return p;
  const int64_t n = int64_t(p.ids.size());
  const A* gains = static_cast<const A*>(tokens.gains);
  p.gains = allocate<A>(tokens.T * n);
  for (int64_t t = 0; t < tokens.T; ++t)
    for (int64_t i = 0; i < n; ++i) p.gains[t * n + i] = gains[t * w.E + p.ids[i]];
  return p;
}

// Rows [row, row + M), columns [n, n + N).
struct Tile {
  int64_t row, M, n, N;
};

std::vector<Tile> tiles(int64_t rows, int64_t columns, int64_t width) {
  std::vector<Tile> out;
  for (int64_t n = 0; n < columns; n += width)
    for (int64_t row = 0; row < rows; row += kTileRows)
      out.push_back({row, std::min(kTileRows, rows - row), n, std::min(width, columns - n)});
  return out;
}

// Elements [n, n + N) of an expert's vector as values in `row`, or null where there is none.
template <typename A>
const A* values_of(const ExpertVector& v, int64_t stride, int64_t e, const Tile& tile, A* row) {
  if (!v.data) return nullptr;
  const char* data = at(v.data, v.dtype, e * v.expert_stride + tile.n * stride);
  gemm_kernels().widen({data, v.dtype, 0, stride, nullptr}, 1, tile.N, row, 0);
  return row;
}

// act[:, i-th expert] = gains * activation(x . w1[e]^T + b1[e]), one tile of it.
template <typename A>
void first_tile(const Problem<A>& p, int64_t i, const Tile& tile) {
  const GemmKernels& kernels = gemm_kernels();
  const TileMemory<A> memory = tile_memory<A>();
  const ExpertWeights& w = p.w;
  const int64_t e = p.ids[i];
  const auto half = [&](const ExpertMatrix& weight, const ExpertVector& bias, A* c) {
    const TileOperand x = operand_of(p.tokens.x, tile.row, 0), rows = operand_of(weight, e, tile.n, 0, true);
    GemmTile product{tile.M, tile.N, w.H, x, rows, c, memory.scratch};
    product.batch_invariant = p.tokens.batch_invariant;
    kernels.gemm(product);
    if (const A* b = values_of(bias, w.bias1_stride, e, tile, memory.row0))
      kernels.store({tile.M, tile.N, c, b, nullptr, ScaleOn::input, c, DTypeOf<A>::value, kTileColumns, 1});
  };
  half(w.gate, w.gate_bias, memory.c0);
  if (is_gated(w.activation.act)) half(w.up, w.up_bias, memory.c1);
  kernels.activate({tile.M, tile.N, w.activation, memory.c0, memory.c1, memory.c2, DTypeOf<A>::value, kTileColumns});
  const A* gains = static_cast<const A*>(p.tokens.gains) + tile.row * w.E + e;
  for (int64_t m = 0; m < tile.M; ++m) memory.row1[m] = gains[m * w.E];
  void* out = const_cast<char*>(at(p.act.get(), p.between, tile.row * p.width() + i * w.I + tile.n));
  kernels.store({tile.M, tile.N, memory.c2, nullptr, memory.row1, ScaleOn::output, out, p.between, p.width(), 1});
}

// The sum of the listed experts' second products into memory.c0.
template <typename A>
void down_product(const Problem<A>& p, const Tile& tile, const TileMemory<A>& memory) {
  const ExpertWeights& w = p.w;
  const Rows act{p.act.get(), p.between, p.width()};
  for (int64_t i = 0; i < int64_t(p.ids.size()); ++i) {
    const TileOperand a = operand_of(act, tile.row, i * w.I), b = operand_of(w.down, p.ids[i], tile.n, 0, true);
    GemmTile product{tile.M, tile.N, w.I, a, b, memory.c0, memory.scratch, i > 0};
    product.batch_invariant = p.tokens.batch_invariant;
    gemm_kernels().gemm(product);
  }
}

// memory.c0 += gains . b2 of the listed experts.
template <typename A>
void add_down_bias(const Problem<A>& p, const Tile& tile, const TileMemory<A>& memory) {
  const int64_t n = int64_t(p.ids.size());
  const TileMatrix a{p.gains.get() + tile.row * n, DTypeOf<A>::value, n, 1, nullptr};
  const ExpertVector& bias = p.w.down_bias;
  const TileMatrix b{at(bias.data, bias.dtype, tile.n), bias.dtype, bias.expert_stride, 1, p.ids.data()};
  gemm_kernels().gemm({tile.M, tile.N, n, {a, false}, {b, true}, memory.c0, memory.scratch, true});
}

// A tile of y.
template <typename A>
void second_tile(const Problem<A>& p, const Tile& tile, void* y) {
  const TileMemory<A> memory = tile_memory<A>();
  if (p.ids.empty())
    for (int64_t m = 0; m < tile.M; ++m) std::fill_n(memory.c0 + m * kTileColumns, tile.N, A(0));
  else
    down_product(p, tile, memory);
  if (p.gains && !p.ids.empty()) add_down_bias(p, tile, memory);
  const DType dtype = p.tokens.x.dtype;
  void* out = const_cast<char*>(at(y, dtype, tile.row * p.w.H + tile.n));
  gemm_kernels().store({tile.M, tile.N, memory.c0, nullptr, nullptr, ScaleOn::output, out, dtype, p.w.H, 1});
}

template <typename A>
void forward(const UnionRows& tokens, const ExpertWeights& w, int64_t threads, void* y) {
  const Problem<A> p = problem_of<A>(tokens, w);
  const auto first = tiles(tokens.T, w.I, std::min(kTileColumns, w.I)), second = tiles(tokens.T, w.H, kColumns);
  const int64_t per_expert = int64_t(first.size()), firsts = int64_t(p.ids.size()) * per_expert,
                seconds = int64_t(second.size());
  parallel_region(std::min(threads, std::max(firsts, seconds)), [&](Team& team) {
    team.for_each(firsts, [&](int64_t task) { first_tile(p, task / per_expert, first[task % per_expert]); });
    team.for_each(seconds, [&](int64_t task) { second_tile(p, second[task], y); });
  });
}

}  // namespace

void union_experts(const UnionRows& tokens, const ExpertWeights& experts, int64_t threads, void* y) {
  (tokens.x.dtype == DType::f64 ? forward<double> : forward<float>)(tokens, experts, threads, y);
}

}  // namespace moert::cpu
