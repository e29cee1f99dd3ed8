// Products of int8 rows with weights that have one scale a row: whatever the instruction set and the number of rows,
// the integers are the same, and so is what becomes of them.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/packed_experts.h"
#include "expect.h"
#include "packed_matrix.h"

using namespace moert;

std::vector<float> uniform(int64_t n, uint32_t seed) {
  std::vector<float> x(n);
  for (auto& value : x) value = float((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1;
  return x;
}

// x to int8 with one scale a row, and the scale.
float quantized(const float* x, int64_t n, std::vector<int64_t>& q) {
  float most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(x[i]));
  const float scale = row_scale(float_to_bits(most), kLargestInt8);
  q.resize(n);
  for (int64_t i = 0; i < n; ++i) q[i] = scale > 0 ? int64_t(std::nearbyint(x[i] / scale)) : 0;
  return scale;
}

// The codes of a weight row as integers, from the floats that they stand for.
std::vector<int64_t> integers(const float* w, int64_t n, float scale) {
  std::vector<int64_t> q(n);
  for (int64_t i = 0; i < n; ++i) q[i] = scale > 0 ? std::llround(w[i] / scale) : 0;
  return q;
}

struct RowsOfX {
  cpu::Memory<char> data;
  int64_t bytes;
  std::vector<int32_t> index;  // backwards
  std::vector<std::vector<int64_t>> q;
  std::vector<float> scales;

  RowsOfX(const Packing& packing, int64_t M, const std::vector<float>& x)
      : bytes(cpu::packed_gemm_kernels().quantized_row_bytes(packing, Precision::int8)), q(M), scales(M) {
    data = cpu::allocate<char>(M * bytes);
    const int64_t K = packing.columns;
    for (int64_t m = 0; m < M; ++m) {
      index.push_back(int32_t(M - 1 - m));
      std::vector<float> row(x.begin() + m * K, x.begin() + (m + 1) * K);
      cpu::packed_gemm_kernels().quantize_row(row.data(), packing, Precision::int8, data.get() + index[m] * bytes);
      scales[m] = quantized(row.data(), K, q[m]);
    }
  }
};

void products(const Matrix& matrix, const std::vector<float>& x, int64_t M, int64_t N, int64_t first) {
  const Packing& packing = matrix.packing;
  const int64_t K = packing.columns;
  const RowsOfX rows(packing, M, x);
  const auto scratch = cpu::allocate<char>(cpu::packed_scratch(K));
  std::vector<float> c(cpu::kTileRows * cpu::kTileColumns, NAN);
  const f16* w_scales = reinterpret_cast<const f16*>(matrix.scales.data());
  // Twice with one number: the second call finds the rows of x laid out, and has other weights.
  for (const int64_t row : {int64_t(0), first}) {
    cpu::PackedTile tile{M,
                         N,
                         {rows.data.get(), rows.bytes, rows.index.data()},
                         cpu::rows_of(matrix.packed(), 0, row),
                         Precision::int8,
                         c.data(),
                         scratch.get()};
    tile.same_a = 1 + M * 1000 + K;
    cpu::packed_gemm_kernels().gemm(tile);
    for (int64_t n = 0; n < N; ++n) {
      const float scale = to_float(w_scales[row + n]);
      const auto w = integers(matrix.values.data() + (row + n) * K, K, scale);
      for (int64_t m = 0; m < M; ++m) {
        int64_t sum = 0;
        for (int64_t k = 0; k < K; ++k) sum += w[k] * rows.q[m][k];
        EXPECT(c[m * cpu::kTileColumns + n] == float(sum) * scale * rows.scales[m]);
      }
    }
  }
}

int main() {
  for (const Format format : {Format::int8, Format::ternary2, Format::ternary5})
    for (const int64_t K : {0, 1, 16, 33, 97, 320, 768, 2711, 4500}) {
      const int64_t most = K > 1000 ? 64 : 256;  // columns of a tile
      const Matrix matrix({format, most + 5, K, 0}, 1, uniform((most + 5) * K, 2));
      const auto x = uniform(256 * K, 3);
      for (const int64_t M : {1, 5, 8, 16, 17, 33, 100})
        for (const int64_t N : {int64_t(1), int64_t(16), int64_t(31), most}) products(matrix, x, M, N, 5);
      products(matrix, x, 256, 48, 3);
    }
}
