#include "moert/formats.h"

#include <cstring>
#include <vector>

#include "cpu/formats_rounding.h"
#include "cpu/parallel.h"
#include "moert/check.h"

namespace moert::cpu {

namespace {

// Index of the first bad code of the row, or -1.
template <typename Byte>
int64_t pack_row(const uint8_t* codes, int64_t columns, int64_t bytes, uint8_t* packed) {
  for (int64_t i = 0; i < columns; ++i) {
    if (codes[i] >= Byte::kLimit) return i;
  }
  constexpr int64_t n = Byte::kCodes;
  const int64_t whole = columns / n;
  for (int64_t i = 0; i < whole; ++i) packed[i] = Byte::encode(codes + i * n);
  if (whole == bytes) return -1;
  std::memset(packed + whole, 0, size_t(bytes - whole));
  uint8_t last[n] = {};
  std::copy(codes + whole * n, codes + columns, last);
  packed[whole] = Byte::encode(last);
  return -1;
}

// Index of the first bad byte of the row, or -1.  Every code of the row is decoded; what encodes to other bits than it
// came from is no code of this format.
template <typename Byte>
int64_t unpack_row(const uint8_t* packed, int64_t columns, int64_t bytes, uint8_t* codes) {
  constexpr int64_t n = Byte::kCodes;
  for (int64_t i = 0; i < bytes; ++i) {
    uint8_t decoded[n];
    bool valid = true;
    for (int64_t j = 0; j < n; ++j) {
      decoded[j] = Byte::code(packed[i], int(j));
      valid &= decoded[j] < Byte::kLimit && (i * n + j < columns || decoded[j] == 0);
    }
    if (!valid || Byte::encode(decoded) != packed[i]) return i;
    for (int64_t j = 0; j < n && i * n + j < columns; ++j) codes[i * n + j] = decoded[j];
  }
  return -1;
}

template <typename F>
auto with_byte(Format format, const F& f) {
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

// f(row) on every row; throws for the first row where it is not -1, with the byte or column that it is.
template <typename F>
void each_row(const Packing& p, int threads, const char* what, const uint8_t* bytes, int64_t width, const F& f) {
  std::vector<int64_t> bad(size_t(p.rows), -1);
  parallel_for(p.rows, threads, [&](int64_t row) { bad[size_t(row)] = f(row); });
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t at = bad[size_t(row)];
    MOERT_CHECK(at < 0, what, " must be ", name(p.format), " codes and 0 after column ", p.columns, ", got ",
                int(bytes[row * width + at]), " at row ", row, ", byte ", at);
  }
}

void check_scales(const Packing& p, const void* scales, const uint8_t* zeros) {
  const int64_t per_row = groups(p);
  for (int64_t i = 0; i < p.rows * per_row; ++i) {
    const bool finite = p.format == Format::mxfp4 ? static_cast<const uint8_t*>(scales)[i] != 255
                                                  : (static_cast<const uint16_t*>(scales)[i] & 0x7c00u) != 0x7c00u;
    MOERT_CHECK(finite, "scales must be finite, got inf or nan at row ", i / per_row, ", group ", i % per_row);
    MOERT_CHECK(!zeros || zeros[i] <= 15, "zeros must be at most 15, got ", int(zeros[i]), " at row ", i / per_row,
                ", group ", i % per_row);
  }
}

void quantize_row(const Packing& p, const float* w, uint8_t* codes, void* scales, uint8_t* zeros) {
  const int64_t width = p.group == 0 ? std::max<int64_t>(p.columns, 1) : p.group;
  std::vector<uint8_t> others(size_t(std::min(width, p.columns)));
  std::vector<float> magnitudes;
  for (int64_t g = 0; g < groups(p); ++g) {
    const int64_t n = std::min(width, p.columns - g * width);
    const float* group = w + g * width;
    uint8_t* out = codes + g * width;
    if (p.format == Format::mxfp4) {
      static_cast<uint8_t*>(scales)[g] = round_mxfp4(group, n, out, others.data());
      continue;
    }
    const Rounded rounded = p.format == Format::int8              ? round_int8(group, n, out)
                            : p.format == Format::int4            ? round_int4(group, n, out, others.data())
                            : p.format == Format::int4_asymmetric ? round_int4_asymmetric(group, n, out)
                                                                  : round_ternary(group, n, out, magnitudes);
    static_cast<uint16_t*>(scales)[g] = rounded.scale.bits;
    if (zeros) zeros[g] = rounded.zero;
  }
}

void dequantize_row(const Packing& p, const uint8_t* codes, const void* scales, const uint8_t* zeros, float* w) {
  const int64_t width = p.group == 0 ? p.columns : p.group;
  for (int64_t i = 0; i < p.columns; ++i) {
    const int64_t g = i / width;
    if (p.format == Format::mxfp4) {
      w[i] = e8m0_to_float(static_cast<const uint8_t*>(scales)[g]) * e2m1_to_float(codes[i]);
      continue;
    }
    const float scale = to_float(f16{static_cast<const uint16_t*>(scales)[g]});
    const int zero = p.format == Format::int4 ? 8 : zeros ? zeros[g] : p.format == Format::int8 ? 0 : 1;
    const int code = p.format == Format::int8 ? int8_t(codes[i]) : codes[i];
    w[i] = scale * float(code - zero);
  }
}

}  // namespace

const char* name(Format format) {
  constexpr const char* kNames[kFormats] = {"int8",     "int4", "int4_asymmetric", "mxfp4", "ternary2",
                                            "ternary5", "fp8",  "bit_nested",      "sub1"};
  return kNames[int(format)];
}

void check_packing(const Packing& p) {
  MOERT_CHECK(int(p.format) < kRowFormats, "format must have scales of groups within a row, got ", name(p.format));
  const bool grouped = p.group == 32 || p.group == 64 || p.group == 128;
  if (p.format == Format::mxfp4) {
    MOERT_CHECK(p.group == 32, "group must be 32 for mxfp4, got ", p.group);
  } else if (p.format == Format::int4 || p.format == Format::int4_asymmetric) {
    MOERT_CHECK(grouped, "group must be 32, 64 or 128 for ", name(p.format), ", got ", p.group);
  } else {
    MOERT_CHECK(grouped || p.group == 0, "group must be 32, 64, 128 or 0 (the row) for ", name(p.format), ", got ",
                p.group);
  }
}

void pack_codes(const Packing& p, const uint8_t* codes, int threads, uint8_t* packed) {
  const int64_t bytes = row_bytes(p);
  each_row(p, threads, "codes", codes, p.columns, [&](int64_t row) {
    return with_byte(p.format, [&](auto byte) {
      return pack_row<decltype(byte)>(codes + row * p.columns, p.columns, bytes, packed + row * bytes);
    });
  });
}

void unpack_codes(const Packing& p, const uint8_t* packed, int threads, uint8_t* codes) {
  const int64_t bytes = row_bytes(p);
  each_row(p, threads, "packed", packed, bytes, [&](int64_t row) {
    return with_byte(p.format, [&](auto byte) {
      return unpack_row<decltype(byte)>(packed + row * bytes, p.columns, bytes, codes + row * p.columns);
    });
  });
}

void quantize(const Packing& p, const float* w, int threads, uint8_t* packed, void* scales, uint8_t* zeros) {
  check_packing(p);
  const int64_t bytes = row_bytes(p), per_row = groups(p);
  parallel_for(p.rows, threads, [&](int64_t row) {
    std::vector<uint8_t> codes(size_t(p.columns));
    quantize_row(p, w + row * p.columns, codes.data(),
                 static_cast<uint8_t*>(scales) + row * per_row * scale_bytes(p.format),
                 zeros ? zeros + row * per_row : nullptr);
    with_byte(p.format, [&](auto byte) {
      return pack_row<decltype(byte)>(codes.data(), p.columns, bytes, packed + row * bytes);
    });
  });
  for (int64_t row = 0; row < p.rows; ++row) {
    const float largest = largest_magnitude(w + row * p.columns, p.columns);
    MOERT_CHECK(largest < kInfinity, "w must be finite, got inf or nan in row ", row);
    for (int64_t g = 0; g < per_row && p.format != Format::mxfp4; ++g) {
      MOERT_CHECK(static_cast<uint16_t*>(scales)[row * per_row + g] != 0x7c00u,
                  "w must have scales within float16, got magnitudes up to ", largest, " in row ", row);
    }
  }
}

void dequantize(const Packing& p, const uint8_t* packed, const void* scales, const uint8_t* zeros, int threads,
                float* w) {
  check_packing(p);
  check_scales(p, scales, zeros);
  const int64_t bytes = row_bytes(p), per_row = groups(p);
  each_row(p, threads, "packed", packed, bytes, [&](int64_t row) {
    std::vector<uint8_t> codes(size_t(p.columns));
    const int64_t bad = with_byte(p.format, [&](auto byte) {
      return unpack_row<decltype(byte)>(packed + row * bytes, p.columns, bytes, codes.data());
    });
    if (bad < 0) {
      dequantize_row(p, codes.data(), static_cast<const uint8_t*>(scales) + row * per_row * scale_bytes(p.format),
                     zeros ? zeros + row * per_row : nullptr, w + row * p.columns);
    }
    return bad;
  });
}

}  // namespace moert::cpu
