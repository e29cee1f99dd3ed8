#include "moert/grouped_gemm.h"

#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpp/expect.h"
#include "cuda/expert_tiles.h"
#include "cuda/grouped_gemm_mma.h"
#include "integers.h"
#include "memory.h"

#if defined(MOERT_EMULATED)
#include "cuda/emulate.h"
#endif

using namespace moert;

namespace {

// Every slot is in one tile, of the expert that has it; no tile is longer than asked.
void tiles_cover(const std::vector<int32_t>& offsets, int32_t S, int32_t tile_rows) {
  const auto E = int32_t(offsets.size()) - 1;
  std::vector<int32_t> seen(S, 0);
  for (int32_t i = 0; i < cuda::num_row_tiles(S, E, tile_rows); ++i) {
    const cuda::RowTile tile = cuda::row_tile(offsets.data(), E, S, tile_rows, i);
    EXPECT(tile.rows >= 0 && tile.rows <= tile_rows);
    for (int32_t r = tile.row; r < tile.row + tile.rows; ++r) {
      EXPECT(r >= 0 && r < S);
      EXPECT(r >= offsets[tile.expert] && r < (tile.expert < E ? offsets[tile.expert + 1] : S));
      ++seen[r];
    }
  }
  for (const int32_t count : seen) EXPECT(count == 1);
}

void test_tiles() {
  for (const int32_t tile_rows : {1, 4, 64, 128}) {
    tiles_cover({0, 0}, 0, tile_rows);
    tiles_cover({0, 0, 0, 0}, 7, tile_rows);          // nothing is routed
    tiles_cover({0, 0, 300, 300}, 300, tile_rows);    // one expert takes all
    tiles_cover({0, 128, 256, 384}, 384, tile_rows);  // whole tiles
    tiles_cover({0, 1, 2, 131, 131, 259, 400}, 403, tile_rows);
    uint32_t seed = 5;
    for (int round = 0; round < 50; ++round) {
      std::vector<int32_t> offsets{0};
      for (int e = 0; e < 1 + round % 9; ++e)
        offsets.push_back(offsets.back() + int32_t((seed = seed * 1664525u + 1013904223u) >> 24) * (round % 3));
      tiles_cover(offsets, offsets.back() + round % 5, tile_rows);
    }
  }
  // Offsets that no plan makes lead to no slot outside.
  const std::vector<int32_t> wrong{0, 500, -3, 90, 1 << 30};
  for (int32_t i = 0; i < cuda::num_row_tiles(100, 4, 64); ++i) {
    const cuda::RowTile tile = cuda::row_tile(wrong.data(), 4, 100, 64, i);
    EXPECT(tile.rows == 0 || (tile.row >= 0 && tile.row + tile.rows <= 100));
  }
  for (int64_t e = 0; e < 4; ++e) {
    const cuda::Slots slots = cuda::slots_of(wrong.data(), e, 100);
    EXPECT(slots.count == 0 || (slots.begin >= 0 && slots.begin + slots.count <= 100));
  }
}

void test_bands() {
  for (const int64_t rows : {1, 3, 10})
    for (const int64_t columns : {1, 7, 8, 9, 20}) {
      std::vector<int> seen(rows * columns, 0);
      for (int64_t i = 0; i < rows * columns; ++i) {
        const cuda::TileIndex at = cuda::banded(i, rows, columns, 8);
        EXPECT(at.row >= 0 && at.row < rows && at.column >= 0 && at.column < columns);
        ++seen[at.row * columns + at.column];
      }
      for (const int count : seen) EXPECT(count == 1);
    }
}

// Expert 1 is empty; expert 2 has two tiles of rows, and more slots than a ring of shared memory holds; slots 171 and
// 172 are not in use.
const int32_t kOffsets[] = {0, 3, 3, 170, 171};
const int64_t S = 173, E = 4;

std::vector<int32_t> some_tokens(int64_t T) {
  std::vector<int32_t> tokens(S, -1);
  for (int64_t s = 0; s < kOffsets[E]; ++s) tokens[s] = int32_t(s * 5 % T);
  return tokens;
}

struct Case {
  int64_t N, K;
  bool transposed, gathered;
  ScaleOn scale_on = ScaleOn::output;
  bool tf32 = false;
};

// Sums are exact and rounded once, so that both give the same bits.
template <typename T>
void forward(const Case& c, size_t shift = 0) {
  const int64_t T_ = 9, N = c.N, K = c.K, rows = c.gathered ? T_ : S;
  const DType dtype = DTypeOf<T>::value;
  const auto x = rounded<T>(integers(rows * K, 1)), w = rounded<T>(integers(E * N * K, 2));
  const auto bias = rounded<T>(integers(E * N, 3));
  const auto scale = rounded<Acc<T>>(integers(S, 4));
  const std::vector<int32_t> tokens = some_tokens(T_), offsets(kOffsets, kOffsets + E + 1);
  const std::vector<T> nan(S * N, cuda::narrow<T>(NAN));
  const auto product = [&](const int32_t* offsets, const T* x, const int32_t* tokens, T* w, const T* bias,
                           const void* scale) {
    return GroupedGemm{S,
                       E,
                       N,
                       K,
                       offsets,
                       {x, dtype, K, c.gathered ? tokens : nullptr},
                       matrix(w, N, K, c.transposed),
                       {bias, dtype, N},
                       scale,
                       c.scale_on,
                       false,
                       c.tf32};
  };
  std::vector<T> expected = nan;
  cpu::grouped_gemm(product(kOffsets, x.data(), tokens.data(), const_cast<T*>(w.data()), bias.data(), scale.data()), 1,
                    expected.data(), N);
  OnDevice<T> dx(x, shift), dw(w), dbias(bias), y(nan);
  OnDevice<int32_t> doffsets(offsets), dtokens(tokens);
  OnDevice<Acc<T>> dscale(scale);
  cuda::grouped_gemm(product(doffsets.data(), dx.data(), dtokens.data(), dw.data(), dbias.data(), dscale.data()),
                     nullptr, y.data(), N);
  EXPECT(equal(y.read(), expected));
}

// W is T or, where the sums are added to what is there, their type.
template <typename T, typename W = T>
void weight_gradient(const Case& c, bool accumulate = false) {
  const int64_t T_ = 9, N = c.N, K = c.K, rows = c.gathered ? T_ : S;
  const DType dtype = DTypeOf<T>::value;
  const auto dy = rounded<T>(integers(S * N, 5)), x = rounded<T>(integers(rows * K, 6));
  const std::vector<int32_t> tokens = some_tokens(T_), offsets(kOffsets, kOffsets + E + 1);
  const auto before = accumulate ? rounded<W>(integers(E * N * K, 9)) : std::vector<W>(E * N * K, cuda::narrow<W>(NAN));
  const auto product = [&](const int32_t* offsets, const T* dy, const T* x, const int32_t* tokens) {
    return GroupedGemmWgrad{
        S, E, N, K, offsets, {dy, dtype, N}, {x, dtype, K, c.gathered ? tokens : nullptr}, c.tf32, accumulate};
  };
  std::vector<W> expected = before;
  cpu::grouped_gemm_wgrad(product(kOffsets, dy.data(), x.data(), tokens.data()), 1,
                          matrix(expected.data(), N, K, c.transposed));
  OnDevice<T> ddy(dy), dx(x);
  OnDevice<W> dw(before);
  OnDevice<int32_t> doffsets(offsets), dtokens(tokens);
  cuda::grouped_gemm_wgrad(product(doffsets.data(), ddy.data(), dx.data(), dtokens.data()), nullptr,
                           matrix(dw.data(), N, K, c.transposed));
  EXPECT(equal(dw.read(), expected));
}

struct Plain {
  bool transposed, repeated = false;  // repeated: the rows are one and the same
#if defined(MOERT_EMULATED)
  int64_t N = 136, K = 72, E = 6;
#else
  int64_t N = 520, K = 648, E = 40;
#endif
  int32_t longest = 130;  // slots of an expert
};

// Nothing but the product, of many experts: with the workspace of the kernel over pointer arrays where there is one.
template <typename T>
void plain(const Plain& c) {
  const int64_t N = c.N, K = c.K, E = c.E;
  std::vector<int32_t> offsets{0};
  for (int64_t e = 0; e < E; ++e)
    offsets.push_back(offsets.back() + (e == 0 || e == E - 1 ? 0 : e == 3 ? c.longest : int32_t(e) % 7));
  const int64_t S = offsets.back() + 3, stride = c.repeated ? 0 : K;
  const DType dtype = DTypeOf<T>::value;
  const auto x = rounded<T>(integers(c.repeated ? K : S * K, 7)), w = rounded<T>(integers(E * N * K, 8));
  const std::vector<T> nan(S * N, cuda::narrow<T>(NAN));
  const auto product = [&](const int32_t* offsets, const T* x, T* w) {
    return GroupedGemm{S, E, N, K, offsets, {x, dtype, stride}, matrix(w, N, K, c.transposed), {}};
  };
  std::vector<T> expected = nan;
  cpu::grouped_gemm(product(offsets.data(), x.data(), const_cast<T*>(w.data())), 1, expected.data(), N);
  OnDevice<T> dx(x), dw(w), y(nan);
  OnDevice<int32_t> doffsets(offsets);
  const std::vector<uint8_t> bytes(cuda::grouped_gemm_workspace(E), 0xff);
  OnDevice<uint8_t> workspace(bytes);
  GroupedGemm p = product(doffsets.data(), dx.data(), dw.data());
  if (!bytes.empty()) p.workspace = workspace.data();
  cuda::grouped_gemm(p, nullptr, y.data(), N);
  EXPECT(equal(y.read(), expected));
}

// Odd sizes, and sizes that the tensor cores take where there are any.
template <typename T>
void test_products() {
  for (const bool transposed : {false, true})
    for (const bool gathered : {false, true}) {
      for (const ScaleOn scale_on : {ScaleOn::output, ScaleOn::input}) {
        forward<T>({65, 17, transposed, gathered, scale_on});
        forward<T>({8, 33, transposed, gathered, scale_on});
        forward<T>({136, 40, transposed, gathered, scale_on, true});
      }
      forward<T>({136, 328, transposed, gathered});    // more depth than a ring of shared memory holds
      forward<T>({136, 40, transposed, gathered}, 1);  // rows between two pieces of 16 bytes
      forward<T>({5, 0, transposed, gathered});
      weight_gradient<T>({66, 5, transposed, gathered});
      weight_gradient<T>({3, 70, transposed, gathered});
      weight_gradient<T>({136, 72, transposed, gathered, ScaleOn::output, true});
      weight_gradient<T, Acc<T>>({66, 5, transposed, gathered}, true);
      weight_gradient<T, Acc<T>>({136, 72, transposed, gathered, ScaleOn::output, true}, true);
      plain<T>({transposed, gathered});
    }
}

// What would fault on a tensor core's path does not take it.
void test_fits_tensor_cores() {
  alignas(16) static uint16_t memory[64];
  const auto fits = [&](int64_t N, int64_t K, int64_t x_stride, int64_t w_row, int64_t w_column, int64_t shift) {
    GroupedGemm p{};
    p.S = 1, p.E = 1, p.N = N, p.K = K;
    p.x = {memory + shift, DType::bf16, x_stride};
    p.w = {memory, DType::bf16, N * K, w_row, w_column};
    return cuda::fits_tensor_cores(cuda::product_of<bf16>(p, memory, N));
  };
  EXPECT(fits(16, 24, 24, 24, 1, 0));
  EXPECT(fits(16, 24, 24, 1, 16, 0));
  EXPECT(!fits(16, 24, 24, 24, 1, 1));  // x begins between pieces
  EXPECT(!fits(16, 24, 25, 24, 1, 0));  // its rows do
  EXPECT(!fits(16, 20, 24, 24, 1, 0));  // they end so
  EXPECT(!fits(12, 24, 24, 24, 1, 0));  // y's do
  EXPECT(!fits(16, 24, 24, 25, 1, 0));
  EXPECT(!fits(16, 24, 24, 1, 17, 0));
  EXPECT(!fits(16, 24, 24, 48, 2, 0));  // neither rows nor columns of w lie side by side
}

// The same of the products in a backward pass.
void test_backward_fits_tensor_cores() {
  alignas(16) static uint16_t memory[64];
  auto* const bf16s = reinterpret_cast<bf16*>(memory);
  auto* const floats = reinterpret_cast<float*>(memory);
  GroupedGemm p{};
  p.S = 1, p.E = 1, p.N = 16, p.K = 24;
  p.x = {memory, DType::bf16, 24}, p.w = {memory, DType::bf16, 16 * 24, 1, 16};
  const auto plain = cuda::product_of<bf16>(p, memory, p.N);
  const auto fits = [&](int64_t N, const bf16* h, bf16* dh, bf16* act) {
    const cuda::ActivationBackward<bf16> to{N, h, nullptr, {}, false, dh, act, nullptr};
    return cuda::fits_tensor_cores(cuda::Product<bf16, cuda::ActivationBackward<bf16>>{
        plain.S, plain.E, N, plain.K, nullptr, plain.x, plain.w, plain.up, to});
  };
  EXPECT(fits(16, bf16s, bf16s, bf16s));
  EXPECT(fits(16, bf16s, bf16s, nullptr));
  EXPECT(!fits(16, bf16s + 1, bf16s, bf16s));
  EXPECT(!fits(16, bf16s, bf16s + 4, bf16s));
  EXPECT(!fits(16, bf16s, bf16s, bf16s + 2));
  EXPECT(!fits(12, bf16s, bf16s, bf16s));

  const auto wgrad_fits = [&](int64_t row, int64_t column, int64_t expert, float* onto) {
    auto gradient = cuda::gradient_of<bf16>({1, 1, 16, 24, nullptr, {memory, DType::bf16, 16}, p.x},
                                            {memory, DType::bf16, expert, row, column});
    gradient.onto = onto;
    return cuda::fits_tensor_cores(gradient);
  };
  EXPECT(wgrad_fits(24, 1, 16 * 24, nullptr));
  EXPECT(wgrad_fits(28, 1, 16 * 28, floats));  // 16 bytes hold fewer of those
  EXPECT(!wgrad_fits(28, 1, 16 * 28, nullptr));
  EXPECT(!wgrad_fits(24, 1, 16 * 24, floats + 2));
  EXPECT(!wgrad_fits(24, 1, 2, floats));
  EXPECT(!wgrad_fits(1, 16, 16 * 24, floats));
}

#if !defined(MOERT_EMULATED) || defined(MOERT_CUTLASS)
void test_too_many_tiles() {
  alignas(16) static uint16_t memory[64];
  GroupedGemm p{};
  p.S = 1 << 30, p.E = 1, p.N = 1 << 20, p.K = 8;
  p.x = {memory, DType::bf16, 8}, p.w = {memory, DType::bf16, p.N * p.K, p.K, 1};
  std::string said;
  try {
    cuda::grouped_gemm(p, nullptr, memory, p.N);
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  EXPECT(said == "a grouped product must have at most 2^31 - 1 tiles, got 68719493120");
}

constexpr const char* kPersistent = "MOERT_PERSISTENT_GEMM";

void test_persistent() {
  setenv(kPersistent, "1", 1);
  test_products<bf16>();
  test_products<f16>();
  for (const bool gathered : {false, true}) forward<bf16>({264, 520, false, gathered});  // around the ring in one tile
  // So many tiles that a block has several
  plain<bf16>({.transposed = false, .N = 520, .longest = 600});
  plain<f16>({.transposed = false, .N = 520, .K = 264, .E = 40, .longest = 300});
  setenv(kPersistent, "0", 1);
}
#endif

void tests() {
  test_products<float>();
  test_products<double>();
  test_products<bf16>();
  test_products<f16>();
#if defined(MOERT_EMULATED) && defined(MOERT_CUTLASS)
  test_persistent();
  emulate::copies_at_once = true;
  test_products<float>();
  test_products<bf16>();
  test_products<f16>();
#endif
#if !defined(MOERT_EMULATED) || defined(MOERT_CUTLASS)
  test_too_many_tiles();
  test_persistent();
#endif
}

}  // namespace

int main() {
  test_tiles();
  test_bands();
  test_fits_tensor_cores();
  test_backward_fits_tensor_cores();
  return run_tests(tests);
}
