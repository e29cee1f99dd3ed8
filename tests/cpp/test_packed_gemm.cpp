// Products of int8 rows with weights that have one scale a row, or become so: whatever the instruction set and the
// number of rows, the integers are the same, and so is what becomes of them.
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

// A weight row as integers of one scale.
struct Integers {
  float scale;
  std::vector<int64_t> q;
};

// The scale of group g of row n, and the largest value that a code has in its units.
std::pair<float, int> scale_of_group(const Matrix& m, int64_t n, int64_t g) {
  const int64_t at = n * groups(m.packing) + g;
  if (m.packing.format == Format::mxfp4) return {e8m0_to_float(m.scales[at]) / 2, 12};
  const float scale = to_float(reinterpret_cast<const f16*>(m.scales.data())[at]);
  if (m.packing.format == Format::int4_asymmetric) return {scale, std::max<int>(m.zeros[at], 15 - m.zeros[at])};
  return {scale, m.packing.format == Format::int8 ? 127 : 8};
}

// Row n, from the floats that its codes stand for.  Of groups (docs/quantized.md, "int8_weights"): the scale is what
// they can hold at most over 127, and a group's, in 2048ths of it, what its values are multiplied by.
Integers integers(const Matrix& m, int64_t n) {
  const int64_t K = m.packing.columns, group = m.packing.group ? m.packing.group : std::max<int64_t>(K, 1);
  float most = 0;
  for (int64_t g = 0; g < groups(m.packing); ++g) {
    const auto [scale, largest] = scale_of_group(m, n, g);
    most = std::max(most, std::abs(scale) * float(largest));
  }
  Integers row{m.packing.group ? row_scale(float_to_bits(most), kLargestInt8) : scale_of_group(m, n, 0).first, {}};
  for (int64_t k = 0; k < K; ++k) {
    const float scale = scale_of_group(m, n, k / group).first, w = m.values[n * K + k];
    const int64_t value = scale != 0 ? std::llround(w / scale) : 0;
    const float unit = row.scale > 0 ? 2048 / row.scale : 0;
    const int64_t factor = m.packing.group ? int64_t(std::nearbyint(scale * unit)) : 2048;
    row.q.push_back(int64_t(std::floor(double(value * factor) / 2048 + 0.5)));
  }
  return row;
}

struct RowsOfX {
  cpu::Memory<char> data;
  int64_t bytes;
  std::vector<int32_t> index;  // backwards
  std::vector<std::vector<int64_t>> q;
  std::vector<float> scales;

  RowsOfX(const Packing& packing, Precision precision, int64_t M, const std::vector<float>& x)
      : bytes(cpu::packed_gemm_kernels().quantized_row_bytes(packing, precision)), q(M), scales(M) {
    data = cpu::allocate<char>(M * bytes);
    const int64_t K = packing.columns;
    for (int64_t m = 0; m < M; ++m) {
      index.push_back(int32_t(M - 1 - m));
      std::vector<float> row(x.begin() + m * K, x.begin() + (m + 1) * K);
      cpu::packed_gemm_kernels().quantize_row(row.data(), packing, precision, data.get() + index[m] * bytes);
      scales[m] = quantized(row.data(), K, q[m]);
    }
  }
};

void products(const Matrix& matrix, const std::vector<float>& x, int64_t M, int64_t N, int64_t first) {
  const Packing& packing = matrix.packing;
  const int64_t K = packing.columns;
  const Precision precision = packing.group ? Precision::int8_weights : Precision::int8;
  const RowsOfX rows(packing, precision, M, x);
  const auto scratch = cpu::allocate<char>(cpu::packed_scratch(packing, precision));
  std::vector<float> c(cpu::kTileRows * cpu::kTileColumns, NAN);
  // Twice with one number: the second call finds the rows of x laid out, and has other weights.
  for (const int64_t row : {int64_t(0), first}) {
    cpu::PackedTile tile{M,
                         N,
                         {rows.data.get(), rows.bytes, rows.index.data()},
                         cpu::rows_of(matrix.packed(), 0, row),
                         precision,
                         c.data(),
                         scratch.get()};
    tile.same_a = 1 + M * 1000 + K;
    cpu::packed_gemm_kernels().gemm(tile);
    for (int64_t n = 0; n < N; ++n) {
      const Integers w = integers(matrix, row + n);
      for (int64_t m = 0; m < M; ++m) {
        int64_t sum = 0;
        for (int64_t k = 0; k < K; ++k) sum += w.q[k] * rows.q[m][k];
        EXPECT(c[m * cpu::kTileColumns + n] == float(sum) * w.scale * rows.scales[m]);
      }
    }
  }
}

int main() {
  const std::pair<Format, int64_t> kinds[] = {{Format::int8, 0},
                                              {Format::ternary2, 0},
                                              {Format::ternary5, 0},
                                              {Format::int8, 32},
                                              {Format::int8, 128},
                                              {Format::int4, 32},
                                              {Format::int4, 64},
                                              {Format::int4, 128},
                                              {Format::mxfp4, 32},
                                              {Format::int4_asymmetric, 32},
                                              {Format::int4_asymmetric, 64},
                                              {Format::int4_asymmetric, 128}};
  for (const auto [format, group] : kinds)
    for (const int64_t K : {0, 1, 16, 33, 97, 320, 768, 2711, 4500}) {
      const int64_t most = K > 1000 ? 64 : 256;  // columns of a tile
      auto w = uniform((most + 5) * K, 2);
      for (int64_t i = 0; i < int64_t(w.size()); ++i) w[i] *= i / 32 % 5 == 1 ? 0.1f : i / K % 7 == 3 ? 0 : 1;
      const Matrix matrix({format, most + 5, K, group}, 1, w);
      const auto x = uniform(256 * K, 3);
      for (const int64_t M : {1, 5, 8, 16, 17, 33, 100})
        for (const int64_t N : {int64_t(1), int64_t(16), int64_t(31), most}) products(matrix, x, M, N, 5);
      products(matrix, x, 256, 48, 3);
    }
}
