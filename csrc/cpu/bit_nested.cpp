#include "moert/bit_nested.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/formats_isa.h"
#include "cpu/formats_rounding.h"
#include "cpu/parallel.h"
#include "moert/check.h"

namespace moert::cpu {

namespace {

// Where the parts of one row lie: plane(i) and scales.
struct Row {
  const BitNestedPacking& p;
  int64_t matrix;
  int64_t row;

  int64_t plane(int64_t i) const { return ((matrix * p.planes + i) * p.rows + row) * row_bytes(p); }
  PlanesOfRow planes(const uint8_t* codes) const {
    return {const_cast<uint8_t*>(codes) + plane(0), p.rows * row_bytes(p)};
  }
  int64_t scales() const { return (matrix * p.rows + row) * groups(p); }
};

uint32_t bit_of(const uint8_t* plane, int64_t column) { return plane[column / 8] >> column % 8 & 1u; }

// f(row) -> whether it is good, on every row; the first that is not, or -1.
template <typename F>
int64_t first_bad(const BitNestedPacking& p, int threads, const F& f) {
  const int64_t rows = p.matrices * p.rows;
  std::vector<uint8_t> good(size_t(rows), 1);
  parallel_for(rows, threads, [&](int64_t i) { good[size_t(i)] = f(Row{p, i / p.rows, i % p.rows}); });
  const auto bad = std::find(good.begin(), good.end(), uint8_t(0));
  return bad == good.end() ? -1 : bad - good.begin();
}

bool padding_is_zero(const Row& row, const uint8_t* codes) {
  for (int64_t i = 0; i < row.p.planes; ++i) {
    for (int64_t column = row.p.columns; column < row_bytes(row.p) * 8; ++column) {
      if (bit_of(codes + row.plane(i), column)) return false;
    }
  }
  return true;
}

}  // namespace

void check_packing(const BitNestedPacking& p) {
  MOERT_CHECK(p.group == 32 || p.group == 64 || p.group == 128, "group must be 32, 64 or 128 for bit_nested, got ",
              p.group);
  MOERT_CHECK(p.planes >= 1 && p.planes <= 8, "planes must be 1 to 8, got ", p.planes);
}

void bit_nested_quantize(const BitNestedPacking& p, const float* w, int threads, uint8_t* codes, f16* scales) {
  check_packing(p);
  const FormatKernels& kernels = format_kernels();
  std::memset(codes, 0, size_t(p.matrices * p.planes * p.rows * row_bytes(p)));
  const auto weights = [&](const Row& row) { return w + (row.matrix * p.rows + row.row) * p.columns; };
  int64_t bad =
      first_bad(p, threads, [&](const Row& row) { return largest_magnitude(weights(row), p.columns) < kInfinity; });
  MOERT_CHECK(bad < 0, "w must be finite, got inf or nan in row ", bad);
  bad = first_bad(p, threads, [&](const Row& row) {
    std::vector<uint8_t> each(size_t(p.columns));
    return kernels.quantize_planes(p, weights(row), each.data(), row.planes(codes), scales + row.scales());
  });
  MOERT_CHECK(bad < 0, "w must have scales within float16, got magnitudes up to ",
              largest_magnitude(w + bad * p.columns, p.columns), " in row ", bad);
}

void bit_nested_dequantize(const BitNestedPacking& p, const uint8_t* codes, const f16* scales, int threads, float* w) {
  check_packing(p);
  for (int64_t i = 0; i < p.matrices * p.rows * groups(p); ++i) {
    MOERT_CHECK((scales[i].bits & 0x7c00u) != 0x7c00u, "scales must be finite, got inf or nan at index ", i);
  }
  const FormatKernels& kernels = format_kernels();
  const int64_t bad = first_bad(p, threads, [&](const Row& row) {
    std::vector<uint8_t> each(size_t(p.columns));
    float* out = w + (row.matrix * p.rows + row.row) * p.columns;
    kernels.dequantize_planes(p, row.planes(codes), scales + row.scales(), each.data(), out);
    return padding_is_zero(row, codes);
  });
  MOERT_CHECK(bad < 0, "codes must be 0 after column ", p.columns, ", got others in row ", bad);
}

}  // namespace moert::cpu
