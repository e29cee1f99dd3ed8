#include "roofline.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <thread>

#include "cpu/parallel.h"
#include "cpu/peak.h"

namespace moert::bench {

namespace {

constexpr int64_t kMemory = 64 << 20;       // floats: 256 MB, read in turns
constexpr int64_t kSample = 8 << 20;        // floats: 32 MB
constexpr int64_t kOperations = 256 << 20;  // of a thread: a millisecond or more

typedef float Four __attribute__((vector_size(16)));

float sum_of(const float* p, int64_t n) {
  Four sums[8] = {};
  for (int64_t i = 0; i < n; i += 32)
    for (int j = 0; j < 8; ++j) sums[j] += *reinterpret_cast<const Four*>(p + i + 4 * j);
  for (int j = 1; j < 8; ++j) sums[0] += sums[j];
  return sums[0][0];
}

void read_bandwidth(benchmark::State& state) {
  Limits limits(bench_threads());
  for (auto _ : state) state.SetIterationTime(kSample * 4 / limits.read_bandwidth());
  state.counters["GB/s"] = benchmark::Counter(kSample * 4e-9, benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(read_bandwidth)->Name("limits/read_bandwidth")->UseManualTime()->Unit(benchmark::kMillisecond);

void fma_peak(benchmark::State& state) {
  Limits limits(bench_threads());
  for (auto _ : state) state.SetIterationTime(1e9 / limits.fma_peak());
  state.counters["GFLOP/s"] = benchmark::Counter(1, benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(fma_peak)->Name("limits/fma_peak")->UseManualTime()->Unit(benchmark::kMillisecond);

void int8_peak(benchmark::State& state) {
  Limits limits(bench_threads());
  for (auto _ : state) state.SetIterationTime(1e9 / limits.int8_peak());
  state.counters["GOP/s"] = benchmark::Counter(1, benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(int8_peak)->Name("limits/int8_peak")->UseManualTime()->Unit(benchmark::kMillisecond);

}  // namespace

Limits::Limits(int64_t threads) : threads(threads), memory_(kMemory, 1.0f) {}

double Limits::read_bandwidth() {
  next_ = (next_ + kSample) % kMemory;
  const int64_t part = kSample / threads / 32 * 32;
  const double time = seconds([&] {
    cpu::parallel_for(threads, threads,
                      [&](int64_t i) { benchmark::DoNotOptimize(sum_of(memory_.data() + next_ + i * part, part)); });
  });
  return double(part * threads * 4) / time;
}

double Limits::peak_of(int64_t (*multiply)(int64_t operations, int64_t threads)) const {
  int64_t operations = 0;
  const double time = seconds([&] { operations = multiply(kOperations * threads, threads); });
  return double(operations) / time;
}

double Limits::fma_peak() const { return peak_of(cpu::multiply_floats); }

double Limits::int8_peak() const { return peak_of(cpu::multiply_bytes); }

int64_t bench_threads() {
  const char* wanted = std::getenv("OMP_NUM_THREADS");
  return wanted ? std::max(1, std::atoi(wanted)) : std::max(1u, std::thread::hardware_concurrency());
}

double median(std::vector<double> samples) {
  const auto middle = samples.begin() + samples.size() / 2;
  std::nth_element(samples.begin(), middle, samples.end());
  return *middle;
}

}  // namespace moert::bench
