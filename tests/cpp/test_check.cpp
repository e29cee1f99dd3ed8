#include "moert/check.h"

#include <string>

#include "expect.h"

int main() {
  const int k = 9, E = 8;
  EXPECT(words([&] { MOERT_CHECK(k <= E, "k must be in [1, E=", E, "], got ", k); }) == "k must be in [1, E=8], got 9");
  EXPECT(words([] { moert::fail("x must be finite, got ", 1.5); }) == "x must be finite, got 1.5");
  int evaluated = 0;
  MOERT_CHECK(++evaluated == 1, "not reached ", ++evaluated);
  EXPECT(evaluated == 1);
}
