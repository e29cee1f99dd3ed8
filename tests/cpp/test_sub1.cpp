#include "moert/sub1.h"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "cpu/packed_gemm_isa.h"
#include "expect.h"

using namespace moert;

uint32_t draw() {
  static uint32_t state = 1;
  return state = state * 1664525u + 1013904223u, state >> 16;
}

// Rows of weights that are integers, as codewords and as floats.
struct Ternary {
  int64_t N, K;
  std::vector<float> values;
  std::vector<bf16> limits;
  cpu::Sub1Rows packed;

  Ternary(int64_t N, int64_t K, uint32_t zeros) : N(N), K(K) {
    std::vector<uint8_t> digits(size_t(N * K));
    for (auto& digit : digits) digit = draw() % 16 < zeros ? uint8_t(0) : uint8_t(1 + draw() % 2);
    for (int64_t n = 0; n < N; ++n) {
      const float limit[] = {0, -float(1 + draw() % 3), float(draw() % 4)};
      limits.push_back(to_bf16(limit[1])), limits.push_back(to_bf16(limit[2]));
      for (int64_t k = 0; k < K; ++k) values.push_back(limit[digits[size_t(n * K + k)]]);
    }
    packed = cpu::sub1_encode(digits.data(), N, K, 1);
  }

  cpu::PackedRows from(int64_t n) const {
    return {{Format::sub1, N, K, 0},
            reinterpret_cast<const uint8_t*>(packed.codes.data()),
            limits.data() + 2 * n,
            reinterpret_cast<const uint8_t*>(packed.row_ptr.data() + n),
            n,
            int64_t(packed.codes.size())};
  }
};

// Sums of integers are exact, whatever their order.  infinite: a column where x is infinite, in the first row alone.
void test_few(const Ternary& w, int64_t first, int64_t M, int64_t infinite) {
  const int64_t N = w.N - first, K = w.K, stride = (K + 15) / 16 * 16 + cpu::kFewPadding;
  std::vector<float> x(size_t(M * stride)), c(size_t(M * cpu::kTileColumns));
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; ++k) x[size_t(m * stride + k)] = float(draw() % 9) - 4;
  if (infinite < K) x[size_t(infinite)] = std::numeric_limits<float>::infinity();
  std::vector<double> expected;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += double(x[size_t(m * stride + k)]) * w.values[size_t((first + n) * K + k)];
      expected.push_back(sum);
    }
  std::vector<uint8_t> scratch(size_t(cpu::few_scratch(K)), 0xff);
  if (!cpu::packed_gemm_kernels().few({M, N, x.data(), stride, w.from(first), c.data(), scratch.data()})) return;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      const double sum = expected[size_t(m * N + n)], got = c[size_t(m * cpu::kTileColumns + n)];
      EXPECT(got == sum || (std::isnan(got) && std::isnan(sum)));
    }
}

void test_products() {
  for (const int64_t K : {1, 2, 27, 64, 65, 127, 128, 129, 256, 300, 1030})
    for (const int64_t N : {1, 3, 4, 5, 8, 9, 21})
      for (const uint32_t zeros : {0, 8, 14, 16}) {
        const Ternary w(N, K, zeros);
        std::vector<float> floats(size_t(N * K), NAN);
        cpu::packed_gemm_kernels().dequantize(w.from(0), N, floats.data(), K);
        EXPECT(floats == w.values);
        for (int64_t M = 1; M <= cpu::kFewRows; ++M) test_few(w, N / 3, M, M == 2 ? draw() % K : K);
      }
}

int main() {
  test_products();
  const auto& dictionary = cpu::sub1_dictionary();
  EXPECT(int64_t(dictionary.entries.size()) == kSub1Size);
  EXPECT(sub1_length(dictionary.entries[0].data()) == 1 && sub1_digit(dictionary.entries[0].data(), 0) == 0);

  // Any bytes at all decode or throw; what encode gave comes back.
  for (int round = 0; round < 2000; ++round) {
    const int64_t rows = 1 + draw() % 3, columns = draw() % 90;
    std::vector<uint8_t> digits(size_t(rows * columns)), back(digits.size());
    for (auto& digit : digits) digit = draw() % 8 ? uint8_t(0) : uint8_t(1 + draw() % 2);
    cpu::Sub1Rows packed = cpu::sub1_encode(digits.data(), rows, columns, 2);
    const auto decode = [&] {
      cpu::sub1_decode(packed.codes.data(), int64_t(packed.codes.size()), packed.row_ptr.data(), rows, columns, 2,
                       back.data());
    };
    decode();
    EXPECT(back == digits);
    if (packed.codes.empty()) continue;
    packed.codes[draw() % packed.codes.size()] = uint16_t(draw());
    packed.row_ptr[draw() % packed.row_ptr.size()] += int32_t(draw() % 3) - 1;
    try {
      decode();
    } catch (const std::runtime_error&) {
    }
  }
}
