// The expert FFN at the shapes of real models: fused_experts/<forward|backward>/<model>/<dtype>/<routing>/T:<tokens>.
//
// share: the time that the limit needs over the time taken, the median over all calls.  The limit is the larger of
// bytes / read bandwidth and operations / FMA peak, both the best that the process has seen; they are sampled before
// and after every call.  Every call routes its tokens anew, so that no cache holds the weights of the next one.
#include <benchmark/benchmark.h>

#include "float_layer.h"

namespace moert::bench {

namespace {

// Backward counts both passes, because training pays both; h is saved in between.
void fused_experts(benchmark::State& state, const Model& model, DType dtype, const char* routing, bool backward) {
  const int64_t T = state.range(0), H = model.H, k = model.k, weight = 3 * H * model.I, size = size_of(dtype);
  const Layer& layer = layer_of(model, dtype, backward);
  const ExpertWeights experts = layer.weights();
  const Bytes x = values(T * H, dtype, 1), dy = values(T * H, dtype, 1);
  Bytes y(T * H * size), h(backward ? T * k * 2 * model.I * size : 0), dx(y.size());
  std::vector<float> weights(T * k, 1.0f / float(k)), dweights(T * k);
  ExpertGradients gradients{};
  if (backward) {
    gradients.dx = dx.data(), gradients.dweights = dweights.data();
    gradients.dgate = layer.matrix(layer.dw1, model.I, H, 2 * model.I);
    gradients.dup = layer.matrix(layer.dw1, model.I, H, 2 * model.I, model.I);
    gradients.ddown = layer.matrix(layer.dw2, H, model.I, H);
  }
  Routings routings(routing, model.E);
  Meter<Peak::fma> meter;
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
