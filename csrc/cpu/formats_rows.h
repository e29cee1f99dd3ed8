// Rows of packed weights, for the instruction set that the including file is compiled for.
#pragma once

#include <cstring>

#include "cpu/formats_isa.h"
#include "cpu/formats_rounding.h"

namespace moert::cpu {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename Byte>
int64_t pack_row_of(const uint8_t* codes, int64_t columns, int64_t bytes, uint8_t* __restrict packed) {
  if constexpr (Byte::kLimit < 256) {
    uint32_t above = 0;
    for (int64_t i = 0; i < columns; ++i) above |= uint32_t(codes[i] >= Byte::kLimit);
    for (int64_t i = 0; above && i < columns; ++i) {
      if (codes[i] >= Byte::kLimit) return i;
    }
  }
  constexpr int64_t n = Byte::kCodes;
  const int64_t whole = columns / n;
  for (int64_t i = 0; i < whole; ++i) packed[i] = Byte::encode(codes + i * n);
  if (whole == bytes) return -1;
  std::memset(packed + whole, 0, size_t(bytes - whole));
  uint8_t last[n] = {};
  std::memcpy(last, codes + whole * n, size_t(columns - whole * n));
  packed[whole] = Byte::encode(last);
  return -1;
}

// Every code of the row is decoded; what encodes to other bits than it came from is no code of this format.
template <typename Byte>
int64_t unpack_row_of(const uint8_t* packed, int64_t columns, int64_t bytes, uint8_t* __restrict codes) {
  constexpr int64_t n = Byte::kCodes;
  const int64_t whole = columns / n;
  for (int64_t i = 0; i < whole; ++i) {
    for (int j = 0; j < n; ++j) codes[i * n + j] = Byte::code(packed[i], j);
  }
  if constexpr (Byte::kLimit == 3) {
    uint32_t wrong = 0;
    for (int64_t i = 0; i < whole * n; ++i) wrong |= uint32_t(codes[i] >= Byte::kLimit);
    for (int64_t i = 0; i < whole; ++i) wrong |= uint32_t(Byte::encode(codes + i * n) ^ packed[i]);
    for (int64_t i = 0; wrong && i < whole; ++i) {
      bool valid = Byte::encode(codes + i * n) == packed[i];
      for (int j = 0; j < n; ++j) valid &= codes[i * n + j] < Byte::kLimit;
      if (!valid) return i;
    }
  }
  for (int64_t i = whole; i < bytes; ++i) {
    uint8_t last[n];
    bool valid = true;
    for (int j = 0; j < n; ++j) {
      last[j] = Byte::code(packed[i], j);
      valid &= last[j] < Byte::kLimit && (i * n + j < columns || last[j] == 0);
    }
    if (!valid || Byte::encode(last) != packed[i]) return i;
    for (int j = 0; j < n && i * n + j < columns; ++j) codes[i * n + j] = last[j];
  }
  return -1;
}

// f(the unit of the format's rows), such as OneAByte{}.
template <typename F>
int64_t with_byte(Format format, const F& f) {
  switch (format) {
    case Format::int8:
      return f(OneAByte{});
    case Format::ternary2:
      return f(FourTritsAByte{});
    case Format::ternary5:
      return f(FiveTritsAByte{});
    default:
      return f(TwoAByte{});
  }
}

int64_t pack_row(const Packing& p, const uint8_t* codes, uint8_t* packed) {
  return with_byte(p.format,
                   [&](auto byte) { return pack_row_of<decltype(byte)>(codes, p.columns, row_bytes(p), packed); });
}

int64_t unpack_row(const Packing& p, const uint8_t* packed, uint8_t* codes) {
  return with_byte(p.format,
                   [&](auto byte) { return unpack_row_of<decltype(byte)>(packed, p.columns, row_bytes(p), codes); });
}

void quantize_row(const Packing& p, const float* w, uint8_t* scratch, uint32_t* numbers, uint8_t* packed, void* scales,
                  uint8_t* zeros) {
  const int64_t width = p.group == 0 ? p.columns : p.group, num_groups = groups(p);
  uint8_t* others = scratch + p.columns;
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t n = smaller(width, p.columns - g * width);
    const float* group = w + g * width;
    uint8_t* out = scratch + g * width;
    if (p.format == Format::mxfp4) {
      static_cast<uint8_t*>(scales)[g] = round_mxfp4(group, n, out, others);
      continue;
    }
    const Rounded rounded = p.format == Format::int8              ? round_int8(group, n, out)
                            : p.format == Format::int4            ? round_int4(group, n, out, others)
                            : p.format == Format::int4_asymmetric ? round_int4_asymmetric(group, n, out)
                                                                  : round_ternary(group, n, out, numbers);
    static_cast<uint16_t*>(scales)[g] = rounded.scale.bits;
    if (zeros) zeros[g] = rounded.zero;
  }
  pack_row(p, scratch, packed);
}

void dequantize_row(const Packing& p, const uint8_t* codes, const void* scales, const uint8_t* zeros,
                    float* __restrict w) {
  const int64_t width = p.group == 0 ? p.columns : p.group;
  for (int64_t first = 0, g = 0; first < p.columns; first += width, ++g) {
    const int64_t last = smaller(first + width, p.columns);
    if (p.format == Format::mxfp4) {
      const float scale = e8m0_to_float(static_cast<const uint8_t*>(scales)[g]);
      for (int64_t i = first; i < last; ++i) w[i] = scale * e2m1_value(codes[i]);
      continue;
    }
    const float scale = to_float(f16{static_cast<const uint16_t*>(scales)[g]});
    if (p.format == Format::int8) {
      for (int64_t i = first; i < last; ++i) w[i] = scale * float(int8_t(codes[i]));
      continue;
    }
    const int zero = p.format == Format::int4 ? 8 : zeros ? zeros[g] : 1;
    for (int64_t i = first; i < last; ++i) w[i] = scale * float(int(codes[i]) - zero);
  }
}

// The scales that are tried, those of either sign at which no weight is outside of the cells, times 17, 16, 15 and 14
// sixteenths: at 17 an extreme on the wider side is the middle of the last of 16 cells, below 16 some are cut off.
constexpr int kTried = 8;

struct Tried {
  f16 half[kTried];
  float scale[kTried];
};

inline float larger(float a, float b) { return a < b ? b : a; }

Tried scales_to_try(const float* w, int64_t n) {
  const Range range = range_with_zero(w, n);
  const float up = larger(range.high / 7.5f, -range.low / 8.5f), down = larger(-range.low / 7.5f, range.high / 8.5f);
  Tried tried;
  for (int i = 0; i < kTried; ++i) {
    const float share = float(17 - i % 4) / 16;
    tried.half[i] = to_f16(i < 4 ? up * share : -(down * share));
    tried.scale[i] = to_float(tried.half[i]);
  }
  return tried;
}

// The cell that holds w, of the last ones those beyond them too.
inline int32_t cell(float w, float scale, float cells, float top) {
  const float units = scale == 0.f ? 0.f : w / scale;
  return int32_t(clamp((units + 8.5f) * cells, 0.f, top));
}

// One group, n weights: its codes, and the scale of least squared error, the first of several; infinite where none of
// them is a float16.
f16 quantize_group(int64_t planes, const float* w, int64_t n, uint8_t* __restrict codes) {
  const float cells = float(1 << planes) / 16, top = float((1 << planes) - 1), width = 1 / cells;
  const Tried tried = scales_to_try(w, n);
  double errors[kTried];
  squared_errors<kTried>(
      n,
      [&](int way, int64_t i) {
        const float middle = (float(cell(w[i], tried.scale[way], cells, top)) + 0.5f) * width - 8.5f;
        return double(w[i]) - double(tried.scale[way] * middle);
      },
      errors);
  int best = -1;
  for (int j = 0; j < kTried; ++j)
    if (errors[j] < (best < 0 ? __builtin_huge_val() : errors[best]))
      best = j;  // of an infinite scale it is NaN or infinite
  if (best < 0) return {0x7c00u};
  for (int64_t i = 0; i < n; ++i) codes[i] = uint8_t(cell(w[i], tried.scale[best], cells, top));
  return tried.half[best];
}

// Bit `bit` of n codes, eight a byte: of eight bytes the product moves the lowest bit of byte j to bit 56 + j.
void pack_plane(const uint8_t* codes, int64_t n, int64_t bit, uint8_t* __restrict plane) {
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t eight = 0;  // the first code in the low bits, as on every machine that moert runs on
    std::memcpy(&eight, codes + i, size_t(smaller(8, n - i)));
    plane[i / 8] = uint8_t((eight >> bit & 0x0101010101010101u) * 0x0102040810204080u >> 56);
  }
}

bool quantize_planes(const BitNestedPacking& p, const float* w, uint8_t* scratch, PlanesOfRow planes, f16* scales) {
  bool good = true;
  const int64_t num_groups = groups(p);
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t first = g * p.group;
    scales[g] = quantize_group(p.planes, w + first, smaller(p.group, p.columns - first), scratch + first);
    good &= scales[g].bits != 0x7c00u;
  }
  for (int64_t i = 0; i < p.planes; ++i) {
    pack_plane(scratch, p.columns, p.planes - 1 - i, planes.first + i * planes.stride);
  }
  return good;
}

void dequantize_planes(const BitNestedPacking& p, PlanesOfRow planes, const f16* scales, uint8_t* __restrict scratch,
                       float* __restrict w) {
  std::memset(scratch, 0, size_t(p.columns));
  for (int64_t n = 0; n < p.planes; ++n) {
    const uint8_t* plane = planes.first + n * planes.stride;
    const int64_t whole = p.columns / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8) {
      for (int j = 0; j < 8; ++j) scratch[i + j] = uint8_t(2 * scratch[i + j] + (plane[i / 8] >> j & 1));
    }
    for (int64_t i = whole; i < p.columns; ++i) scratch[i] = uint8_t(2 * scratch[i] + (plane[i / 8] >> i % 8 & 1));
  }
  for (int64_t first = 0, g = 0; first < p.columns; first += p.group, ++g) {
    const float scale = to_float(scales[g]);
    const int64_t last = smaller(first + p.group, p.columns);
    for (int64_t i = first; i < last; ++i) w[i] = scale * bit_nested_value(scratch[i], p.planes);
  }
}

}  // namespace
}  // namespace moert::cpu
