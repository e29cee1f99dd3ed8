#include "moert/dtype.h"

#include <cmath>
#include <limits>

#include "expect.h"

using namespace moert;

// Every 16-bit pattern survives the way to float and back (a NaN stays one).
template <typename Half, typename ToHalf>
void round_trip(ToHalf to_half) {
  for (uint32_t bits = 0; bits <= 0xffffu; ++bits) {
    const float x = to_float(Half{uint16_t(bits)});
    if (std::isnan(x)) {
      EXPECT(std::isnan(to_float(to_half(x))));
    } else {
      EXPECT(to_half(x).bits == bits);
    }
  }
}

// Between two neighbours: the nearer one, and at the middle the even one.
template <typename Half, typename ToHalf>
void rounds_to_nearest_even(ToHalf to_half, uint32_t infinity) {
  for (uint32_t bits = 0; bits + 1 < infinity; ++bits) {
    const float low = to_float(Half{uint16_t(bits)}), high = to_float(Half{uint16_t(bits + 1)});
    const float middle = low + (high - low) / 2;
    EXPECT(to_half(middle).bits == bits + (bits & 1u));
    EXPECT(to_half(std::nextafter(middle, low)).bits == bits);
    EXPECT(to_half(std::nextafter(middle, high)).bits == bits + 1);
  }
}

int main() {
  round_trip<bf16>([](float x) { return to_bf16(x); });
  round_trip<f16>([](float x) { return to_f16(x); });
  rounds_to_nearest_even<f16>([](float x) { return to_f16(x); }, 0x7c00u);
  // From the smallest normal on; below it the middle is no float.
  for (uint32_t bits = 0x80u; bits + 1 < 0x7f80u; ++bits) {
    const uint32_t middle = bits << 16 | 0x8000u;
    EXPECT(to_bf16(bits_to_float(middle)).bits == bits + (bits & 1u));
    EXPECT(to_bf16(bits_to_float(middle - 1)).bits == bits);
    EXPECT(to_bf16(bits_to_float(middle + 1)).bits == bits + 1);
  }
  EXPECT(to_f16(65519.f).bits == 0x7bffu && to_f16(65520.f).bits == 0x7c00u);
  EXPECT(to_f16(-std::numeric_limits<float>::infinity()).bits == 0xfc00u);
  EXPECT(to_f16(0x1p-26f).bits == 0 && to_f16(-0.f).bits == 0x8000u);
  EXPECT(size_of(DType::f32) == 4 && size_of(DType::bf16) == 2 && size_of(DType::f16) == 2 && size_of(DType::f64) == 8);
}
