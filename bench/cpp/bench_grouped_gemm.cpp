// One product an expert, over rows that lie in expert order: grouped_gemm/<model>/<dtype>/<routing>/T:<tokens>.
//
// Gates and ups of a layer: N = 2I, K = H.  Counters and limits as in bench_fused_experts.cpp.
#include "moert/grouped_gemm.h"

#include <memory>

#include "layers.h"
#include "moert/permute.h"

namespace moert::bench {

namespace {

// Kept until the next model's are wanted.
const Bytes& weights_of(const Model& model, DType dtype) {
  static std::unique_ptr<Bytes> weights;
  static std::string of;
  const std::string wanted = model.name + std::to_string(int(dtype));
  if (of != wanted) {
    weights.reset();
    weights = std::make_unique<Bytes>(values(model.E * 2 * model.I * model.H, dtype, std::sqrt(3.0f / model.H)));
    of = wanted;
  }
  return *weights;
}

void grouped_gemm(benchmark::State& state, const Model& model, DType dtype, const char* routing) {
  const int64_t T = state.range(0), E = model.E, N = 2 * model.I, K = model.H, S = T * model.k, size = size_of(dtype);
  const Bytes &w = weights_of(model, dtype), x = values(S * K, dtype, 1);
  Bytes y(S * N * size);
  std::vector<int32_t> offsets(E + 1), tokens(S), slots(S);
  Routings routings(routing, E);
  Meter<Peak::fma> meter;
  for (auto _ : state) {
    const auto ids = routings.draw(T, model.k);
    cpu::permute_plan(ids.data(), T, model.k, E, -1, meter.limits.threads, offsets.data(), tokens.data(), slots.data());
    GroupedGemm product{S, E, N, K, offsets.data(), {x.data(), dtype, K}, {w.data(), dtype, N * K, K, 1}, {}};
    const double bytes = double((active(ids) * N * K + S * (N + K)) * size), flop = 2.0 * double(S * N * K);
    meter.sample(state, bytes, flop, [&] { cpu::grouped_gemm(product, meter.limits.threads, y.data(), N); });
  }
  meter.report(state);
}

const bool registered = [] {
  for (const Model& model : kModels)
    for (const DType dtype : {DType::f32, DType::bf16})
      for (const char* routing : kRoutings) {
        const std::string name =
            std::string("grouped_gemm/") + model.name + (dtype == DType::f32 ? "/f32/" : "/bf16/") + routing + "/T";
        auto* bench = benchmark::RegisterBenchmark(
            name.c_str(), [=, &model](benchmark::State& s) { grouped_gemm(s, model, dtype, routing); });
        bench->UseManualTime()->Unit(benchmark::kMillisecond);
        for (const int64_t T : kTokens) bench->Arg(T);
      }
  return true;
}();

}  // namespace
}  // namespace moert::bench
