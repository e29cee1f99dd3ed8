// Numbers for the tests, the same in every run.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "moert/dtype.h"

namespace moert {

struct Random {
  uint64_t state = 1;

  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 33);
  }
  int64_t below(int64_t n) { return int64_t(bits()) % n; }
  // In [-scale, scale), a multiple of scale / 2^12: few enough values for ties.
  double number(double scale = 1) { return (double(bits() % 8192) / 4096 - 1) * scale; }
};

template <typename T>
T rounded(double x) {
  if constexpr (std::is_same_v<T, bf16>)
    return to_bf16(float(x));
  else if constexpr (std::is_same_v<T, f16>)
    return to_f16(float(x));
  else
    return T(x);
}

inline double value(double x) { return x; }
template <typename T>
double value(T x) {
  return to_float(x);
}

template <typename T>
std::vector<T> numbers(Random& random, size_t n, double scale = 1) {
  std::vector<T> values(n);
  for (T& x : values) x = rounded<T>(random.number(scale));
  return values;
}

template <typename T>
bool equal_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Whether every row of `width` numbers is within `tolerance` of the other's, relative to the larger of its norm and a
// tenth of the largest norm: a row that cancels keeps the rounding of its terms.
template <typename A, typename B>
bool rows_close(const std::vector<A>& a, const std::vector<B>& b, size_t width, double tolerance) {
  if (a.size() != b.size()) return false;
  if (width == 0) return true;
  std::vector<double> error, size;
  double largest = 0;
  for (size_t row = 0; row + width <= a.size(); row += width) {
    double e = 0, s = 0;
    for (size_t i = row; i < row + width; ++i) {
      const double x = value(a[i]), y = value(b[i]);
      if (std::isnan(x) && std::isnan(y)) continue;
      e += (x - y) * (x - y);
      s += y * y;
    }
    error.push_back(std::sqrt(e));
    size.push_back(std::sqrt(s));
    largest = std::fmax(largest, size.back());
  }
  for (size_t row = 0; row < error.size(); ++row)
    if (!(error[row] <= tolerance * std::fmax(size[row], 0.1 * largest))) return false;
  return true;
}

// Sums of float32 in another order; what is between the products is rounded to the dtype.
template <typename X>
constexpr double kUnit = std::is_same_v<X, bf16> ? 0x1p-7
                         : sizeof(X) == 2        ? 0x1p-10
                         : sizeof(X) == 4        ? 4e-6
                                                 : 1e-13;

}  // namespace moert
