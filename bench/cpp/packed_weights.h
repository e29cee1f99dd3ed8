// Packed experts of any size for the benches: a few random rows, over and over, in pages of 2 MiB.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>

#include "layers.h"
#include "moert/bit_nested.h"
#include "moert/fp8.h"
#include "moert/fused_experts_quantized.h"
#include "moert/sub1.h"

namespace moert::bench {

struct NamedFormat {
  const char* name;
  Format format;
  int64_t group, planes = 0;
};

inline constexpr NamedFormat kNamedFormats[] = {{"int8", Format::int8, 0},
                                                {"int8-g32", Format::int8, 32},
                                                {"int4-g32", Format::int4, 32},
                                                {"int4-g128", Format::int4, 128},
                                                {"int4_asymmetric-g32", Format::int4_asymmetric, 32},
                                                {"mxfp4", Format::mxfp4, 32},
                                                {"ternary2", Format::ternary2, 0},
                                                {"ternary5", Format::ternary5, 0},
                                                {"fp8", Format::fp8, kFp8Block},
                                                {"bit_nested-2", Format::bit_nested, 32, 2},
                                                {"bit_nested-4", Format::bit_nested, 32, 4},
                                                {"bit_nested-8", Format::bit_nested, 128, 8},
                                                {"sub1", Format::sub1, 0}};

// Bytes in pages of 2 MiB, as moert.runtime.huge_pages_ gives them to a model; a pattern over and over.
class Pages {
 public:
  template <typename T>
  void repeat(const std::vector<T>& pattern, int64_t times) {
    const size_t bytes = pattern.size() * sizeof(T);
    size_ = bytes * size_t(times);
    data_.reset(std::aligned_alloc(size_t(2) << 20, ((size_ >> 21) + 1) << 21));
#if defined(MADV_HUGEPAGE)
    madvise(data_.get(), size_, MADV_HUGEPAGE);
#endif
    for (int64_t i = 0; i < times; ++i) std::memcpy(data() + size_t(i) * bytes, pattern.data(), bytes);
  }
  uint8_t* data() const { return static_cast<uint8_t*>(data_.get()); }
  int64_t size() const { return int64_t(size_); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

// The matrices of E experts: a few random rows, over and over.
struct PackedWeights {
  Packing packing;
  Pages codes, scales, zeros;
  std::vector<int64_t> starts;  // of sub1
  int64_t E;

  PackedWeights(const NamedFormat& f, int64_t E, int64_t rows, int64_t columns)
      : packing{f.format, rows, columns, f.group, f.planes}, E(E) {
    if (f.format == Format::fp8)
      fill_fp8();
    else if (f.format == Format::bit_nested)
      fill_bit_nested();
    else if (f.format == Format::sub1)
      fill_sub1();
    else
      fill_rows();
  }

  int64_t bytes_per_expert() const { return (codes.size() + scales.size() + zeros.size()) / E; }

  PackedMatrix matrix() const {
    return {packing,          codes.data(), scales.data(), zeros.size() ? zeros.data() : nullptr,
            codes.size() / E, starts.data()};
  }

 private:
  Bytes floats(int64_t rows) const {
    return values(rows * packing.columns, DType::f32, 1 / std::sqrt(float(packing.columns)));
  }

  void fill_rows() {
    Packing few = packing;
    few.rows = 16;
    const Bytes w = floats(few.rows);
    const int64_t per_row = groups(packing), times = E * packing.rows / few.rows;
    std::vector<uint8_t> c(few.rows * row_bytes(packing)), s(few.rows * per_row * scale_bytes(packing.format));
    std::vector<uint8_t> z(has_zeros(packing.format) ? few.rows * per_row : 0);
    cpu::quantize(few, reinterpret_cast<const float*>(w.data()), 1, c.data(), s.data(), z.empty() ? nullptr : z.data());
    codes.repeat(c, times), scales.repeat(s, times);
    if (!z.empty()) zeros.repeat(z, times);
  }

  void fill_fp8() {
    const Bytes w = floats(kFp8Block);
    std::vector<uint8_t> c(kFp8Block * row_bytes(packing));
    std::vector<float> s(groups(packing));
    cpu::fp8_quantize({1, kFp8Block, packing.columns}, reinterpret_cast<const float*>(w.data()), 1, c.data(), s.data());
    const int64_t times = E * packing.rows / kFp8Block;
    codes.repeat(c, times), scales.repeat(s, times);
  }

  void fill_bit_nested() {
    const BitNestedPacking one{1, packing.rows, packing.columns, packing.group, packing.planes};
    const Bytes w = floats(packing.rows);
    std::vector<uint8_t> c(one.planes * one.rows * row_bytes(one));
    std::vector<f16> s(one.rows * groups(one));
    cpu::bit_nested_quantize(one, reinterpret_cast<const float*>(w.data()), 2, c.data(), s.data());
    codes.repeat(c, E), scales.repeat(s, E);
  }

  // 88.5 % zeros; a whole matrix of random rows, or the few entries of the dictionary that they need would be at hand.
  void fill_sub1() {
    std::vector<uint8_t> digits(packing.rows * packing.columns);
    std::discrete_distribution<int> digit{kSub1Zero, (1 - kSub1Zero) / 2, (1 - kSub1Zero) / 2};
    for (uint8_t& d : digits) d = uint8_t(digit(generator));
    const cpu::Sub1Rows one = cpu::sub1_encode(digits.data(), packing.rows, packing.columns, 2);
    codes.repeat(one.codes, E), zeros.repeat(one.row_ptr, E);
    scales.repeat(std::vector<bf16>{to_bf16(-0.1f), to_bf16(0.1f)}, E * packing.rows);
    for (int64_t e = 0; e <= E; ++e) starts.push_back(e * int64_t(one.codes.size()));
  }
};

}  // namespace moert::bench
