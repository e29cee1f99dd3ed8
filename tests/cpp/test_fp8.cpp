#include "moert/fp8.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "expect.h"

using namespace moert;

int main() {
  // Every code is its own nearest, and halfway between two neighbours the even one is taken.
  for (int code = 0; code < 0x7e; ++code) {
    const float low = e4m3_to_float(uint8_t(code)), high = e4m3_to_float(uint8_t(code + 1));
    EXPECT(low < high && to_e4m3(low) == code && to_e4m3(high) == code + 1);
    EXPECT(to_e4m3((low + high) / 2) == code + (code & 1));
    EXPECT(to_e4m3(std::nextafter((low + high) / 2, 0.f)) == code);
    EXPECT(to_e4m3(std::nextafter((low + high) / 2, 1e9f)) == code + 1);
    EXPECT(to_e4m3(-high) == code + 1 + 128 && e4m3_to_float(uint8_t(code + 128)) == -low);
  }
  EXPECT(e4m3_to_float(0x7e) == 448.f && to_e4m3(1e30f) == 0x7e && to_e4m3(-1e30f) == 0xfe);
  EXPECT(std::isnan(e4m3_to_float(0x7f)) && std::isnan(e4m3_to_float(0xff)));

  // Blocks do not reach from one matrix into the next.
  const Fp8Packing p{2, 130, 20};
  std::vector<float> w(size_t(2 * 130 * 20), 1.f), back(w.size());
  for (size_t i = 130 * 20; i < w.size(); ++i) w[i] = 1000.f;
  std::vector<uint8_t> codes(size_t(2 * 130 * fp8_row_bytes(20)));
  std::vector<float> scales(size_t(2 * fp8_blocks(130) * fp8_blocks(20)));
  cpu::fp8_quantize(p, w.data(), 2, codes.data(), scales.data());
  EXPECT(scales[0] == scales[1] && scales[2] == scales[3] && scales[0] < 1.f && scales[2] > 1.f);
  cpu::fp8_dequantize(p, codes.data(), scales.data(), 2, back.data());
  for (size_t i = 0; i < w.size(); ++i) EXPECT(std::fabs(back[i] - w[i]) <= w[i] * 1e-6f);

  w[5] = NAN;
  try {
    cpu::fp8_quantize(p, w.data(), 2, codes.data(), scales.data());
    EXPECT(false);
  } catch (const std::runtime_error& error) {
    EXPECT(std::string(error.what()).find("w must be finite, got inf or nan in row 0") != std::string::npos);
  }
}
