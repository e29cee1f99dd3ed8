// MOERT_CHECK(condition, words...): throws std::runtime_error with the words joined; the form is
// "<argument> must be <contract>, got <value>".
#pragma once

#include <charconv>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace moert {

namespace detail {

// A string as it is, a number as C++ streams write it, whatever the locale.
template <typename Word>
std::string word(const Word& x) {
  static_assert(!std::is_same_v<Word, char>, "a character is meant as a string of one, or as a number: say which");
  if constexpr (std::is_floating_point_v<Word>) {
    char text[32];
    return {text, std::to_chars(text, text + sizeof text, x, std::chars_format::general, 6).ptr};
  } else if constexpr (std::is_integral_v<Word>) {
    return std::to_string(x);
  } else {
    return std::string(x);
  }
}

}  // namespace detail

// Words by value, so that every message of a string and two numbers is one function; cold: small rather than fast.
template <typename... Words>
[[noreturn, gnu::cold, gnu::noinline]] void fail(Words... words) {
  throw std::runtime_error((std::string() + ... + detail::word(words)));
}

}  // namespace moert

#define MOERT_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::moert::fail(__VA_ARGS__); \
  } while (0)
