#include "roofline.h"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/parallel.h"
#include "moert/isa.h"

namespace moert::bench {

namespace {

constexpr int64_t kMemory = 64 << 20;  // floats: 256 MB, read in turns
constexpr int64_t kSample = 8 << 20;   // floats: 32 MB
constexpr int64_t kRounds = 40000;     // of the loop below

using FmaLoop = int64_t (*)(int64_t rounds);

// 12 independent sums of `bytes` each: enough to fill two pipes of four cycles.  Returns the operations done.
#define MOERT_FMA_LOOP(name, target, bytes)                           \
  target int64_t name(int64_t rounds) {                               \
    typedef float Vector __attribute__((vector_size(bytes)));         \
    Vector sums[12] = {}, x = Vector{} + 0.5f, y = Vector{} + 0.999f; \
    for (int64_t i = 0; i < rounds; ++i)                              \
      for (auto& sum : sums) {                                        \
        sum = sum * x + y;                                            \
        asm volatile("" : "+v"(sum));                                 \
      }                                                               \
    return rounds * 12 * (bytes / 4) * 2;                             \
  }

#if defined(__x86_64__)
MOERT_FMA_LOOP(fma_avx512, __attribute__((target("avx512f"))), 64)
MOERT_FMA_LOOP(fma_avx2, __attribute__((target("avx2,fma"))), 32)
#endif
MOERT_FMA_LOOP(fma_generic, , 16)

// The same with products of bytes.
#define MOERT_INT8_LOOP(name, flags, Register, products)                     \
  __attribute__((target(flags))) int64_t name(int64_t rounds) {              \
    Register sums[12] = {};                                                  \
    const Register x = Register{} + 0x01020304, y = Register{} + 0x04030201; \
    for (int64_t i = 0; i < rounds; ++i)                                     \
      for (auto& sum : sums) {                                               \
        sum = products;                                                      \
        asm volatile("" : "+v"(sum));                                        \
      }                                                                      \
    return rounds * 12 * int64_t(sizeof(Register)) * 2;                      \
  }

#if defined(__x86_64__)
MOERT_INT8_LOOP(int8_vnni, "avx512f,avx512vnni", __m512i, _mm512_dpbusd_epi32(sum, x, y))
MOERT_INT8_LOOP(int8_avx512, "avx512f,avx512bw", __m512i,
                _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(x, y), x)))
MOERT_INT8_LOOP(int8_avx2, "avx2", __m256i, _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), x)))
#endif

FmaLoop int8_loop() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512_vnni) return int8_vnni;
  if (isa() >= Isa::avx512) return int8_avx512;
  if (isa() >= Isa::avx2) return int8_avx2;
#endif
  return fma_generic;
}

FmaLoop fma_loop() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return fma_avx512;
  if (isa() >= Isa::avx2) return fma_avx2;
#endif
  return fma_generic;
}

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

template <typename F>
double Limits::peak_of(const F& loop) const {
  int64_t operations = 0;
  const double time = seconds([&] {
    cpu::parallel_for(threads, threads, [&](int64_t i) {
      const int64_t done = loop(kRounds);
      if (i == 0) operations = done * threads;
    });
  });
  return double(operations) / time;
}

double Limits::fma_peak() const { return peak_of(fma_loop()); }

double Limits::int8_peak() const { return peak_of(int8_loop()); }

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
