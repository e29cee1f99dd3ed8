// The experts that a few tokens use between them, each for all of these: union_experts/<model>/<dtype>/T:<tokens>.
//
// Counters and limits as in bench_fused_experts.cpp; every product counts, those that a gain of zero discards as well.
#include "moert/union_experts.h"

#include "float_layer.h"

namespace moert::bench {

namespace {

void union_experts(benchmark::State& state, const Model& model, DType dtype) {
  const int64_t T = state.range(0), H = model.H, size = size_of(dtype);
  const ExpertWeights experts = layer_of(model, dtype, false).weights();
  const Bytes x = values(T * H, dtype, 1);
  Bytes y(T * H * size);
  Routings routings("uniform", model.E);
  Meter<Peak::fma> meter;
  for (auto _ : state) {
    const auto chosen = routings.draw(T, model.k);
    const std::set used(chosen.begin(), chosen.end());
    const std::vector<int32_t> ids(used.begin(), used.end());
    std::vector<float> gains(T * model.E);
    for (int64_t i = 0; i < T * model.k; ++i) gains[i / model.k * model.E + chosen[i]] = 1.0f / float(model.k);
    const UnionRows tokens{T, int64_t(ids.size()), {x.data(), dtype, H}, gains.data(), ids.data()};
    const double weights = 3.0 * double(tokens.n * H * model.I);
    meter.sample(state, weights * double(size) + double(2 * T * H * size), 2 * double(T) * weights,
                 [&] { cpu::union_experts(tokens, experts, meter.limits.threads, y.data()); });
  }
  meter.report(state);
}

const bool registered = [] {
  for (const Model& model : kModels)
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const std::string name =
          std::string("union_experts/") + model.name + (dtype == DType::f32 ? "/f32/T" : "/bf16/T");
      auto* bench = benchmark::RegisterBenchmark(name.c_str(),
                                                 [=, &model](benchmark::State& s) { union_experts(s, model, dtype); });
      bench->UseManualTime()->Unit(benchmark::kMillisecond)->Arg(1)->Arg(4)->Arg(16);
    }
  return true;
}();

}  // namespace
}  // namespace moert::bench
