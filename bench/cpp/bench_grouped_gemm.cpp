// One product an expert, over rows that lie in expert order, and its gradients, of rows and of weights:
// grouped_gemm[_dx|_dw]/<model>/<dtype>/<routing>/T:<tokens>.
//
// Gates and ups of a layer: N = 2I, K = H.  Counters and limits as in bench_fused_experts.cpp.
#include "moert/grouped_gemm.h"

#include "float_layer.h"
#include "moert/permute.h"

namespace moert::bench {

namespace {

enum class Pass { forward, dx, dw };

constexpr const char* name_of(Pass pass) {
  return pass == Pass::forward ? "grouped_gemm/" : pass == Pass::dx ? "grouped_gemm_dx/" : "grouped_gemm_dw/";
}

void grouped_gemm(benchmark::State& state, const Model& model, DType dtype, const char* routing, Pass pass) {
  const int64_t T = state.range(0), E = model.E, N = 2 * model.I, K = model.H, S = T * model.k, size = size_of(dtype);
  const Layer& layer = layer_of(model, dtype, pass == Pass::dw);
  const Bytes x = values(S * K, dtype, 1), dy = values(pass == Pass::forward ? 0 : S * N, dtype, 1);
  Bytes out(S * std::max(N, K) * size);
  std::vector<int32_t> offsets(E + 1), tokens(S), slots(S);
  Routings routings(routing, E);
  Meter<Peak::fma> meter;
  const Rows rows{x.data(), dtype, K}, drows{dy.data(), dtype, N};
  const GroupedGemm forward{S, E, N, K, offsets.data(), rows, {layer.w1.data(), dtype, N * K, K, 1}, {}};
  const GroupedGemm dx{S, E, K, N, offsets.data(), drows, {layer.w1.data(), dtype, N * K, 1, K}, {}};
  const GroupedGemmWgrad dw{S, E, N, K, offsets.data(), drows, rows};
  for (auto _ : state) {
    const auto ids = routings.draw(T, model.k);
    cpu::permute_plan(ids.data(), T, model.k, E, -1, meter.limits.threads, offsets.data(), tokens.data(), slots.data());
    // The gradient of every expert's weights is written.
    const double matrices = double((pass == Pass::dw ? E : active(ids)) * N * K * size);
    meter.sample(state, matrices + double(S * (N + K) * size), 2.0 * double(S * N * K), [&] {
      if (pass == Pass::forward) cpu::grouped_gemm(forward, meter.limits.threads, out.data(), N);
      if (pass == Pass::dx) cpu::grouped_gemm(dx, meter.limits.threads, out.data(), K);
      if (pass == Pass::dw) cpu::grouped_gemm_wgrad(dw, meter.limits.threads, {layer.dw1.data(), dtype, N * K, K, 1});
    });
  }
  meter.report(state);
}

void add(Pass pass, const Model& model, DType dtype, const char* routing) {
  const std::string name =
      std::string(name_of(pass)) + model.name + (dtype == DType::f32 ? "/f32/" : "/bf16/") + routing + "/T";
  auto* bench = benchmark::RegisterBenchmark(
      name.c_str(), [=, &model](benchmark::State& s) { grouped_gemm(s, model, dtype, routing, pass); });
  bench->UseManualTime()->Unit(benchmark::kMillisecond);
  for (const int64_t T : kTokens)
    if (pass == Pass::forward || T >= 256) bench->Arg(T);
}

const bool registered = [] {
  for (const Pass pass : {Pass::forward, Pass::dx, Pass::dw})
    for (const Model& model : kModels)
      for (const DType dtype : {DType::f32, DType::bf16})
        for (const char* routing : kRoutings) add(pass, model, dtype, routing);
  return true;
}();

}  // namespace
}  // namespace moert::bench
