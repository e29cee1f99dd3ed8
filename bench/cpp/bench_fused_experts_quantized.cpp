// Quantized experts: fused_experts_quantized/<model>/<format>/<precision>/<routing>/T:<tokens>.
//
// share is that of bench_fused_experts.cpp; the limits are the packed bytes of the experts in use, scales included,
// over the read bandwidth, and the operations over the peak of int8 products.
#include <memory>

#include "packed_weights.h"

namespace moert::bench {

namespace {

// One model's experts, kept until other ones are wanted.
struct QuantizedLayer {
  const char *model, *format;
  PackedWeights w1, w2;
};

const QuantizedLayer& layer_of(const Model& m, const NamedFormat& f) {
  static std::unique_ptr<QuantizedLayer> layer;
  if (!layer || layer->model != m.name || layer->format != f.name) {
    layer.reset();
    layer.reset(new QuantizedLayer{m.name, f.name, {f, m.E, 2 * m.I, m.H}, {f, m.E, m.H, m.I}});
  }
  return *layer;
}

void quantized(benchmark::State& state, const Model& model, const NamedFormat& format, Precision precision,
               const char* routing) {
  const int64_t T = state.range(0), H = model.H, k = model.k;
  const QuantizedLayer& layer = layer_of(model, format);
  ExpertWeights floats{};
  floats.E = model.E, floats.H = H, floats.I = model.I;
  const QuantizedExperts experts{layer.w1.matrix(), layer.w2.matrix(), floats};
  const double expert_bytes = double(layer.w1.bytes_per_expert() + layer.w2.bytes_per_expert());
  const Bytes x = values(T * H, DType::f32, 1);
  std::vector<float> y(T * H), weights(T * k, 1.0f / float(k));
  Routings routings(routing, model.E);
  Meter<Peak::int8> meter;
  for (auto _ : state) {
    const auto ids = routings.draw(T, k);
    const RoutedRows tokens{T, k, {x.data(), DType::f32, H}, ids.data(), weights.data()};
    const double bytes = double(8 * T * H) + double(active(ids)) * expert_bytes;
    meter.sample(state, bytes, 6.0 * double(T * k) * double(H * model.I),
                 [&] { cpu::fused_experts_quantized(tokens, experts, precision, meter.limits.threads, y.data()); });
  }
  meter.report(state);
}

const bool registered = [] {
  for (const Model& model : kModels)
    for (const NamedFormat& format : kNamedFormats)
      for (const Precision precision : {Precision::full, Precision::bfloat16, Precision::int8, Precision::int8_group32,
                                        Precision::int8_group160, Precision::int8_weights}) {
        if (!takes(format.format, precision)) continue;
        for (const char* routing : kRoutings) {
          const std::string name = std::string("fused_experts_quantized/") + model.name + "/" + format.name + "/" +
                                   moert::name(precision) + "/" + routing + "/T";
          auto* bench = benchmark::RegisterBenchmark(name.c_str(), [=, &model, &format](benchmark::State& s) {
            quantized(s, model, format, precision, routing);
          });
          bench->UseManualTime()->Unit(benchmark::kMillisecond);
          for (const int64_t T : kTokens) bench->Arg(T);
        }
      }
  return true;
}();

}  // namespace
}  // namespace moert::bench
