#include "moert/bit_nested.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "expect.h"

using namespace moert;

// Weights that level 1 holds exactly come back exactly at every level; others get nearer with every level.
int main() {
  for (const int64_t columns : {1, 100, 128, 260}) {
    double last = 1e30;
    std::vector<uint8_t> lowest;
    for (int64_t levels = 1; levels <= 3; ++levels) {
      const BitNestedPacking p{2, 3, columns, 64, 2, levels};
      std::vector<float> w(size_t(2 * 3 * columns)), back(w.size());
      for (size_t i = 0; i < w.size(); ++i) w[i] = std::sin(float(i) * 0.7f);
      std::vector<uint8_t> codes(size_t(2 * planes(p) * 3 * row_bytes(p))), zeros(size_t(2 * 3 * groups(p)));
      std::vector<f16> scales(size_t(2 * levels * 3 * groups(p)));
      cpu::bit_nested_quantize(p, w.data(), 2, codes.data(), scales.data(), zeros.data());
      cpu::bit_nested_dequantize(p, codes.data(), scales.data(), zeros.data(), 2, back.data());
      double error = 0;
      for (size_t i = 0; i < w.size(); ++i) error += std::pow(double(w[i]) - back[i], 2);
      EXPECT(error < last || columns == 1);
      last = error;
      // The first two planes of the first matrix are level 1's.
      const size_t base = size_t(2 * 3 * row_bytes(p));
      if (levels == 1) lowest.assign(codes.begin(), codes.begin() + int64_t(base));
      EXPECT(std::memcmp(lowest.data(), codes.data(), base) == 0);
    }
  }
  const BitNestedPacking p{1, 1, 4, 32, 2, 1};
  const float exact[] = {-1.f, 0.f, 1.f, 2.f};
  uint8_t codes[2 * 16], zero;
  f16 scale;
  float back[4];
  cpu::bit_nested_quantize(p, exact, 1, codes, &scale, &zero);
  EXPECT(to_float(scale) == 1.f && zero == 1 && codes[0] == 0b1010 && codes[16] == 0b1100);
  cpu::bit_nested_dequantize(p, codes, &scale, &zero, 1, back);
  EXPECT(std::memcmp(exact, back, sizeof(exact)) == 0);
}
