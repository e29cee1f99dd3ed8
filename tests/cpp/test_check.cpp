#include "moert/check.h"

#include <string>

#include "expect.h"

int main() {
  const int k = 9, E = 8;
  EXPECT(words([&] { MOERT_CHECK(k <= E, "k must be in [1, E=", E, "], got ", k); }) == "k must be in [1, E=8], got 9");
  EXPECT(words([] { moert::fail("x must be finite, got ", 1.5); }) == "x must be finite, got 1.5");
  const std::string name = "w1";
  const char* place = "here";
  EXPECT(words([&] { moert::fail(name, " ", place, " ", true, " ", int64_t(-1) << 40, " ", uint8_t(65)); }) ==
         "w1 here 1 -1099511627776 65");
  EXPECT(words([] { moert::fail(1e-7, " ", 1e20, " ", 0.25f, " ", 123456789.0); }) == "1e-07 1e+20 0.25 1.23457e+08");
  int evaluated = 0;
  MOERT_CHECK(++evaluated == 1, "not reached ", ++evaluated);
  EXPECT(evaluated == 1);
}
