#include "moert/bit_nested.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/formats_rounding.h"
#include "cpu/parallel.h"
#include "moert/check.h"

namespace moert::cpu {

namespace {

// Where the parts of one row lie: plane(i), scales(level) and zeros.
struct Row {
  const BitNestedPacking& p;
  int64_t matrix;
  int64_t row;

  int64_t plane(int64_t i) const { return ((matrix * planes(p) + i) * p.rows + row) * row_bytes(p); }
  int64_t scales(int64_t level) const { return ((matrix * p.levels + level) * p.rows + row) * groups(p); }
  int64_t zeros() const { return (matrix * p.rows + row) * groups(p); }
};

void set_bit(uint8_t* plane, int64_t column, uint32_t bit) { plane[column / 8] |= uint8_t(bit << column % 8); }
uint32_t bit_of(const uint8_t* plane, int64_t column) { return plane[column / 8] >> column % 8 & 1u; }

// Adds what the level's bit says to value, and returns the bit.
uint32_t step(float w, float scale, float* value) {
  const uint32_t bit = w - *value >= 0.f;
  *value += bit ? scale : -scale;
  return bit;
}

// One group, n weights from `column` on.  False where a scale has no float16.
bool quantize_group(const Row& row, const float* w, int64_t g, uint8_t* codes, f16* scales, uint8_t* zeros) {
  const BitNestedPacking& p = row.p;
  const int64_t first = g * p.group, n = std::min(p.group, p.columns - first);
  const float top = float((1 << p.base) - 1);
  float low = 0.f, high = 0.f, values[128];
  for (int64_t i = 0; i < n; ++i) low = std::min(low, w[first + i]), high = std::max(high, w[first + i]);
  // Half of each, so that the difference of two large weights stays finite.
  const f16 half = to_f16_up((high * 0.5f - low * 0.5f) / (top * 0.5f));
  const float scale = to_float(half);
  scales[row.scales(0) + g] = half;
  if (!(scale < kInfinity)) return false;
  const float zero = scale == 0.f ? 0.f : clamp(nearest(-low / scale), 0.f, top);
  zeros[row.zeros() + g] = uint8_t(int32_t(zero));
  for (int64_t i = 0; i < n; ++i) {
    const float q = scale == 0.f ? zero : clamp(nearest(w[first + i] / scale) + zero, 0.f, top);
    for (int64_t b = 0; b < p.base; ++b) set_bit(codes + row.plane(b), first + i, uint32_t(q) >> b & 1u);
    values[i] = (q - zero) * scale;
  }
  for (int64_t level = 1; level < p.levels; ++level) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += double(std::fabs(w[first + i] - values[i]));
    const f16 mean = to_f16(float(sum / double(n)));
    scales[row.scales(level) + g] = mean;
    for (int64_t i = 0; i < n; ++i) {
      set_bit(codes + row.plane(p.base + level - 1), first + i, step(w[first + i], to_float(mean), values + i));
    }
  }
  return true;
}

// f(row) -> whether it is good, on every row; the first that is not, or -1.
template <typename F>
int64_t first_bad(const BitNestedPacking& p, int threads, const F& f) {
  const int64_t rows = p.matrices * p.rows;
  std::vector<uint8_t> good(size_t(rows), 1);
  parallel_for(rows, threads, [&](int64_t i) { good[size_t(i)] = f(Row{p, i / p.rows, i % p.rows}); });
  const auto bad = std::find(good.begin(), good.end(), uint8_t(0));
  return bad == good.end() ? -1 : bad - good.begin();
}

void dequantize_row(const Row& row, const uint8_t* codes, const f16* scales, const uint8_t* zeros, float* w) {
  const BitNestedPacking& p = row.p;
  for (int64_t i = 0; i < p.columns; ++i) {
    const int64_t g = i / p.group;
    int32_t q = -int32_t(zeros[row.zeros() + g]);
    for (int64_t b = 0; b < p.base; ++b) q += int32_t(bit_of(codes + row.plane(b), i) << b);
    w[i] = float(q) * to_float(scales[row.scales(0) + g]);
    for (int64_t level = 1; level < p.levels; ++level) {
      const float scale = to_float(scales[row.scales(level) + g]);
      w[i] += bit_of(codes + row.plane(p.base + level - 1), i) ? scale : -scale;
    }
  }
}

bool padding_is_zero(const Row& row, const uint8_t* codes) {
  for (int64_t i = 0; i < planes(row.p); ++i) {
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
  MOERT_CHECK(p.base >= 1 && p.base <= 8, "base must be 1 to 8, got ", p.base);
  MOERT_CHECK(p.levels >= 1 && p.levels <= 9 - p.base, "levels must be 1 to ", 9 - p.base, ", got ", p.levels);
}

void bit_nested_quantize(const BitNestedPacking& p, const float* w, int threads, uint8_t* codes, f16* scales,
                         uint8_t* zeros) {
  check_packing(p);
  std::memset(codes, 0, size_t(p.matrices * planes(p) * p.rows * row_bytes(p)));
  const auto weights = [&](const Row& row) { return w + (row.matrix * p.rows + row.row) * p.columns; };
  int64_t bad =
      first_bad(p, threads, [&](const Row& row) { return largest_magnitude(weights(row), p.columns) < kInfinity; });
  MOERT_CHECK(bad < 0, "w must be finite, got inf or nan in row ", bad);
  bad = first_bad(p, threads, [&](const Row& row) {
    bool good = true;
    for (int64_t g = 0; g < groups(p); ++g) good &= quantize_group(row, weights(row), g, codes, scales, zeros);
    return good;
  });
  MOERT_CHECK(bad < 0, "w must have scales within float16, got magnitudes up to ",
              largest_magnitude(w + bad * p.columns, p.columns), " in row ", bad);
}

void bit_nested_dequantize(const BitNestedPacking& p, const uint8_t* codes, const f16* scales, const uint8_t* zeros,
                           int threads, float* w) {
  check_packing(p);
  for (int64_t i = 0; i < p.matrices * p.levels * p.rows * groups(p); ++i) {
    MOERT_CHECK((scales[i].bits & 0x7c00u) != 0x7c00u, "scales must be finite, got inf or nan at index ", i);
  }
  for (int64_t i = 0; i < p.matrices * p.rows * groups(p); ++i) {
    MOERT_CHECK(zeros[i] < 1 << p.base, "zeros must be below ", 1 << p.base, ", got ", int(zeros[i]), " at index ", i);
  }
  const int64_t bad = first_bad(p, threads, [&](const Row& row) {
    dequantize_row(row, codes, scales, zeros, w + (row.matrix * p.rows + row.row) * p.columns);
    return padding_is_zero(row, codes);
  });
  MOERT_CHECK(bad < 0, "codes must be 0 after column ", p.columns, ", got others in row ", bad);
}

}  // namespace moert::cpu
