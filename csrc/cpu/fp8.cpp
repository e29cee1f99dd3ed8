#include "moert/fp8.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "moert/check.h"

namespace moert::cpu {

namespace {

// A band is up to 128 rows of one matrix: the rows that share scales.
struct Band {
  int64_t row;  // of all matrices' rows
  int64_t rows;
  int64_t scale;  // index of its first scale
};

Band band_of(const Fp8Packing& p, int64_t task) {
  const int64_t bands = fp8_blocks(p.rows), matrix = task / bands, first = task % bands * kFp8Block;
  return {matrix * p.rows + first, std::min(kFp8Block, p.rows - first), task * fp8_blocks(p.columns)};
}

void quantize_block(const float* w, int64_t stride, int64_t rows, int64_t columns, uint8_t* codes, int64_t bytes,
                    float* scale) {
  float largest = 0.f;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) largest = std::max(largest, std::fabs(w[i * stride + j]));
  }
  *scale = largest / 448.f;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      codes[i * bytes + j] = *scale == 0.f ? uint8_t(0) : to_e4m3(w[i * stride + j] / *scale);
    }
  }
}

// The first bad row of each band, or -1, as errors may not leave a parallel region.
template <typename F>
int64_t first_bad(const Fp8Packing& p, int threads, const F& f) {
  const int64_t tasks = p.matrices * fp8_blocks(p.rows);
  std::vector<int64_t> bad(size_t(tasks), -1);
  parallel_for(tasks, threads, [&](int64_t task) { bad[size_t(task)] = f(band_of(p, task)); });
  const auto at = std::find_if(bad.begin(), bad.end(), [](int64_t row) { return row >= 0; });
  return at == bad.end() ? -1 : *at;
}

}  // namespace

void fp8_quantize(const Fp8Packing& p, const float* w, int threads, uint8_t* codes, float* scales) {
  const int64_t bytes = fp8_row_bytes(p.columns);
  const int64_t bad = first_bad(p, threads, [&](const Band& band) {
    for (int64_t row = band.row; row < band.row + band.rows; ++row) {
      const float* values = w + row * p.columns;
      if (!std::all_of(values, values + p.columns, [](float x) { return std::isfinite(x); })) return row;
      std::memset(codes + row * bytes + p.columns, 0, size_t(bytes - p.columns));
    }
    for (int64_t block = 0; block < fp8_blocks(p.columns); ++block) {
      const int64_t column = block * kFp8Block;
      quantize_block(w + band.row * p.columns + column, p.columns, band.rows, std::min(kFp8Block, p.columns - column),
                     codes + band.row * bytes + column, bytes, scales + band.scale + block);
    }
    return int64_t(-1);
  });
  MOERT_CHECK(bad < 0, "w must be finite, got inf or nan in row ", bad);
}

void fp8_dequantize(const Fp8Packing& p, const uint8_t* codes, const float* scales, int threads, float* w) {
  const int64_t bytes = fp8_row_bytes(p.columns);
  const int64_t count = p.matrices * fp8_blocks(p.rows) * fp8_blocks(p.columns);
  for (int64_t i = 0; i < count; ++i) {
    MOERT_CHECK(std::isfinite(scales[i]), "scales must be finite, got inf or nan at block ", i);
  }
  const int64_t bad = first_bad(p, threads, [&](const Band& band) {
    for (int64_t row = band.row; row < band.row + band.rows; ++row) {
      const uint8_t* packed = codes + row * bytes;
      bool valid = std::all_of(packed + p.columns, packed + bytes, [](uint8_t byte) { return byte == 0; });
      for (int64_t j = 0; j < p.columns; ++j) {
        valid &= (packed[j] & 0x7f) != 0x7f;
        w[row * p.columns + j] = scales[band.scale + j / kFp8Block] * e4m3_to_float(packed[j]);
      }
      if (!valid) return row;
    }
    return int64_t(-1);
  });
  MOERT_CHECK(bad < 0, "codes must be e4m3 without NaN and 0 after column ", p.columns, ", got others in row ", bad);
}

}  // namespace moert::cpu
