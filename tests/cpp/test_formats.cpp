#include "moert/formats.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "expect.h"

using namespace moert;

// Every byte that encode can give comes back as its codes; there are kLimit^kCodes of them.
template <typename Byte>
void every_byte(int expected) {
  int seen = 0;
  for (int byte = 0; byte < 256; ++byte) {
    uint8_t codes[Byte::kCodes];
    bool valid = true;
    for (int j = 0; j < Byte::kCodes; ++j) {
      codes[j] = Byte::code(uint8_t(byte), j);
      valid &= codes[j] < Byte::kLimit;
    }
    if (valid && Byte::encode(codes) == byte) ++seen;
  }
  EXPECT(seen == expected);
}

template <typename F>
bool throws(const char* text, const F& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return std::string(error.what()).find(text) != std::string::npos;
  }
  return false;
}

struct Packed {
  std::vector<uint8_t> codes, scales, zeros;
};

Packed quantize(const Packing& p, const std::vector<float>& w) {
  Packed out;
  out.codes.resize(size_t(p.rows * row_bytes(p)));
  out.scales.resize(size_t(p.rows * groups(p) * scale_bytes(p.format)));
  if (has_zeros(p.format)) out.zeros.resize(size_t(p.rows * groups(p)));
  EXPECT(int64_t(out.codes.size() + out.scales.size() + out.zeros.size()) == total_bytes(p));
  cpu::quantize(p, w.data(), 2, out.codes.data(), out.scales.data(), out.zeros.empty() ? nullptr : out.zeros.data());
  return out;
}

std::vector<float> dequantize(const Packing& p, const Packed& packed) {
  std::vector<float> w(size_t(p.rows * p.columns));
  cpu::dequantize(p, packed.codes.data(), packed.scales.data(), packed.zeros.empty() ? nullptr : packed.zeros.data(), 2,
                  w.data());
  return w;
}

// What each format can hold exactly comes back exactly, in odd sizes and over a partial last group.
void exact_weights(Format format, int64_t group, const std::vector<float>& values) {
  for (const int64_t columns : {0, 1, 16, 100, 160}) {
    const Packing p{format, 3, columns, group};
    std::vector<float> w(size_t(3 * columns));
    for (size_t i = 0; i < w.size(); ++i) w[i] = values[i % size_t(columns) % values.size()] * 0.25f;
    EXPECT(dequantize(p, quantize(p, w)) == w);
  }
}

void refuses() {
  const Packing p{Format::ternary5, 2, 10, 0};
  Packed packed = quantize(p, std::vector<float>(20, 1.f));
  int refused = 0;
  for (int byte = 0; byte < 256; ++byte) {
    packed.codes[17] = uint8_t(byte);
    refused += throws("at row 1, byte 1", [&] { dequantize(p, packed); });
  }
  EXPECT(refused == 256 - 243);
  packed.codes[17] = 0;
  packed.codes[18] = 7;
  EXPECT(throws("0 after column 10, got 7 at row 1, byte 2", [&] { dequantize(p, packed); }));
  EXPECT(throws("w must be finite", [&] { quantize(p, std::vector<float>(20, NAN)); }));
  EXPECT(throws("group must be 32 for mxfp4, got 64", [] { cpu::check_packing({Format::mxfp4, 1, 64, 64}); }));
}

int main() {
  every_byte<OneAByte>(256);
  every_byte<TwoAByte>(256);
  every_byte<FourTritsAByte>(81);
  every_byte<FiveTritsAByte>(243);

  const float e2m1[] = {0.f, 0.5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f};
  for (uint32_t code = 0; code < 8; ++code) {
    EXPECT(e2m1_to_float(code) == e2m1[code] && e2m1_to_float(code + 8) == -e2m1[code]);
  }
  for (int byte = 0; byte < 255; ++byte) EXPECT(e8m0_to_float(uint8_t(byte)) == std::ldexp(1.f, byte - 127));
  EXPECT(std::isnan(e8m0_to_float(255)));

  // The example of docs/formats.md.
  const uint8_t trits[] = {2, 0, 1, 2, 2};
  EXPECT(FiveTritsAByte::encode(trits) == 189);

  exact_weights(Format::int8, 0, {127.f, -1.f, 0.f, 5.f});
  exact_weights(Format::int8, 32, {127.f, -1.f, 0.f, 5.f});
  exact_weights(Format::int4, 32, {7.f, -1.f, 0.f, 5.f});
  exact_weights(Format::int4_asymmetric, 32, {15.f, 2.f, 0.f, 5.f});
  exact_weights(Format::mxfp4, 32, {6.f, -1.5f, 0.f, 0.5f});
  exact_weights(Format::ternary2, 0, {1.f, -1.f, 0.f});
  exact_weights(Format::ternary5, 64, {1.f, -1.f, 0.f});
  refuses();
}
