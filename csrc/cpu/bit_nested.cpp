#include "moert/bit_nested.h"

#include <algorithm>
#include <cstring>
#include <vector>

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
  int64_t scales() const { return (matrix * p.rows + row) * groups(p); }
};

uint32_t bit_of(const uint8_t* plane, int64_t column) { return plane[column / 8] >> column % 8 & 1u; }

// The scales that are tried, those of either sign at which no weight is outside of the cells, times 17, 16, 15 and 14
// sixteenths: at 17 an extreme on the wider side is the middle of the last of 16 cells, below 16 some are cut off.
constexpr int kTried = 8;

struct Tried {
  f16 half[kTried];
  float scale[kTried];
};

Tried scales_to_try(const float* w, int64_t n) {
  float low = 0.f, high = 0.f;
  for (int64_t i = 0; i < n; ++i) low = std::min(low, w[i]), high = std::max(high, w[i]);
  const float up = std::max(high / 7.5f, -low / 8.5f), down = std::max(-low / 7.5f, high / 8.5f);
  Tried tried;
  for (int i = 0; i < kTried; ++i) {
    const float share = float(17 - i % 4) / 16;
    tried.half[i] = to_f16(i < 4 ? up * share : -(down * share));
    tried.scale[i] = to_float(tried.half[i]);
  }
  return tried;
}

// The cell that holds w, of the last ones those beyond them too.
int32_t cell(float w, float scale, float cells, float top) {
  const float units = scale == 0.f ? 0.f : w / scale;
  return int32_t(clamp((units + 8.5f) * cells, 0.f, top));
}

// One group, n weights: its codes, and the scale of least squared error, the first of several; infinite where none of
// them is a float16.
f16 quantize_group(int64_t planes, const float* w, int64_t n, uint8_t* codes) {
  const float cells = float(1 << planes) / 16, top = float((1 << planes) - 1), width = 1 / cells;
  const Tried tried = scales_to_try(w, n);
  double errors[kTried] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int j = 0; j < kTried; ++j) {
      const float middle = (float(cell(w[i], tried.scale[j], cells, top)) + 0.5f) * width - 8.5f;
      const double error = double(w[i]) - double(tried.scale[j] * middle);
      errors[j] += error * error;
    }
  int best = -1;
  for (int j = 0; j < kTried; ++j)
    if (errors[j] < (best < 0 ? double(kInfinity) : errors[best]))
      best = j;  // of an infinite scale it is NaN or infinite
  if (best < 0) return {0x7c00u};
  for (int64_t i = 0; i < n; ++i) codes[i] = uint8_t(cell(w[i], tried.scale[best], cells, top));
  return tried.half[best];
}

// Bit `bit` of n codes, eight a byte.
void pack_plane(const uint8_t* codes, int64_t n, int64_t bit, uint8_t* plane) {
  for (int64_t i = 0; i < n; i += 8) {
    uint32_t byte = 0;
    for (int64_t j = 0; j < std::min<int64_t>(8, n - i); ++j) byte |= (codes[i + j] >> bit & 1u) << j;
    plane[i / 8] = uint8_t(byte);
  }
}

// False where a scale has no float16.
bool quantize_row(const Row& row, const float* w, uint8_t* codes, f16* scales) {
  const BitNestedPacking& p = row.p;
  std::vector<uint8_t> each(size_t(p.columns));
  bool good = true;
  for (int64_t g = 0; g < groups(p); ++g) {
    const int64_t first = g * p.group, n = std::min(p.group, p.columns - first);
    const f16 scale = quantize_group(p.planes, w + first, n, each.data() + first);
    good &= scale.bits != 0x7c00u;
    scales[row.scales() + g] = scale;
  }
  for (int64_t i = 0; i < p.planes; ++i) pack_plane(each.data(), p.columns, p.planes - 1 - i, codes + row.plane(i));
  return good;
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

void dequantize_row(const Row& row, const uint8_t* codes, const f16* scales, float* w) {
  const BitNestedPacking& p = row.p;
  for (int64_t i = 0; i < p.columns; ++i) {
    int32_t code = 0;
    for (int64_t n = 0; n < p.planes; ++n) code = 2 * code + int32_t(bit_of(codes + row.plane(n), i));
    w[i] = to_float(scales[row.scales() + i / p.group]) * bit_nested_value(code, p.planes);
  }
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
  std::memset(codes, 0, size_t(p.matrices * p.planes * p.rows * row_bytes(p)));
  const auto weights = [&](const Row& row) { return w + (row.matrix * p.rows + row.row) * p.columns; };
  int64_t bad =
      first_bad(p, threads, [&](const Row& row) { return largest_magnitude(weights(row), p.columns) < kInfinity; });
  MOERT_CHECK(bad < 0, "w must be finite, got inf or nan in row ", bad);
  bad = first_bad(p, threads, [&](const Row& row) { return quantize_row(row, weights(row), codes, scales); });
  MOERT_CHECK(bad < 0, "w must have scales within float16, got magnitudes up to ",
              largest_magnitude(w + bad * p.columns, p.columns), " in row ", bad);
}

void bit_nested_dequantize(const BitNestedPacking& p, const uint8_t* codes, const f16* scales, int threads, float* w) {
  check_packing(p);
  for (int64_t i = 0; i < p.matrices * p.rows * groups(p); ++i) {
    MOERT_CHECK((scales[i].bits & 0x7c00u) != 0x7c00u, "scales must be finite, got inf or nan at index ", i);
  }
  const int64_t bad = first_bad(p, threads, [&](const Row& row) {
    dequantize_row(row, codes, scales, w + (row.matrix * p.rows + row.row) * p.columns);
    return padding_is_zero(row, codes);
  });
  MOERT_CHECK(bad < 0, "codes must be 0 after column ", p.columns, ", got others in row ", bad);
}

}  // namespace moert::cpu
