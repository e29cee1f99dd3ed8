#include "moert/formats.h"

#include <vector>

#include "cpu/formats_isa.h"
#include "cpu/formats_rounding.h"
#include "cpu/parallel.h"
#include "moert/check.h"
#include "moert/isa.h"

namespace moert::cpu {

namespace {

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

}  // namespace

const FormatKernels& format_kernels() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return avx512::format_kernels;
  if (isa() >= Isa::avx2) return avx2::format_kernels;
#endif
  return generic::format_kernels;
}

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
  const FormatKernels& kernels = format_kernels();
  const int64_t bytes = row_bytes(p);
  each_row(p, threads, "codes", codes, p.columns,
           [&](int64_t row) { return kernels.pack_row(p, codes + row * p.columns, packed + row * bytes); });
}

void unpack_codes(const Packing& p, const uint8_t* packed, int threads, uint8_t* codes) {
  const FormatKernels& kernels = format_kernels();
  const int64_t bytes = row_bytes(p);
  each_row(p, threads, "packed", packed, bytes,
           [&](int64_t row) { return kernels.unpack_row(p, packed + row * bytes, codes + row * p.columns); });
}

void quantize(const Packing& p, const float* w, int threads, uint8_t* packed, void* scales, uint8_t* zeros) {
  check_packing(p);
  const int64_t bytes = row_bytes(p), per_row = groups(p);
  const FormatKernels& kernels = format_kernels();
  const bool ternary = p.format == Format::ternary2 || p.format == Format::ternary5;
  parallel_for(p.rows, threads, [&](int64_t row) {
    std::vector<uint8_t> scratch(size_t(2 * p.columns));
    std::vector<uint32_t> numbers(size_t(ternary ? 2 * p.columns : 0));
    kernels.quantize_row(p, w + row * p.columns, scratch.data(), numbers.data(), packed + row * bytes,
                         static_cast<uint8_t*>(scales) + row * per_row * scale_bytes(p.format),
                         zeros ? zeros + row * per_row : nullptr);
  });
  for (int64_t i = 0; i < p.rows * per_row; ++i) {
    const bool good = p.format == Format::mxfp4 ? static_cast<uint8_t*>(scales)[i] != 255
                                                : static_cast<uint16_t*>(scales)[i] != 0x7c00u;
    if (good) continue;
    const int64_t row = i / per_row;
    const float largest = largest_magnitude(w + row * p.columns, p.columns);
    MOERT_CHECK(largest < kInfinity, "w must be finite, got inf or nan in row ", row);
    MOERT_CHECK(good, "w must have scales within float16, got magnitudes up to ", largest, " in row ", row);
  }
}

void dequantize(const Packing& p, const uint8_t* packed, const void* scales, const uint8_t* zeros, int threads,
                float* w) {
  check_packing(p);
  check_scales(p, scales, zeros);
  const FormatKernels& kernels = format_kernels();
  const int64_t bytes = row_bytes(p), per_row = groups(p);
  each_row(p, threads, "packed", packed, bytes, [&](int64_t row) {
    std::vector<uint8_t> codes(size_t(p.columns));
    const int64_t bad = kernels.unpack_row(p, packed + row * bytes, codes.data());
    if (bad < 0) {
      const void* own = static_cast<const uint8_t*>(scales) + row * per_row * scale_bytes(p.format);
      kernels.dequantize_row(p, codes.data(), own, zeros ? zeros + row * per_row : nullptr, w + row * p.columns);
    }
    return bad;
  });
}

}  // namespace moert::cpu
