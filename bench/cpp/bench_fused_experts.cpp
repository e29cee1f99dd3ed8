// The expert FFN at the shapes of real models: fused_experts/<forward|backward>/<model>/<dtype>/<routing>/T:<tokens>.
//
// share: the time that the limit needs over the time taken, the median over all calls.  The limit is the larger of
// bytes / read bandwidth and operations / FMA peak, both the best that the process has seen; they are sampled before
// and after every call.  Every call routes its tokens anew, so that no cache holds the weights of the next one.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>

#include "moert/fused_experts.h"
#include "roofline.h"

namespace moert::bench {

namespace {

struct Model {
  const char* name;
  int64_t H, I, E, k;
};

constexpr Model kModels[] = {{"qwen3-30b-a3b", 2048, 768, 128, 8},
                             {"olmoe", 2048, 1024, 64, 8},
                             {"deepseek-v2-lite", 2048, 1408, 64, 6},
                             {"gpt-oss-20b", 2880, 2880, 32, 4},
                             {"mixtral-4", 4096, 14336, 4, 2}};  // 4 of its 8 experts
constexpr int64_t kTokens[] = {1, 4, 16, 64, 256, 1024, 4096};
constexpr const char* kRoutings[] = {"uniform", "zipf"};

using Bytes = std::vector<char>;

std::mt19937 generator(1);

// Values in [-1, 1) times scale; a block of them over and over, because 3 GB of random numbers take minutes.
Bytes values(int64_t n, DType dtype, float scale) {
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

// One model's experts; kept until the next model's are wanted, since they fill the memory.
struct Layer {
  Model model;
  DType dtype;
  Bytes w1, w2, dw1, dw2;

  Layer(const Model& m, DType dtype)
      : model(m),
        dtype(dtype),
        w1(values(m.E * 2 * m.I * m.H, dtype, std::sqrt(3.0f / m.H))),
        w2(values(m.E * m.H * m.I, dtype, std::sqrt(3.0f / m.I))) {}

  ExpertMatrix matrix(const Bytes& data, int64_t rows, int64_t columns, int64_t stride, int64_t first = 0) const {
    return {data.data() + first * columns * size_of(dtype), dtype, stride * columns, columns, 1};
  }

  ExpertWeights weights() const {
    ExpertWeights w{};
    w.E = model.E, w.H = model.H, w.I = model.I;
    w.gate = matrix(w1, model.I, model.H, 2 * model.I);
    w.up = matrix(w1, model.I, model.H, 2 * model.I, model.I);
    w.down = matrix(w2, model.H, model.I, model.H);
    return w;
  }
};

const Layer& layer_of(const Model& model, DType dtype, bool gradients) {
  static std::unique_ptr<Layer> layer;
  if (!layer || layer->model.name != model.name || layer->dtype != dtype) {
    layer.reset();
    layer = std::make_unique<Layer>(model, dtype);
  }
  if (gradients) layer->dw1.resize(layer->w1.size()), layer->dw2.resize(layer->w2.size());
  return *layer;
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

int64_t active(const std::vector<int32_t>& ids) { return int64_t(std::set(ids.begin(), ids.end()).size()); }

// The counters of one benchmark.
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
    peak = std::max(peak, limits.fma_peak());
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

// Backward counts both passes, because training pays both; h is saved in between.
void fused_experts(benchmark::State& state, const Model& model, DType dtype, const char* routing, bool backward) {
  const int64_t T = state.range(0), H = model.H, k = model.k, weight = 3 * H * model.I, size = size_of(dtype);
  const Layer& layer = layer_of(model, dtype, backward);
  const ExpertWeights experts = layer.weights();
  const Bytes x = values(T * H, dtype, 1), dy = values(T * H, dtype, 1);
  Bytes y(T * H * size), h(backward ? T * k * 2 * model.I * size : 0), dx(y.size());
  std::vector<float> weights(T * k, 1.0f / float(k)), dweights(T * k);
  cpu::ExpertGradients gradients{};
  if (backward) {
    gradients.dx = dx.data(), gradients.dweights = dweights.data();
    gradients.dgate = layer.matrix(layer.dw1, model.I, H, 2 * model.I);
    gradients.dup = layer.matrix(layer.dw1, model.I, H, 2 * model.I, model.I);
    gradients.ddown = layer.matrix(layer.dw2, H, model.I, H);
  }
  Routings routings(routing, model.E);
  Meter meter;
  for (auto _ : state) {
    const auto ids = routings.draw(T, k);
    const RoutedRows tokens{T, k, {x.data(), dtype, H}, ids.data(), weights.data()};
    const double rows = double(T * (backward ? 4 : 2) * H * size), read = double(active(ids) * weight * size);
    // Backward reads the weights again and writes a gradient for every expert.
    const double bytes = rows + read + (backward ? read + double(model.E * weight * size) : 0);
    const double flop = 2.0 * double(T * k * weight) * (backward ? 3 : 1);
    meter.sample(state, bytes, flop, [&] {
      cpu::fused_experts(tokens, experts, meter.limits.threads, y.data(), backward ? h.data() : nullptr);
      if (backward)
        cpu::fused_experts_backward({dy.data(), dtype, H}, tokens, experts, h.data(), meter.limits.threads, gradients);
    });
  }
  meter.report(state);
}

const bool registered = [] {
  for (const bool backward : {false, true})
    for (const Model& model : kModels)
      for (const DType dtype : {DType::f32, DType::bf16})
        for (const char* routing : kRoutings) {
          const std::string name = std::string("fused_experts/") + (backward ? "forward_backward/" : "forward/") +
                                   model.name + (dtype == DType::f32 ? "/f32/" : "/bf16/") + routing + "/T";
          auto* bench = benchmark::RegisterBenchmark(
              name.c_str(), [=, &model](benchmark::State& s) { fused_experts(s, model, dtype, routing, backward); });
          bench->UseManualTime()->Unit(benchmark::kMillisecond);
          for (const int64_t T : kTokens)
            if (!backward || T >= 256) bench->Arg(T);
        }
  return true;
}();

}  // namespace
}  // namespace moert::bench

BENCHMARK_MAIN();
