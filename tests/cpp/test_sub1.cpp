#include "moert/sub1.h"

#include <stdexcept>
#include <vector>

#include "expect.h"

using namespace moert;

int main() {
  const auto& dictionary = cpu::sub1_dictionary();
  EXPECT(int64_t(dictionary.entries.size()) == kSub1Size);
  EXPECT(sub1_length(dictionary.entries[0].data()) == 1 && sub1_digit(dictionary.entries[0].data(), 0) == 0);

  // Any bytes at all decode or throw; what encode gave comes back.
  uint32_t state = 1;
  const auto random = [&] { return state = state * 1664525u + 1013904223u, state >> 16; };
  for (int round = 0; round < 2000; ++round) {
    const int64_t rows = 1 + random() % 3, columns = random() % 90;
    std::vector<uint8_t> digits(size_t(rows * columns)), back(digits.size());
    for (auto& digit : digits) digit = random() % 8 ? uint8_t(0) : uint8_t(1 + random() % 2);
    cpu::Sub1Rows packed = cpu::sub1_encode(digits.data(), rows, columns, 2);
    const auto decode = [&] {
      cpu::sub1_decode(packed.codes.data(), int64_t(packed.codes.size()), packed.row_ptr.data(), rows, columns, 2,
                       back.data());
    };
    decode();
    EXPECT(back == digits);
    if (packed.codes.empty()) continue;
    packed.codes[random() % packed.codes.size()] = uint16_t(random());
    packed.row_ptr[random() % packed.row_ptr.size()] += int32_t(random() % 3) - 1;
    try {
      decode();
    } catch (const std::runtime_error&) {
    }
  }
}
