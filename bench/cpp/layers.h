// What the benches of expert layers share: models, routings, and the meter that holds a call to the machine's limits.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "moert/dtype.h"
#include "roofline.h"

namespace moert::bench {

struct Model {
  const char* name;
  int64_t H, I, E, k;
};

inline constexpr Model kModels[] = {{"qwen3-30b-a3b", 2048, 768, 128, 8},
                                    {"olmoe", 2048, 1024, 64, 8},
                                    {"deepseek-v2-lite", 2048, 1408, 64, 6},
                                    {"gpt-oss-20b", 2880, 2880, 32, 4},
                                    {"mixtral-4", 4096, 14336, 4, 2}};  // 4 of its 8 experts
inline constexpr int64_t kTokens[] = {1, 4, 16, 64, 256, 1024, 4096};
inline constexpr const char* kRoutings[] = {"uniform", "zipf"};

using Bytes = std::vector<char>;

inline std::mt19937 generator(1);

// Values in [-1, 1) times scale; a block of them over and over, because 3 GB of random numbers take minutes.
inline Bytes values(int64_t n, DType dtype, float scale) {
  Bytes out(n * size_of(dtype));
  std::uniform_real_distribution<float> uniform(-scale, scale);
  const int64_t block = std::min<int64_t>(n, 100003);
  for (int64_t i = 0; i < block; ++i) {
    const float x = uniform(generator);
    const bf16 narrow = to_bf16(x);
    std::memcpy(&out[i * size_of(dtype)], dtype == DType::f32 ? static_cast<const void*>(&x) : &narrow, size_of(dtype));
  }
  for (int64_t done = block * size_of(dtype); done < int64_t(out.size()); done *= 2)
    std::memcpy(&out[done], out.data(), std::min<int64_t>(done, out.size() - done));
  return out;
}

// ids [T, k]: k different experts a token, all alike or the n-th with probability ~ 1 / n.
struct Routings {
  std::discrete_distribution<int32_t> expert;

  Routings(const std::string& routing, int64_t E) {
    std::vector<double> probability(E, 1.0);
    for (int64_t e = 0; routing == "zipf" && e < E; ++e) probability[e] = 1.0 / double(e + 1);
    std::shuffle(probability.begin(), probability.end(), generator);
    expert = std::discrete_distribution<int32_t>(probability.begin(), probability.end());
  }

  std::vector<int32_t> draw(int64_t T, int64_t k) {
    std::vector<int32_t> ids;
    for (int64_t t = 0; t < T; ++t)
      for (int64_t j = 0; j < k;) {
        const int32_t e = expert(generator);
        if (std::find(ids.end() - j, ids.end(), e) != ids.end()) continue;
        ids.push_back(e);
        ++j;
      }
    return ids;
  }
};

inline int64_t active(const std::vector<int32_t>& ids) { return int64_t(std::set(ids.begin(), ids.end()).size()); }

enum class Peak { fma, int8 };

// The counters of one benchmark.
template <Peak kPeak>
struct Meter {
  struct Sample {
    double bytes, flop, time;
  };
  Limits limits{bench_threads()};
  std::vector<Sample> samples;

  // The best that this process has seen: other programs slow a sample down, nothing speeds it up, so no share is
  // flattered.
  static inline double bandwidth = 0, peak = 0;

  template <typename F>
  void sample(benchmark::State& state, double bytes, double flop, const F& f) {
    sample_limits();
    samples.push_back({bytes, flop, seconds(f)});
    sample_limits();
    state.SetIterationTime(samples.back().time);
  }

  void sample_limits() {
    bandwidth = std::max(bandwidth, limits.read_bandwidth());
    peak = std::max(peak, (kPeak == Peak::fma ? limits.fma_peak() : limits.int8_peak()));
  }

  template <typename F>
  double median_of(const F& f) const {
    std::vector<double> values;
    for (const Sample& sample : samples) values.push_back(f(sample));
    return median(values);
  }

  void report(benchmark::State& state) const {
    state.counters["GB/s"] = median_of([](const Sample& s) { return s.bytes / s.time * 1e-9; });
    state.counters["GFLOP/s"] = median_of([](const Sample& s) { return s.flop / s.time * 1e-9; });
    state.counters["share"] =
        median_of([](const Sample& s) { return std::max(s.bytes / bandwidth, s.flop / peak) / s.time; });
    state.counters["limit_GB/s"] = bandwidth * 1e-9;
    state.counters["limit_GFLOP/s"] = peak * 1e-9;
  }
};

}  // namespace moert::bench
