// The persistent grouped GEMM: which tiles it takes, that it takes them, and their sums.
#include "moert/grouped_gemm.h"

#include <cmath>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpp/expect.h"
#include "cuda/grouped_gemm_persistent.h"
#include "integers.h"
#include "memory.h"

#if defined(MOERT_EMULATED)
#include "cuda/emulate.h"
#endif

using namespace moert;

namespace {

constexpr const char* kPersistent = "MOERT_PERSISTENT_GEMM";

bool operator==(const cuda::PersistentTile& a, const cuda::PersistentTile& b) {
  return a.x == b.x && a.w == b.w && a.cluster == b.cluster && a.splits == b.splits;
}

// On 132 multiprocessors, an H200's.
void test_choice() {
  using Tile = cuda::PersistentTile;
  const auto choice = [](int64_t S, int64_t E, int64_t N, int64_t K, bool gated, bool invariant = false,
                         bool may_split = true, int sms = 132) {
    return cuda::persistent_tile({S, E, N, K, gated, gated, invariant, may_split, sms});  // gated rows are gathered
  };
  EXPECT((choice(16384, 8, 14336, 4096, true) == Tile{128, 256, 2, 1}));  // Mixtral-8x7B, 8192 tokens
  EXPECT((choice(65536, 128, 768, 2048, true) == Tile{128, 256, 2, 1}));  // Qwen3-30B-A3B, 8192 tokens
  EXPECT((choice(65536, 128, 2048, 768, false) == Tile{128, 128, 2, 1}));
  EXPECT((choice(65536, 128, 2048, 1024, false) == Tile{128, 256, 2, 1}));
  EXPECT((choice(65536, 128, 768, 768, true) == Tile{128, 256, 2, 1}));
  EXPECT((choice(65536, 128, 768, 2048, true, false, true, 133) == Tile{128, 256, 1, 1}));
  EXPECT((choice(8192, 128, 768, 2048, true) == Tile{128, 256, 1, 1}));  // 1024 tokens
  EXPECT((choice(4096, 128, 2048, 768, false) == Tile{64, 128, 1, 1}));
  EXPECT((choice(2048, 128, 2048, 768, false) == Tile{32, 128, 1, 1}));
  EXPECT((choice(1024, 128, 2048, 768, false) == Tile{16, 128, 1, 1}));
  EXPECT((choice(64, 128, 2048, 768, false) == Tile{8, 128, 1, 1}));  // 8 tokens
  EXPECT((choice(64, 128, 2048, 768, false, true) == Tile{128, 128, 1, 1}));
  // Few tiles: 16 of 128 columns, of 2048 along K
  EXPECT((choice(64, 1, 2048, 2048, false) == Tile{128, 128, 1, 4}));
  EXPECT((choice(8, 1, 2048, 2048, false) == Tile{16, 128, 1, 4}));
  EXPECT((choice(8, 1, 2048, 16384, false) == Tile{16, 128, 1, 8}));
  EXPECT((choice(8, 1, 2048, 2048, false, true) == Tile{128, 128, 1, 1}));
  EXPECT((choice(8, 1, 2048, 2048, false, false, false) == Tile{16, 128, 1, 1}));
  EXPECT((choice(8, 1, 2048, 1000, false) == Tile{16, 128, 1, 2}));
  EXPECT((choice(8, 1, 2048, 960, false) == Tile{16, 128, 1, 1}));   // 15 slices are too few for two parts
  EXPECT((choice(8, 1, 8576, 2048, false) == Tile{16, 128, 1, 1}));  // 67 tiles
}

// However slots are spread, there are no more tiles than the host reckons with, and no fewer for some.
void test_most_row_tiles() {
  uint32_t seed = 9;
  for (int round = 0; round < 200; ++round) {
    const int64_t E = 1 + round % 7, rows = 8 << round % 5;
    int64_t S = 0, tiles = 0;
    for (int64_t e = 0; e < E; ++e) {
      const int64_t count = int64_t((seed = seed * 1664525u + 1013904223u) >> 24) % (1 + 20 * (round % 6));
      S += count;
      tiles += (count + rows - 1) / rows;
    }
    EXPECT(tiles <= cuda::most_row_tiles(S, E, rows));
  }
  EXPECT(cuda::most_row_tiles(2 + 9, 3, 8) == 4);  // 1, 1, 9
  EXPECT(cuda::most_row_tiles(2, 3, 8) == 2);
  EXPECT(cuda::most_row_tiles(0, 3, 8) == 0);
}

struct Case {
  std::vector<int32_t> counts;  // slots of each expert
  int64_t N, K;
  cuda::PersistentTile tile;  // that the emulated device's four multiprocessors get
  bool invariant = false, workspace = true;
};

// Two slots more than the experts have.
template <typename T>
void product(const Case& c, bool transposed, bool gathered) {
  const auto E = int64_t(c.counts.size());
  const int64_t N = c.N, K = c.K, tokens = 11;
  std::vector<int32_t> offsets{0}, index;
  for (const int32_t count : c.counts) offsets.push_back(offsets.back() + count);
  const int64_t S = offsets.back() + 2;
  for (int64_t s = 0; s < S; ++s) index.push_back(s < S - 2 ? int32_t(s * 5 % tokens) : -1);
  const DType dtype = DTypeOf<T>::value;
  const auto x = rounded<T>(integers((gathered ? tokens : S) * K, 1)), w = rounded<T>(integers(E * N * K, 2));
  const auto bias = rounded<T>(integers(E * N, 3));
  const auto scale = integers(S, 4);
  const std::vector<T> nan(S * N, cuda::narrow<T>(NAN));
  const std::vector<uint8_t> bytes(cuda::grouped_gemm_workspace(E), 0xff);
  const auto given = [&](const int32_t* offsets, const T* x, const int32_t* index, T* w, const T* bias,
                         const float* scale) {
    GroupedGemm p{S, E, N, K, offsets, {x, dtype, K, gathered ? index : nullptr, gathered ? tokens : S}, {}, {}};
    p.w = matrix(w, N, K, transposed), p.bias = {bias, dtype, N}, p.scale = scale;
    p.batch_invariant = c.invariant;
    return p;
  };
  std::vector<T> expected = nan;
  cpu::grouped_gemm(given(offsets.data(), x.data(), index.data(), const_cast<T*>(w.data()), bias.data(), scale.data()),
                    1, expected.data(), N);
  OnDevice<T> dx(x), dw(w), dbias(bias), y(nan);
  OnDevice<int32_t> doffsets(offsets), dindex(index);
  OnDevice<float> dscale(scale);
  OnDevice<uint8_t> workspace(bytes);
  GroupedGemm p = given(doffsets.data(), dx.data(), dindex.data(), dw.data(), dbias.data(), dscale.data());
  if (c.workspace) p.workspace = workspace.data();
#if defined(MOERT_EMULATED)
  const cuda::Product<T> told = cuda::product_of<T>(p, y.data(), N);
  EXPECT(cuda::takes_persistent(told) && cuda::tile_of(told) == c.tile);
#endif
  cuda::grouped_gemm(p, nullptr, y.data(), N);
  EXPECT(equal(y.read(), expected));
}

template <typename T>
void products(const Case& c) {
  for (const bool transposed : {false, true})
    for (const bool gathered : {false, true}) product<T>(c, transposed, gathered);
}

using cuda::Gating;

// w1 [E, 2N, K] of eights, else [E, K, 2N]; gathered rows, relu of the gate times up: exact in float32.
template <typename T>
void gated_product(const Case& c, Gating gating, bool saves) {
  const auto E = int64_t(c.counts.size());
  const int64_t N = c.N, K = c.K, tokens = 11, S = std::accumulate(c.counts.begin(), c.counts.end(), int64_t(2));
  std::vector<int32_t> offsets{0}, index;
  for (const int32_t count : c.counts) offsets.push_back(offsets.back() + count);
  for (int64_t s = 0; s < S; ++s) index.push_back(s < S - 2 ? int32_t(s * 5 % tokens) : -1);
  const auto x = integers(tokens * K, 1), w = integers(E * 2 * N * K, 2), bias = integers(E * 2 * N, 3);
  const bool turned = gating != Gating::eights, alternate = gating == Gating::alternate;
  const int64_t row = turned ? 1 : K, column = turned ? 2 * N : 1, apart = alternate ? row : N * row;
  std::vector<T> y(S * N, cuda::narrow<T>(0)), h(S * 2 * N, cuda::narrow<T>(0));
  for (int64_t e = 0; e < E; ++e)
    for (int64_t s = offsets[e]; s < offsets[e + 1]; ++s)
      for (int64_t n = 0; n < N; ++n) {
        float sums[2];
        for (const int64_t up : {0, 1}) {
          sums[up] = bias[e * 2 * N + (alternate ? 2 * n + up : n + up * N)];
          const float* at = &w[e * 2 * N * K + n * (alternate ? 2 : 1) * row + up * apart];
          for (int64_t k = 0; k < K; ++k) sums[up] += x[index[s] * K + k] * at[k * column];
          h[(2 * s + up) * N + n] = cuda::narrow<T>(sums[up]);
        }
        y[s * N + n] = cuda::narrow<T>((sums[0] > 0 ? sums[0] : 0) * sums[1]);
      }
  const std::vector<T> nan(S * 2 * N, cuda::narrow<T>(NAN));
  OnDevice<T> dx(rounded<T>(x)), dw(rounded<T>(w)), dbias(rounded<T>(bias)), dy(nan), dh(nan);
  OnDevice<int32_t> doffsets(offsets), dindex(index);
  OnDevice<uint8_t> workspace(std::vector<uint8_t>(cuda::grouped_gemm_workspace(E), 0xff));
  GroupedGemm g{S, E, N, K, doffsets.data(), {dx.data(), DTypeOf<T>::value, K, dindex.data(), tokens}, {}, {}};
  g.w = {dw.data(), DTypeOf<T>::value, 2 * N * K, alternate ? 2 * row : row, column};
  g.bias = {dbias.data(), DTypeOf<T>::value, 2 * N};
  g.workspace = workspace.data();
  cuda::Product<T> p = cuda::product_of<T>(g, dy.data(), N);
  p.up.data += apart;
  p.epilogue.up_bias = p.epilogue.bias + (alternate ? 1 : N), p.epilogue.bias_step = alternate ? 2 : 1;
  p.epilogue.activates = true, p.epilogue.form = cuda::activation_form<float>({Act::reglu});
  if (saves) p.epilogue.h = dh.data();
#if defined(MOERT_EMULATED)
  EXPECT(cuda::takes_persistent(p) && cuda::tile_of(p) == c.tile);
#endif
  cuda::multiply(p, false, nullptr);
  std::vector<T> got = dy.read();
  got.resize(S * N);
  EXPECT(equal(got, y));
  if (saves) EXPECT(equal(dh.read(), h));
}

void test_gated_products() {
  setenv(kPersistent, "1", 1);
  for (const Gating gating : {Gating::eights, Gating::halves, Gating::alternate}) {
    // Few rows; columns that end within a tile's first or second half
    gated_product<bf16>({{1, 0, 3, 9, 2}, 72, 72, {8, 128, 1, 1}}, gating, true);
    gated_product<f16>({{17, 0, 5, 8}, 136, 328, {16, 128, 1, 1}}, gating, false);
    gated_product<bf16>({{40, 0, 1, 15}, 104, 72, {32, 128, 1, 1}}, gating, true);
    gated_product<f16>({{100, 0, 3, 20}, 40, 1160, {64, 128, 1, 1}}, gating, false);
    // Narrow, wide, in pairs
    gated_product<bf16>({{80, 0, 1, 60}, 72, 136, {128, 128, 1, 1}}, gating, true);
    gated_product<f16>({{300, 0, 1, 260}, 264, 72, {128, 256, 1, 1}}, gating, true);
    gated_product<bf16>({{520, 70}, 264, 136, {128, 256, 2, 1}}, gating, false);
    // Sums in parts
    gated_product<f16>({{128}, 64, 1096, {128, 128, 1, 2}}, gating, true);
    gated_product<bf16>({{5}, 56, 2000, {16, 128, 1, 4}}, gating, true);
  }
  setenv(kPersistent, "0", 1);
}

// dy . down of gathered rows, which becomes the gradient of pre-activations: the products are exact, and what follows
// is the same function, so that only the sums along rows may differ, by their order.
template <typename T>
void activation_backward(const Case& c, bool transposed, bool alternate) {
  const auto E = int64_t(c.counts.size());
  const int64_t N = c.N, K = c.K, tokens = 11, S = std::accumulate(c.counts.begin(), c.counts.end(), int64_t(2));
  const int64_t parts = (N + cuda::kDotColumns - 1) / cuda::kDotColumns;
  std::vector<int32_t> offsets{0}, index;
  for (const int32_t count : c.counts) offsets.push_back(offsets.back() + count);
  for (int64_t s = 0; s < S; ++s) index.push_back(s < S - 2 ? int32_t(s * 5 % tokens) : -1);
  const auto dy = integers(tokens * K, 1), w = integers(E * N * K, 2), scale = integers(S, 4);
  const auto h = rounded<T>(integers(S * 2 * N, 3));
  std::vector<T> dh(S * 2 * N, cuda::narrow<T>(-9)), act(S * N, cuda::narrow<T>(-9));
  std::vector<float> dots(S * parts, -9);
  using To = cuda::ActivationBackward<T>;
  const auto form = cuda::activation_form<float>({Act::swiglu});
  const auto to = [&](const T* h, const float* scale, T* dh, T* act, float* dots) {
    return To{N, h, scale, form, alternate, dh, act, dots};
  };
  OnDevice<T> ddy(rounded<T>(dy)), dw(rounded<T>(w)), dhs(h), ddh(dh), dact(act);
  OnDevice<float> dscale(scale), ddots(dots);
  OnDevice<int32_t> doffsets(offsets), dindex(index);
  const To here = to(h.data(), scale.data(), dh.data(), act.data(), dots.data());
  const ExpertMatrix down = matrix(static_cast<T*>(nullptr), N, K, transposed);
  for (int64_t e = 0; e < E; ++e)
    for (int64_t s = offsets[e]; s < offsets[e + 1]; ++s)
      for (int64_t n = 0; n < N; n += 8) {
        float g[8] = {};
        for (int64_t i = 0; i < 8; ++i)
          for (int64_t k = 0; k < K; ++k)
            g[i] += dy[index[s] * K + k] * w[e * N * K + (n + i) * down.row_stride + k * down.col_stride];
        float& dot = dots[s * parts + n / cuda::kDotColumns];
        dot = (n % cuda::kDotColumns ? dot : 0) + here.store(int32_t(e), s, n, g, g);
      }
  GroupedGemm g{S, E, N, K, doffsets.data(), {ddy.data(), DTypeOf<T>::value, K, dindex.data(), tokens}, {}, {}};
  g.w = matrix(dw.data(), N, K, transposed);
  const cuda::Product<T> plain = cuda::product_of<T>(g, nullptr, N);
  const cuda::Product<T, To> p{
      plain.S, plain.E,       N,
      K,       plain.offsets, plain.x,
      plain.w, plain.w,       to(dhs.data(), dscale.data(), ddh.data(), dact.data(), ddots.data())};
#if defined(MOERT_EMULATED)
  EXPECT(cuda::takes_persistent(p) && cuda::tile_of(p) == c.tile);
#endif
  cuda::multiply(p, false, nullptr);
  EXPECT(equal(ddh.read(), dh) && equal(dact.read(), act));
  const std::vector<float> sums = ddots.read();
  for (int64_t i = 0; i < S * parts; ++i) EXPECT(std::abs(sums[i] - dots[i]) <= 1e-4f * (std::abs(dots[i]) + 100));
}

void test_activation_backward() {
  setenv(kPersistent, "1", 1);
  for (const bool transposed : {false, true}) {
    // Few rows too; columns that end within a sum's 64
    activation_backward<bf16>({{1, 0, 3, 9, 2}, 72, 136, {128, 128, 1, 1}}, transposed, false);
    activation_backward<f16>({{130, 0, 1, 60}, 200, 72, {128, 128, 1, 1}}, transposed, true);
    activation_backward<bf16>({{300, 0, 1, 260}, 264, 72, {128, 256, 1, 1}}, transposed, true);
    activation_backward<f16>({{520, 70}, 264, 136, {128, 256, 2, 1}}, transposed, false);
  }
  activation_backward<bf16>({{0, 0}, 72, 136, {128, 128, 1, 1}}, false, false);
  setenv(kPersistent, "0", 1);
}

void test_products() {
  setenv(kPersistent, "1", 1);
  // Few rows, of experts with more than a tile and with none; depths around the ring
  products<bf16>({{1, 0, 3, 9, 2}, 264, 1160, {8, 128, 1, 1}});
  products<f16>({{17, 0, 5, 8}, 264, 72, {16, 128, 1, 1}});
  products<bf16>({{40, 0, 1, 15}, 136, 328, {32, 128, 1, 1}});
  products<f16>({{100, 0, 3, 20}, 136, 72, {64, 128, 1, 1}});
  product<f16>({{1, 0, 3, 9, 2}, 72, 1160, {8, 128, 1, 1}}, false, false);
  product<bf16>({{17, 0, 5, 8}, 72, 1160, {16, 128, 1, 1}}, true, true);
  for (const bool transposed : {false, true}) {
    // Wide tiles, and pairs of them: a second block with rows, with few, without
    product<bf16>({{300, 0, 1, 260}, 520, 72, {128, 256, 1, 1}}, transposed, true);
    product<bf16>({{520, 70}, 520, 328, {128, 256, 2, 1}}, transposed, true);
    product<f16>({{512, 130}, 264, 1032, {128, 256, 2, 1}}, transposed, false);
    // Turns, of fewer slices and of more than the ring has
    product<bf16>({{300, 0, 1, 260}, 520, 72, {128, 128, 1, 1}}, transposed, false);
    product<f16>({{300, 0, 1, 260}, 520, 600, {128, 128, 1, 1}}, transposed, false);
    product<bf16>({{520, 70}, 520, 328, {128, 128, 2, 1}}, transposed, false);
  }
  // Sums in parts
  products<bf16>({{128}, 128, 1096, {128, 128, 1, 2}});
  products<f16>({{5}, 104, 2000, {16, 128, 1, 4}});
  product<bf16>({{5}, 104, 2000, {16, 128, 1, 1}, false, false}, false, false);  // no memory for them
  product<bf16>({{5}, 104, 2000, {128, 128, 1, 1}, true}, false, true);
  setenv(kPersistent, "0", 1);
}

#if defined(MOERT_EMULATED)
// What the persistent kernel is given when it is asked for, and what it leaves to others.
void test_takes_persistent() {
  alignas(16) static uint16_t memory[64];
  static int32_t index[1];
  struct Asked {
    int64_t N = 16, K = 24, x_stride = 24, w_row = 24, w_column = 1, w_expert = 16 * 24, up = 0, up_expert = 0;
    bool gathered = false;
  };
  const auto takes = [&](const Asked& a) {
    GroupedGemm p{};
    p.S = 3, p.E = 2, p.N = a.N, p.K = a.K;
    p.x = {memory, DType::bf16, a.x_stride, a.gathered ? index : nullptr};
    p.w = {memory, DType::bf16, a.w_expert, a.w_row, a.w_column};
    cuda::Product<bf16> product = cuda::product_of<bf16>(p, memory, a.N);
    product.epilogue.form.gated = a.up != 0;
    product.up.data += a.up;
    product.up.expert = a.up_expert ? a.up_expert : a.w_expert;
    return cuda::takes_persistent(product);
  };
  for (const char* off : {"", "0"}) {
    setenv(kPersistent, off, 1);
    EXPECT(!takes({}));
  }
  setenv(kPersistent, "1", 1);
  EXPECT(takes({}));
  EXPECT(takes({.x_stride = 0, .gathered = true}));
  EXPECT(takes({.w_row = 48, .up = 24, .gathered = true}));  // gates and ups in turns
  EXPECT(takes({.w_row = 1, .w_column = 16}));
  EXPECT(takes({.w_row = 1, .w_column = 32, .up = 16, .gathered = true}));  // turned: halves, and in turns
  EXPECT(takes({.w_row = 2, .w_column = 32, .up = 1, .gathered = true}));
  EXPECT(!takes({.w_row = 2, .w_column = 24, .up = 1, .gathered = true}));
  EXPECT(!takes({.w_row = 2, .w_column = 32}));
  EXPECT(!takes({.w_row = 1, .w_column = 32, .up = 16, .up_expert = 8, .gathered = true}));
  EXPECT(!takes({.w_row = 1, .w_column = 32, .up = 16}));
  EXPECT(!takes({.w_row = 1, .w_column = 8}));  // columns that overlap
  EXPECT(!takes({.up = 24}));                   // nobody asks for it in expert order
  EXPECT(!takes({.up = -24, .gathered = true}));
  EXPECT(!takes({.x_stride = 0}));
  EXPECT(!takes({.w_row = 0}));
  EXPECT(!takes({.w_expert = 0}));
  EXPECT(!takes({.w_expert = int64_t(1) << 39}));
  EXPECT(!takes({.K = 0}));
  setenv(kPersistent, "yes", 1);
  std::string said;
  try {
    takes({});
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  EXPECT(said == "MOERT_PERSISTENT_GEMM must be 0 or 1, got yes");
  setenv(kPersistent, "0", 1);
}
#endif

void tests() {
#if defined(MOERT_EMULATED)
  test_takes_persistent();
  test_products();
  test_gated_products();
  test_activation_backward();
  emulate::copies_at_once = true;
#endif
  test_products();
  test_gated_products();
  test_activation_backward();
}

}  // namespace

int main() {
  test_choice();
  test_most_row_tiles();
  return run_tests(tests);
}
