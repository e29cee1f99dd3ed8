// Packed weights of some experts, in any format, for the tests.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "moert/bit_nested.h"
#include "moert/fp8.h"
#include "moert/fused_experts_quantized.h"
#include "moert/sub1.h"

namespace moert {

// Packed weights and the floats that they stand for.
struct Matrix {
  Packing packing;  // of one expert
  int64_t E;
  std::vector<uint8_t> codes, scales, zeros;
  std::vector<float> values;
  std::vector<int64_t> starts;
  int64_t codes_stride = 0;

  // `floats` [E, rows, columns], in [-1, 1)
  Matrix(const Packing& of, int64_t E, std::vector<float> floats) : packing(of), E(E), values(std::move(floats)) {
    switch (packing.format) {
      case Format::fp8:
        fill_fp8();
        break;
      case Format::bit_nested:
        fill_bit_nested();
        break;
      case Format::sub1:
        fill_sub1();
        break;
      default:
        fill_rows();
    }
  }

  void fill_rows() {
    Packing all = packing;
    all.rows *= E;
    codes.resize(all.rows * row_bytes(all));
    scales.resize(all.rows * groups(all) * scale_bytes(all.format));
    zeros.resize(has_zeros(all.format) ? all.rows * groups(all) : 0);
    cpu::quantize(all, values.data(), 1, codes.data(), scales.data(), zeros_data());
    cpu::dequantize(all, codes.data(), scales.data(), zeros_data(), 1, values.data());
  }

  void fill_fp8() {
    const Fp8Packing all{E, packing.rows, packing.columns};
    codes.resize(E * packing.rows * row_bytes(packing));
    scales.resize(4 * E * fp8_blocks(packing.rows) * groups(packing));
    float* blocks = reinterpret_cast<float*>(scales.data());
    cpu::fp8_quantize(all, values.data(), 1, codes.data(), blocks);
    cpu::fp8_dequantize(all, codes.data(), blocks, 1, values.data());
  }

  void fill_bit_nested() {
    const BitNestedPacking all{E, packing.rows, packing.columns, packing.group, packing.planes};
    codes_stride = packing.planes * packing.rows * row_bytes(packing);
    codes.resize(E * codes_stride), scales.resize(2 * E * packing.rows * groups(packing));
    f16* each = reinterpret_cast<f16*>(scales.data());
    cpu::bit_nested_quantize(all, values.data(), 1, codes.data(), each);
    cpu::bit_nested_dequantize(all, codes.data(), each, 1, values.data());
  }

  // Rows of 0, -r and r.
  void fill_sub1() {
    scales.resize(4 * E * packing.rows);
    bf16* limits = reinterpret_cast<bf16*>(scales.data());
    starts.push_back(0);
    for (int64_t e = 0; e < E; ++e) {
      std::vector<uint8_t> digits(packing.rows * packing.columns);
      for (int64_t i = 0; i < int64_t(digits.size()); ++i) {
        const int64_t row = e * packing.rows + i / packing.columns;
        float& value = values[row * packing.columns + i % packing.columns];
        limits[2 * row] = to_bf16(-float(1 + row % 3)), limits[2 * row + 1] = to_bf16(float(1 + row % 5));
        digits[i] = value < -0.8f ? 1 : value > 0.8f ? 2 : 0;
        value = digits[i] ? to_float(limits[2 * row + digits[i] - 1]) : 0;
      }
      const cpu::Sub1Rows rows = cpu::sub1_encode(digits.data(), packing.rows, packing.columns, 1);
      append(codes, rows.codes), append(zeros, rows.row_ptr);
      starts.push_back(starts.back() + int64_t(rows.codes.size()));
    }
  }

  template <typename T>
  static void append(std::vector<uint8_t>& bytes, const std::vector<T>& more) {
    const uint8_t* data = reinterpret_cast<const uint8_t*>(more.data());
    bytes.insert(bytes.end(), data, data + more.size() * sizeof(T));
  }

  uint8_t* zeros_data() { return zeros.empty() ? nullptr : zeros.data(); }
  PackedMatrix packed() const {
    return {packing, codes.data(), scales.data(), zeros.empty() ? nullptr : zeros.data(), codes_stride, starts.data()};
  }
  // The same parts elsewhere, as a GPU takes them.
  PackedMatrix packed(const uint8_t* codes_at, const uint8_t* scales_at, const uint8_t* zeros_at) const {
    PackedMatrix matrix = packed();
    matrix.codes = codes_at, matrix.scales = scales_at, matrix.zeros = zeros.empty() ? nullptr : zeros_at;
    matrix.starts = nullptr, matrix.size = int64_t(codes.size() / 2);
    return matrix;
  }
  ExpertMatrix floats(int64_t first = 0) const {
    return {values.data() + first * packing.columns, DType::f32, packing.rows * packing.columns, packing.columns, 1};
  }
};

}  // namespace moert
