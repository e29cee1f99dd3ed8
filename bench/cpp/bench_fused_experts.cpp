// The expert FFN at the shapes of real models: fused_experts/<forward|backward>/<model>/<dtype>/<routing>/T:<tokens>.
//
// share: the time that the limit needs over the time taken, the median over all calls.  The limit is the larger of
// bytes / read bandwidth and operations / FMA peak, both the best that the process has seen; they are sampled before
// and after every call.  Every call routes its tokens anew, so that no cache holds the weights of the next one.
#include <benchmark/benchmark.h>

#include <memory>

#include "layers.h"
#include "moert/fused_experts.h"

namespace moert::bench {

namespace {

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
