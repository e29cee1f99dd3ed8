// MOERT_CHECK(condition, words...): throws std::runtime_error with the words joined; the form is
// "<argument> must be <contract>, got <value>".
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace moert {

// A string as it is, a number as a stream would write it.
template <typename Word>
std::string word(const Word& x) {
  if constexpr (std::is_floating_point_v<Word>) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", double(x));
    return text;
  } else if constexpr (std::is_integral_v<Word>) {
    return std::to_string(x);
  } else {
    return x;
  }
}

// Words by value, so that every message of a string and two numbers is one function; cold: small rather than fast.
template <typename... Words>
[[noreturn, gnu::cold, gnu::noinline]] void fail(Words... words) {
  throw std::runtime_error((std::string() + ... + word(words)));
}

}  // namespace moert

#define MOERT_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::moert::fail(__VA_ARGS__); \
  } while (0)
