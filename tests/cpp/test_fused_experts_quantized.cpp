#include "moert/fused_experts_quantized.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "cpu/packed_experts.h"
#include "expect.h"
#include "packed_matrix.h"

using namespace moert;

const int64_t T = 13, k = 2, E = 3, H = 97, I = 45;

std::vector<float> uniform(int64_t n, uint32_t seed) {
  std::vector<float> x(n);
  for (auto& value : x) value = float((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1;
  return x;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max(largest, double(std::abs(a[i] - b[i])));
  return largest;
}

// Of sums of float32; or of the two products of rows that are off by at most 1/254 of their largest value, 1/28 of
// each, or 2^-9 of each as the weights are too: 2^-8 in a product.
double most_error(Precision precision) {
  switch (precision) {
    case Precision::full:
      return 1e-5;
    case Precision::bfloat16:
      return 0x1p-6;
    case Precision::fp8_group128:
      return 0.1;
    default:
      return 0.03;
  }
}

// Every instruction set rounds the float32 of a weight; where that is subnormal, it may be zero.
void dequantized_to_bf16(const Packing& kind, int64_t rows, int64_t columns) {
  Packing packing = kind;
  packing.rows = rows, packing.columns = columns;
  const Matrix matrix(packing, 1, uniform(rows * columns, 6));
  const PackedMatrix packed = matrix.packed();
  const int64_t stride = (columns + 31) / 32 * 32 + 32;
  std::vector<float> floats(rows * columns), row(columns);
  std::vector<bf16> narrow(rows * stride);
  const int64_t first = rows / 3;  // rows begin anywhere
  const cpu::PackedRows from = cpu::rows_of(packed, 0, first);
  cpu::packed_gemm_kernels().dequantize(from, rows - first, floats.data(), columns);
  cpu::packed_gemm_kernels().dequantize_bf16(from, rows - first, narrow.data(), stride, row.data());
  for (int64_t r = 0; r < rows - first; ++r)
    for (int64_t c = 0; c < columns; ++c) EXPECT(narrow[r * stride + c].bits == to_bf16(floats[r * columns + c]).bits);
}

void forward_and_backward(const Packing& kind) {
  Packing first = kind, second = kind;
  first.rows = 2 * I, first.columns = H, second.rows = H, second.columns = I;
  const auto x = uniform(T * H, 1), weights = uniform(T * k, 4), dy = uniform(T * H, 5);
  std::vector<int32_t> ids(T * k);
  for (int64_t i = 0; i < T * k; ++i) ids[i] = int32_t(i * 7 % (E + 1));  // E is the sentinel
  const RoutedRows tokens{T, k, {x.data(), DType::f32, H}, ids.data(), weights.data()};
  const Matrix w1(first, E, uniform(E * 2 * I * H, 2)), w2(second, E, uniform(E * H * I, 3));
  ExpertWeights floats{};
  floats.E = E, floats.H = H, floats.I = I;
  const QuantizedExperts experts{w1.packed(), w2.packed(), floats};
  floats.gate = w1.floats(), floats.up = w1.floats(I), floats.down = w2.floats();

  std::vector<float> expected(T * H, NAN), y(T * H, NAN), again(T * H, NAN);
  cpu::fused_experts(tokens, floats, 1, expected.data(), nullptr);
  double size = 0;
  for (const float value : expected) size = std::max(size, double(std::abs(value)));
  for (const Precision precision : kPrecisions) {
    if (!takes(kind.format, precision)) continue;
    cpu::fused_experts_quantized(tokens, experts, precision, 1, y.data());
    cpu::fused_experts_quantized(tokens, experts, precision, 3, again.data());
    EXPECT(y == again);
    EXPECT(largest_difference(y, expected) <= most_error(precision) * size);
    if (precision == Precision::bfloat16) EXPECT(largest_difference(y, expected) > 1e-4 * size);  // they are rounded
  }

  std::vector<float> dx(T * H, NAN), dweights(T * k, NAN), dx_floats(T * H, NAN), dweights_floats(T * k, NAN);
  cpu::fused_experts_quantized_backward({dy.data(), DType::f32, H}, tokens, experts, 2, dx.data(), dweights.data());
  ExpertGradients gradients{};
  gradients.dx = dx_floats.data(), gradients.dweights = dweights_floats.data();
  cpu::fused_experts_backward({dy.data(), DType::f32, H}, tokens, floats, nullptr, 1, gradients);
  EXPECT(largest_difference(dx, dx_floats) <= 1e-5 * size);
  EXPECT(largest_difference(dweights, dweights_floats) <= 1e-5 * size);
}

void of_format(const Packing& kind) {
  for (const int64_t columns : {1, 16, 33, 97, 320, 2711}) dequantized_to_bf16(kind, 7, columns);
  forward_and_backward(kind);
}

int main() {
  for (const int64_t group : {0, 32, 64, 128})
    for (int format = 0; format < kRowFormats; ++format) {
      try {
        cpu::check_packing(Packing{Format(format), 1, 1, group});
      } catch (const std::runtime_error&) {
        continue;
      }
      of_format({Format(format), 0, 0, group});
    }
  of_format({Format::fp8, 0, 0, kFp8Block});
  for (int64_t planes = 1; planes <= 8; ++planes) of_format({Format::bit_nested, 0, 0, 32 << planes % 3, planes});
  of_format({Format::sub1, 0, 0, 0});
}
