// What this machine can do at most, sampled: the share of a limit is only as good as a limit taken beside it.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

namespace moert::bench {

// Seconds of one call.
template <typename F>
double seconds(const F& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// One sample takes about a millisecond.
class Limits {
 public:
  explicit Limits(int64_t threads);

  // Bytes read per second: every thread sums a part of memory that no cache holds.
  double read_bandwidth();

  // float32 operations per second from registers, on the instruction set that the kernels use.
  double fma_peak() const;

  // int8 operations per second from registers, likewise.
  double int8_peak() const;

  const int64_t threads;

 private:
  double peak_of(int64_t (*multiply)(int64_t operations, int64_t threads)) const;

  std::vector<float> memory_;
  int64_t next_ = 0;
};

// OMP_NUM_THREADS, or every core.
int64_t bench_threads();

double median(std::vector<double> samples);

}  // namespace moert::bench
