#include "moert/bit_nested.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "expect.h"

using namespace moert;

double squared_error(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0;
  for (size_t i = 0; i < a.size(); ++i) error += std::pow(double(a[i]) - b[i], 2);
  return error;
}

// What the first planes hold gets nearer with every plane.
int main() {
  for (const int64_t columns : {1, 100, 128, 260}) {
    BitNestedPacking p{2, 3, columns, 64, 8};
    std::vector<float> w(size_t(2 * 3 * columns)), back(w.size());
    for (size_t i = 0; i < w.size(); ++i) w[i] = std::sin(float(i) * 0.7f);
    const size_t plane = size_t(3 * row_bytes(p));
    std::vector<uint8_t> codes(2 * 8 * plane);
    std::vector<f16> scales(size_t(2 * 3 * groups(p)));
    cpu::bit_nested_quantize(p, w.data(), 2, codes.data(), scales.data());
    double last = 1e30;
    for (p.planes = 1; p.planes <= 8; ++p.planes) {
      std::vector<uint8_t> lower(2 * size_t(p.planes) * plane);
      for (size_t m = 0; m < 2; ++m)
        std::memcpy(lower.data() + m * size_t(p.planes) * plane, codes.data() + m * 8 * plane,
                    size_t(p.planes) * plane);
      cpu::bit_nested_dequantize(p, lower.data(), scales.data(), 2, back.data());
      const double error = squared_error(w, back);
      EXPECT(error < last || columns == 1);
      last = error;
    }
    EXPECT(last < 1e-4 * squared_error(w, std::vector<float>(w.size())));
  }
  // Four bits are int4's grid.
  const BitNestedPacking p{1, 1, 4, 32, 4};
  const float exact[] = {-8.f, 0.f, 1.f, 7.f};
  uint8_t codes[4 * 16];
  f16 scale;
  float back[4];
  cpu::bit_nested_quantize(p, exact, 1, codes, &scale);
  EXPECT(to_float(scale) == 1.f);
  EXPECT(codes[0] == 0b1110 && codes[16] == 0b1000 && codes[32] == 0b1000 && codes[48] == 0b1100);
  cpu::bit_nested_dequantize(p, codes, &scale, 1, back);
  EXPECT(std::memcmp(exact, back, sizeof(back)) == 0);
}
