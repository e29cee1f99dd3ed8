// MOERT_CHECK(condition, words...): throws std::runtime_error with the words joined; the form is
// "<argument> must be <contract>, got <value>".
#pragma once

#include <sstream>
#include <stdexcept>

namespace moert {

template <typename... Words>
[[noreturn]] void fail(const Words&... words) {
  std::ostringstream out;
  (out << ... << words);
  throw std::runtime_error(out.str());
}

}  // namespace moert

#define MOERT_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::moert::fail(__VA_ARGS__); \
  } while (0)
