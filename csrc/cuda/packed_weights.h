// Packed weights as a warp reads them: 16 bytes a lane, of which floats are made in registers.
//
// A step is kWarp lanes by Codes::kColumns columns.  Rows of x are laid out for it (ColumnOrder), so that the lanes
// read 16 bytes side by side each time.
#pragma once

#include "cuda/simt.h"
#include "moert/bit_nested.h"
#include "moert/fp8.h"
#include "moert/fused_experts_quantized.h"
#include "moert/sub1.h"

namespace moert::cuda {

// How rows lie that tensor cores take: every 32 columns as lanes of four times eight elements, whose columns the packed
// codes have at hand.
enum class ColumnLie : int32_t {
  order,  // eight neighbours
  fours,  // of them 0 4 1 5 2 6 3 7
  twos,   // of them 0 2 4 6 1 3 5 7
  bits,   // of 32 columns lane t has t, t + 16, t + 4, t + 20, ...
  trits   // of 160 columns the first 32 elements are the first trit of every byte of ternary5, and so on
};

// Where the columns of a row lie whose packed weights have `width` columns a lane; 0: in order.  Tensor cores take rows
// of whole `step`s, each as `lie` says.
struct ColumnOrder {
  int32_t width, step = 0;
  ColumnLie lie = ColumnLie::order;

  MOERT_HOST_DEVICE int64_t length(int64_t columns) const {
    const int64_t whole = width ? width * 32 : step ? step : 1;
    return (columns + whole - 1) / whole * whole;
  }
  // Columns of which the first `columns` are numbers and the others zeros, as far as they are read.
  MOERT_HOST_DEVICE int64_t written(int64_t columns) const {
    return width ? (columns + width - 1) / width * width : length(columns);
  }
  MOERT_HOST_DEVICE int64_t position(int64_t column) const {
    const int64_t c = column;
    switch (lie) {
      case ColumnLie::fours:
        return c / 8 * 8 + c % 4 * 2 + c / 4 % 2;
      case ColumnLie::twos:
        return c / 8 * 8 + c % 2 * 4 + c / 2 % 4;
      case ColumnLie::bits:
        return c / 32 * 32 + c % 4 * 8 + c / 4 % 4 * 2 + c / 16 % 2;
      case ColumnLie::trits:
        return c / 160 * 160 + c % 5 * 32 + c % 80 / 20 * 8 + c / 80 % 2 * 4 + c % 20 / 5;
      default:
        break;
    }
    if (!width) return column;
    const int64_t lane = column / width % 32, within = column % width;
    return column / (32 * width) * 32 * width + (within / 4 * 32 + lane) * 4 + within % 4;
  }
  MOERT_HOST_DEVICE int64_t column(int64_t position) const {
    const int64_t p = position;
    switch (lie) {
      case ColumnLie::fours:
        return p / 8 * 8 + p % 2 * 4 + p / 2 % 4;
      case ColumnLie::twos:
        return p / 8 * 8 + p % 4 * 2 + p / 4 % 2;
      case ColumnLie::bits:
        return p / 32 * 32 + p / 8 % 4 + p / 2 % 4 * 4 + p % 2 * 16;
      case ColumnLie::trits:
        return p / 160 * 160 + p / 4 % 2 * 80 + p / 8 % 4 * 20 + p % 4 * 5 + p % 160 / 32;
      default:
        break;
    }
    if (!width) return position;
    const int64_t step = position / (32 * width), within = position % (32 * width), lane = within / 4 % 32;
    return (step * 32 + lane) * width + within / 128 * 4 + within % 4;
  }
};

// The matrices of all experts, and what follows from their shape.
struct PackedWeights {
  PackedMatrix matrix;
  int64_t row_bytes;
  int32_t groups;       // of a row
  int32_t chunks;       // of a row, as many as have columns
  int32_t group_shift;  // groups have 2^group_shift columns
  bool aligned;         // every row begins at a multiple of 16 bytes
  const Sub1Entry* dictionary;
};

// What follows from a matrix of that name; the dictionary is left out.
PackedWeights weights_of(const char* name, const PackedMatrix& matrix);

// Columns of a lane and step.
int width_of(Format format);

// The dictionary of sub1 in the memory of the current device, brought there once.
const Sub1Entry* sub1_on_device();

// Element i of an array of `dtype`.
template <typename A>
MOERT_DEVICE_INLINE A read_element(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return A(static_cast<const float*>(p)[i]);
    case DType::bf16:
      return A(to_float(static_cast<const bf16*>(p)[i]));
    case DType::f16:
      return A(to_float(static_cast<const f16*>(p)[i]));
    default:
      return A(static_cast<const double*>(p)[i]);
  }
}

template <typename A>
MOERT_DEVICE_INLINE void write_element(void* p, DType dtype, int64_t i, A x) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(p)[i] = float(x);
      break;
    case DType::bf16:
      static_cast<bf16*>(p)[i] = to_bf16(float(x));
      break;
    case DType::f16:
      static_cast<f16*>(p)[i] = to_f16(float(x));
      break;
    default:
      static_cast<double*>(p)[i] = double(x);
  }
}

// code, below 2^23, as a float beside 2^23; every difference of the two is exact.
constexpr float kBeside = 0x1p23f;
MOERT_DEVICE_INLINE float beside(uint32_t code) { return bits_to_float(0x4b000000u | code); }

MOERT_DEVICE_INLINE Chunk stream_codes(const uint8_t* p, bool aligned) {
  if (aligned) return stream_chunk(p);
  Chunk c;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    c.words[i] = p[4 * i] | uint32_t(p[4 * i + 1]) << 8 | uint32_t(p[4 * i + 2]) << 16 | uint32_t(p[4 * i + 3]) << 24;
  return c;
}

MOERT_DEVICE_INLINE uint8_t byte_of(const Chunk& c, int i) { return uint8_t(c.words[i / 4] >> 8 * (i % 4)); }

// What some neighbouring columns share: w = scale * value(column), in which `zero` counts.
struct Scale {
  float scale, zero;
};

// A row of an expert: its bytes, and the index of its first scale among the expert's.
struct CodeRow {
  const uint8_t* codes;
  int32_t scale;
};

// A lane's codes of the formats of 16-byte blocks.
template <Format kFormat, typename Byte>
struct BlockCodes {
  static constexpr int kRows = kFormat == Format::ternary5 ? 2 : 4;  // weight rows that a warp multiplies at a time
  static constexpr int kColumns = 16 * Byte::kCodes;                 // of a lane and step
  static constexpr int kShared = kColumns % 32 == 0 ? 32 : 16;       // columns that share a scale whatever the group is
  static constexpr int kUnrolled = kShared / 4;                      // value(j) wants to know j
  static constexpr int kAhead = 2;                                   // steps that one row of x is read ahead of
  Chunk chunk;

  // The weights of expert e.
  MOERT_DEVICE_INLINE static PackedWeights expert(PackedWeights w, int64_t e) {
    const int64_t rows = w.matrix.packing.rows, bands = kFormat == Format::fp8 ? fp8_blocks(rows) : rows;
    w.matrix.codes += e * rows * w.row_bytes;
    w.matrix.scales = static_cast<const char*>(w.matrix.scales) + e * bands * w.groups * kScaleBytes;
    if (kFormat == Format::int4_asymmetric) w.matrix.zeros += e * rows * w.groups;
    return w;
  }
  MOERT_DEVICE_INLINE static CodeRow row(const PackedWeights& w, int64_t n) {
    return {w.matrix.codes + n * w.row_bytes, int32_t(kFormat == Format::fp8 ? n / kFp8Block : n) * w.groups};
  }
  MOERT_DEVICE_INLINE void load(const PackedWeights& w, const CodeRow& row, int i) {
    chunk = stream_codes(row.codes + int64_t(i) * 16, w.aligned);
  }
  // Of the columns from `first` on in chunk i; past the last column that of the last group, times zeros of x.
  MOERT_DEVICE_INLINE Scale scale(const PackedWeights& w, const CodeRow& row, int i, int first) const {
    const int g = (i * kColumns + first) >> w.group_shift, at = row.scale + (g < w.groups ? g : w.groups - 1);
    if constexpr (kFormat == Format::mxfp4)
      return {e8m0_to_float(static_cast<const uint8_t*>(w.matrix.scales)[at]), 0};
    else if constexpr (kFormat == Format::fp8)
      return {static_cast<const float*>(w.matrix.scales)[at], 0};
    else if constexpr (kFormat == Format::int4_asymmetric)
      return {to_float(static_cast<const f16*>(w.matrix.scales)[at]), kBeside + float(w.matrix.zeros[at])};
    else
      return {to_float(static_cast<const f16*>(w.matrix.scales)[at]), kBeside + kZero};
  }
  MOERT_DEVICE_INLINE float value(int j, const Scale& s) const {
    const uint32_t code = Byte::code(byte_of(chunk, j / Byte::kCodes), j % Byte::kCodes);
    if constexpr (kFormat == Format::mxfp4)
      return e2m1_to_float_with_subnormals(code);
    else if constexpr (kFormat == Format::fp8)
      return e4m3_to_float_with_subnormals(code);
    else
      return beside(kFormat == Format::int8 ? code ^ 128u : code) - s.zero;
  }

 private:
  static constexpr int kScaleBytes = kFormat == Format::fp8 ? 4 : int(scale_bytes(kFormat));
  static constexpr float kZero = kFormat == Format::int8 ? 128 : kFormat == Format::int4 ? 8 : 1;
};

// A lane's bits of 32 columns in each plane.
struct BitNestedCodes {
  static constexpr int kRows = 2, kColumns = 32, kShared = 32, kUnrolled = 1, kAhead = 1, kMostPlanes = 8;
  uint32_t planes[kMostPlanes];  // of what is not there, zeros

  MOERT_DEVICE_INLINE static PackedWeights expert(PackedWeights w, int64_t e) {
    w.matrix.codes += e * w.matrix.codes_stride;
    w.matrix.scales = static_cast<const f16*>(w.matrix.scales) + e * w.matrix.packing.rows * w.groups;
    return w;
  }
  MOERT_DEVICE_INLINE static CodeRow row(const PackedWeights& w, int64_t n) {
    return {w.matrix.codes + n * w.row_bytes, int32_t(n) * w.groups};
  }
  MOERT_DEVICE_INLINE void load(const PackedWeights& w, const CodeRow& row, int i) {
    const Packing& p = w.matrix.packing;
#pragma unroll
    for (int n = 0; n < kMostPlanes; ++n) {
      planes[n] = 0;
      if (n >= int(p.planes)) continue;
      const uint8_t* b = row.codes + n * p.rows * w.row_bytes + int64_t(i) * 4;
      planes[n] = w.aligned ? *reinterpret_cast<const uint32_t*>(b)
                            : b[0] | uint32_t(b[1]) << 8 | uint32_t(b[2]) << 16 | uint32_t(b[3]) << 24;
    }
  }
  // With the first plane as bit 8, the next as bit 7, and so on, code - zero is 32 bit_nested_value.
  MOERT_DEVICE_INLINE Scale scale(const PackedWeights& w, const CodeRow& row, int i, int) const {
    const f16 scale = static_cast<const f16*>(w.matrix.scales)[row.scale + (i * kColumns >> w.group_shift)];
    return {to_float(scale) / 32, kBeside - 32 * bit_nested_value(0, w.matrix.packing.planes)};
  }
  MOERT_DEVICE_INLINE float value(int j, const Scale& s) const {
    uint32_t code = 0;
#pragma unroll
    for (int n = 0; n < kMostPlanes; ++n) code |= (planes[n] >> j & 1u) << (kMostPlanes - n);
    return beside(code) - s.zero;
  }
};

using Int8Codes = BlockCodes<Format::int8, OneAByte>;
using Int4Codes = BlockCodes<Format::int4, TwoAByte>;
using Int4AsymmetricCodes = BlockCodes<Format::int4_asymmetric, TwoAByte>;
using Mxfp4Codes = BlockCodes<Format::mxfp4, TwoAByte>;
using Ternary2Codes = BlockCodes<Format::ternary2, FourTritsAByte>;
using Ternary5Codes = BlockCodes<Format::ternary5, FiveTritsAByte>;
using Fp8Codes = BlockCodes<Format::fp8, OneAByte>;

// Codewords, which a warp reads 32 at a time.
struct Sub1Codes {
  static constexpr int kRows = 2, kColumns = 0;
};

// The codewords of the experts before e, which all lanes sum up together.
MOERT_DEVICE_INLINE int64_t codewords_before(const PackedWeights& w, int64_t e) {
  const int64_t rows = w.matrix.packing.rows;
  const int32_t* ends = reinterpret_cast<const int32_t*>(w.matrix.zeros);
  int64_t sum = 0;
  for (int64_t other = lane_id(); other < e; other += kWarp) sum += ends[other * (rows + 1) + rows];
  return warp_sum(sum);
}

// use(column, weight) for every column of one row, which the lanes share; returns how many columns the codewords have.
template <typename Use>
MOERT_DEVICE_INLINE int64_t for_digits(const PackedWeights& w, int64_t e, int64_t row, const Use& use) {
  const int64_t rows = w.matrix.packing.rows, K = w.matrix.packing.columns, size = w.matrix.size;
  const int32_t* ends = reinterpret_cast<const int32_t*>(w.matrix.zeros);
  const int64_t start = codewords_before(w, e), from = start + ends[e * (rows + 1) + row],
                to = start + ends[e * (rows + 1) + row + 1];
  const int64_t begin = from < 0 ? 0 : from, end = to < size ? to : size;
  const bf16* limits = static_cast<const bf16*>(w.matrix.scales) + 2 * (e * rows + row);
  const float low = to_float(limits[0]), high = to_float(limits[1]);
  const uint16_t* codes = reinterpret_cast<const uint16_t*>(w.matrix.codes);
  int64_t column = 0;
  for (int64_t first = begin; first < end && column < K; first += kWarp) {
    uint32_t entry[2] = {};
    if (first + lane_id() < end) {
      const uint32_t* found = w.dictionary[codes[first + lane_id()]].data();
      entry[0] = found[0], entry[1] = found[1];
    }
    const int32_t digits = 2 * sub1_length(entry), before = warp_exclusive(digits);
#pragma unroll
    for (int t = 0; t < 2 * kSub1Longest; ++t) {
      const int64_t c = column + before + t;
      if (t >= digits || c >= K) continue;
      const uint8_t digit = sub1_digit(entry, t);
      use(c, digit == 1 ? low : digit == 2 ? high : 0.0f);
    }
    column += __shfl_sync(kAllLanes, before + digits, kWarp - 1);
  }
  return column;
}

// f(Codes{}) for the codes of the format.
template <typename F>
auto with_codes(Format format, const F& f) {
  switch (format) {
    case Format::int8:
      return f(Int8Codes{});
    case Format::int4:
      return f(Int4Codes{});
    case Format::int4_asymmetric:
      return f(Int4AsymmetricCodes{});
    case Format::mxfp4:
      return f(Mxfp4Codes{});
    case Format::ternary2:
      return f(Ternary2Codes{});
    case Format::ternary5:
      return f(Ternary5Codes{});
    case Format::fp8:
      return f(Fp8Codes{});
    case Format::bit_nested:
      return f(BitNestedCodes{});
    default:
      return f(Sub1Codes{});
  }
}

}  // namespace moert::cuda
