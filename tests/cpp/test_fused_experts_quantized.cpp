#include "moert/fused_experts_quantized.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "expect.h"
#include "moert/bit_nested.h"
#include "moert/fp8.h"
#include "moert/sub1.h"

using namespace moert;

const int64_t T = 13, k = 2, E = 3, H = 97, I = 45;

std::vector<float> uniform(int64_t n, uint32_t seed) {
  std::vector<float> x(n);
  for (auto& value : x) value = float((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1;
  return x;
}

// Packed weights and the floats that they stand for.
struct Matrix {
  Packing packing;  // of one expert
  std::vector<uint8_t> codes, scales, zeros;
  std::vector<float> values;
  std::vector<int64_t> starts;
  int64_t codes_stride = 0, scales_stride = 0;

  Matrix(const Packing& of, uint32_t seed) : packing(of), values(uniform(E * of.rows * of.columns, seed)) {
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
    const BitNestedPacking all{E, packing.rows, packing.columns, packing.group, packing.base, packing.levels};
    const int64_t per_level = packing.rows * groups(packing);
    codes_stride = planes(all) * packing.rows * row_bytes(all), scales_stride = 2 * packing.levels * per_level;
    codes.resize(E * codes_stride), scales.resize(E * scales_stride), zeros.resize(E * per_level);
    f16* levels = reinterpret_cast<f16*>(scales.data());
    cpu::bit_nested_quantize(all, values.data(), 1, codes.data(), levels, zeros.data());
    cpu::bit_nested_dequantize(all, codes.data(), levels, zeros.data(), 1, values.data());
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
    return {packing,      codes.data(),  scales.data(), zeros.empty() ? nullptr : zeros.data(),
            codes_stride, scales_stride, starts.data()};
  }
  ExpertMatrix floats(int64_t first = 0) const {
    return {values.data() + first * packing.columns, DType::f32, packing.rows * packing.columns, packing.columns, 1};
  }
};

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max(largest, double(std::abs(a[i] - b[i])));
  return largest;
}

void forward_and_backward(const Packing& kind) {
  Packing first = kind, second = kind;
  first.rows = 2 * I, first.columns = H, second.rows = H, second.columns = I;
  const auto x = uniform(T * H, 1), weights = uniform(T * k, 4), dy = uniform(T * H, 5);
  std::vector<int32_t> ids(T * k);
  for (int64_t i = 0; i < T * k; ++i) ids[i] = int32_t(i * 7 % (E + 1));  // E is the sentinel
  const RoutedRows tokens{T, k, {x.data(), DType::f32, H}, ids.data(), weights.data()};
  const Matrix w1(first, 2), w2(second, 3);
  ExpertWeights floats{};
  floats.E = E, floats.H = H, floats.I = I;
  const QuantizedExperts experts{w1.packed(), w2.packed(), floats};
  floats.gate = w1.floats(), floats.up = w1.floats(I), floats.down = w2.floats();

  std::vector<float> expected(T * H, NAN), y(T * H, NAN), again(T * H, NAN);
  cpu::fused_experts(tokens, floats, 1, expected.data(), nullptr);
  double size = 0;
  for (const float value : expected) size = std::max(size, double(std::abs(value)));
  for (const Precision precision : {Precision::full, Precision::int8, Precision::int8_group32}) {
    if (precision != Precision::full && int(kind.format) >= kRowFormats) continue;
    cpu::fused_experts_quantized(tokens, experts, precision, 1, y.data());
    cpu::fused_experts_quantized(tokens, experts, precision, 3, again.data());
    EXPECT(y == again);
    // Sums of float32; or each of the two products of rows that are off by at most 1/254 of their largest value.
    EXPECT(largest_difference(y, expected) <= (precision == Precision::full ? 1e-5 : 0.03) * size);
  }

  std::vector<float> dx(T * H, NAN), dweights(T * k, NAN), dx_floats(T * H, NAN), dweights_floats(T * k, NAN);
  cpu::fused_experts_quantized_backward({dy.data(), DType::f32, H}, tokens, experts, 2, dx.data(), dweights.data());
  ExpertGradients gradients{};
  gradients.dx = dx_floats.data(), gradients.dweights = dweights_floats.data();
  cpu::fused_experts_backward({dy.data(), DType::f32, H}, tokens, floats, nullptr, 1, gradients);
  EXPECT(largest_difference(dx, dx_floats) <= 1e-5 * size);
  EXPECT(largest_difference(dweights, dweights_floats) <= 1e-5 * size);
}

int main() {
  for (const int64_t group : {0, 32, 64, 128})
    for (int format = 0; format < kRowFormats; ++format) {
      try {
        cpu::check_packing(Packing{Format(format), 1, 1, group});
      } catch (const std::runtime_error&) {
        continue;
      }
      forward_and_backward({Format(format), 0, 0, group});
    }
  forward_and_backward({Format::fp8, 0, 0, kFp8Block});
  for (const int64_t base : {1, 2, 5})
    forward_and_backward({Format::bit_nested, 0, 0, base == 5 ? 128 : 32 * base, base, 3});
  forward_and_backward({Format::sub1, 0, 0, 0});
}
