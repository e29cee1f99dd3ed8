// The product of one tile, in every way its operands may lie, against the plain sums.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/tile_tasks.h"
#include "expect.h"

using namespace moert;
using namespace moert::cpu;

namespace {

// Small integers: bfloat16 holds them, and every sum is exact in float32, so the result has one right value.
struct Integers {
  uint32_t seed = 1;
  float operator()() { return float(int32_t((seed = seed * 1664525u + 1013904223u) >> 24) % 7 - 3); }
};

// n elements that end where a page ends behind which nothing may be read: tiles are loaded past a sanitizer's sight.
template <typename T>
class Guarded {
 public:
  explicit Guarded(size_t n) : n_(n) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), whole = (n * sizeof(T) + page - 1) / page * page;
    bytes_ = whole + page;
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT(memory_ != MAP_FAILED);
    char* end = static_cast<char*>(memory_) + whole;
    EXPECT(mprotect(end, page, PROT_NONE) == 0);
    data_ = reinterpret_cast<T*>(end - n * sizeof(T));
  }
  ~Guarded() { munmap(memory_, bytes_); }
  Guarded(const Guarded&) = delete;
  T* data() const { return data_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + n_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  size_t n_, bytes_;
  void* memory_;
  T* data_;
};

// What no product may read before it has written it.
Memory<float> nothing(int64_t count) {
  Memory<float> memory = allocate<float>(count);
  std::fill_n(memory.get(), count, NAN);
  return memory;
}

// [rows, K] in float32 or bfloat16; `along_rows`: element (r, k) at k * rows + r.
template <typename T>
struct Operand {
  int64_t rows, K;
  bool along_rows;
  Guarded<T> data;

  Operand(int64_t rows, int64_t K, bool along_rows, Integers& next)
      : rows(rows), K(K), along_rows(along_rows), data(size_t(rows * K)) {
    for (auto& x : data) set(x, next());
  }
  static void set(float& to, float x) { to = x; }
  static void set(bf16& to, float x) { to = to_bf16(x); }
  static float get(float x) { return x; }
  static float get(bf16 x) { return to_float(x); }
  float at(int64_t r, int64_t k) const { return get(data[size_t(along_rows ? k * rows + r : r * K + k)]); }
  TileOperand operand() const {
    return {{data.data(), DTypeOf<T>::value, along_rows ? rows : K, 1, nullptr}, along_rows};
  }
  // As moert.prepack_ leaves weights.
  std::vector<T> panels() const {
    const Panel panel = panel_of(DTypeOf<T>::value);
    std::vector<T> out;
    for (int64_t n = 0; n < rows; n += panel.columns)
      for (int64_t k = 0; k < K; k += panel.depth)
        for (int64_t i = 0; i < panel.columns * panel.depth; ++i) {
          out.emplace_back();
          set(out.back(), at(n + i / panel.depth, k + i % panel.depth));
        }
    return out;
  }
};

struct Sums {
  Memory<float> c = allocate<float>(kTileRows * kTileColumns);
  float at(int64_t m, int64_t n) const { return c[m * kTileColumns + n]; }
  Sums() { std::fill(c.get(), c.get() + kTileRows * kTileColumns, 5.0f); }
};

constexpr int kPlain = 0, kAccumulate = 1, kIndexed = 2, kPanels = 4, kInvariant = 8;  // options

template <typename T>
void product(int64_t M, int64_t N, int64_t K, bool a_rows, bool b_rows, int options) {
  Integers next;
  const Operand<T> a(M, K, a_rows, next), b(N, K, b_rows, next), b2(N, K, b_rows, next);
  const Memory<float> scratch = nothing(kGemmScratch);
  Sums c, c2;
  GemmTile tile{M, N, K, a.operand(), b.operand(), c.c.get(), scratch.get(), (options & kAccumulate) != 0};
  tile.b2 = b2.operand(), tile.c2 = c2.c.get();
  tile.batch_invariant = (options & kInvariant) != 0;
  // Stored rows the other way round.
  std::vector<int32_t> index;
  const int64_t stored = a_rows ? K : M;
  for (int64_t r = 0; r < stored; ++r) index.push_back(int32_t(stored - 1 - r));
  if (options & kIndexed) tile.a.matrix.index = index.data();
  const auto a_at = [&](int64_t m, int64_t k) {
    if (!(options & kIndexed)) return a.at(m, k);
    return a_rows ? a.at(m, K - 1 - k) : a.at(M - 1 - m, k);
  };
  std::vector<T> panels, panels2;
  if (options & kPanels) {
    panels = b.panels(), panels2 = b2.panels();
    tile.b = {{panels.data(), DTypeOf<T>::value, K, 1, nullptr}, false, true};
    tile.b2 = {{panels2.data(), DTypeOf<T>::value, K, 1, nullptr}, false, true};
  }
  gemm_kernels().gemm(tile);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      float sum = options & kAccumulate ? 5 : 0, sum2 = sum;
      for (int64_t k = 0; k < K; ++k) sum += a_at(m, k) * b.at(n, k), sum2 += a_at(m, k) * b2.at(n, k);
      EXPECT(c.at(m, n) == sum && c2.at(m, n) == sum2);
    }
  for (int64_t m = M; m < kTileRows; ++m) EXPECT(c.at(m, 0) == 5);  // rows of another thread
}

// Calls with the same number have the same rows of x, but other weights and other numbers of them; another number is
// laid out anew.
void same_rows(int64_t M, int64_t K) {
  Integers next;
  const Operand<bf16> a(M, K, false, next), other(M, K, false, next), w(256, K, false, next);
  const Memory<float> scratch = nothing(kGemmScratch);
  const int64_t number = new_numbers(2);
  const auto check = [&](const Operand<bf16>& x, int64_t first, int64_t N, int64_t number) {
    Sums c;
    TileOperand b = w.operand();
    b.matrix.data = &w.data[size_t(first * K)];
    GemmTile tile{M, N, K, x.operand(), b, c.c.get(), scratch.get()};
    tile.same_a = number;
    gemm_kernels().gemm(tile);
    for (int64_t m = 0; m < M; m += 7)
      for (int64_t n = 0; n < N; n += 3) {
        float sum = 0;
        for (int64_t k = 0; k < K; ++k) sum += x.at(m, k) * w.at(first + n, k);
        EXPECT(c.at(m, n) == sum);
      }
  };
  for (const int64_t N : {256, 64, 256, 32, 16, 5, 128}) check(a, 256 - N, N, number);
  check(other, 0, 32, number + 1);
  check(a, 0, 32, 0);
  check(other, 3, 32, 0);
  check(a, 0, 40, number);
}

// Weight gradients leave c for their output part by part.
void finished_parts() {
  Integers next;
  constexpr int64_t M = 37, N = 70, K = 45;
  const Operand<bf16> a(M, K, true, next), b(N, K, true, next);
  const Memory<float> scratch = nothing(kGemmScratch);
  Sums c;
  std::vector<float> out(size_t(M * N), 1.0f);
  StoreTile store{M, N, c.c.get(), nullptr, nullptr, ScaleOn::output, out.data(), DType::f32, N, 1};
  store.accumulate = true;
  GemmTile tile{M, N, K, a.operand(), b.operand(), c.c.get(), scratch.get()};
  tile.finish = &store;
  gemm_kernels().gemm(tile);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      float sum = 1;
      for (int64_t k = 0; k < K; ++k) sum += a.at(m, k) * b.at(n, k);
      EXPECT(out[size_t(m * N + n)] == sum);
    }
}

// The bits of a row are the same whatever rows are beside it, here of numbers whose sums are rounded.
void invariant_rows(bool in_panels) {
  constexpr int64_t N = 64, K = 4642;
  Integers next;
  Operand<bf16> x(kTileRows, K, false, next), w(N, K, false, next);
  for (auto* operand : {&x, &w})
    for (auto& value : operand->data) value = to_bf16(next() + next() / 7);
  const std::vector<bf16> panels = w.panels();
  TileOperand weights = w.operand();
  if (in_panels) weights = {{panels.data(), DType::bf16, K, 1, nullptr}, false, true};
  const Memory<float> scratch = nothing(kGemmScratch);
  const auto rows = [&](int64_t M) {
    Sums c;
    GemmTile tile{M, N, K, x.operand(), weights, c.c.get(), scratch.get()};
    tile.batch_invariant = true;
    gemm_kernels().gemm(tile);
    return c;
  };
  const Sums all = rows(kTileRows);
  for (const int64_t M : {1, 2, 3, 7, 16, 17, 64, 130})
    for (const Sums c = rows(M); const int64_t m : {int64_t(0), M - 1})
      EXPECT(!std::memcmp(&c.c[m * kTileColumns], &all.c[m * kTileColumns], N * sizeof(float)));
}

}  // namespace

int main() {
  for (const bool a_rows : {false, true})
    for (const bool b_rows : {false, true})
      for (const int options : {kPlain, kAccumulate | kIndexed, kAccumulate | kInvariant}) {
        for (const int64_t M : {1, 2, 3, 16, 33, 100})
          for (const int64_t N : {1, 16, 24, 65})
            for (const int64_t K : {0, 1, 2, 31, 32, 100}) {
              product<float>(M, N, K, a_rows, b_rows, options);
              product<bf16>(M, N, K, a_rows, b_rows, options);
            }
        for (const int64_t K : {511, 1024, 2049, 4100}) {
          product<float>(20, 18, K, a_rows, b_rows, options);
          product<bf16>(20, 48, K, a_rows, b_rows, options);
          product<bf16>(256, 16, K / 2, a_rows, b_rows, options);
        }
      }
  for (const bool a_rows : {false, true})
    for (const int64_t M : {1, 2, 16, 45})
      for (const int64_t K : {2, 30, 32, 130, 512, 1026}) {
        product<float>(M, 64, K, a_rows, false, kPanels);
        product<bf16>(M, 96, K, a_rows, false, kPanels | kAccumulate);
      }
  // Before, at and behind the ends of blocks of panels, which are longer for fewer rows.
  for (const bool a_rows : {false, true})
    for (const int64_t M : {1, 32, 33, 70, 256})
      for (const int64_t K : {512, 2146, 4320, 4350}) product<bf16>(M, 64, K, a_rows, false, kPanels | kAccumulate);
  for (const int64_t M : {3, 40, 256})
    for (const int64_t K : {96, 320, 2100}) same_rows(M, K);
  finished_parts();
  invariant_rows(false);
  invariant_rows(true);
}
