// Rows to expert order and back: permute/<plan|there|back>/<model>/<dtype>/<routing>/T:<tokens>.
//
// GB/s are of bytes that have to be read and written, each once; the share is of the bandwidth of reading memory, which
// few rows that stay in the caches exceed.
#include "moert/permute.h"

#include "layers.h"

namespace moert::bench {

namespace {

enum class Part { plan, there, back };
constexpr const char* kParts[] = {"plan", "there", "back"};

void permute(benchmark::State& state, Part part, const Model& model, DType dtype, const char* routing) {
  const int64_t T = state.range(0), k = model.k, E = model.E, S = T * k, H = model.H, row = H * size_of(dtype);
  const Bytes x = values(T * H, dtype, 1);
  Bytes rows(S * row), y(T * row);
  const std::vector<float> weights(S, 1.0f / float(k));
  std::vector<int32_t> offsets(E + 1), tokens(S), slots(S);
  Routings routings(routing, E);
  Meter<Peak::fma> meter;
  for (auto _ : state) {
    const auto ids = routings.draw(T, k);
    const auto plan = [&] {
      cpu::permute_plan(ids.data(), T, k, E, -1, meter.limits.threads, offsets.data(), tokens.data(), slots.data());
    };
    plan();
    if (part == Part::plan) {
      meter.sample(state, 12.0 * double(S), 0, plan);
    } else if (part == Part::there) {
      meter.sample(state, double((T + S) * row), 0, [&] {
        cpu::permute_rows(x.data(), H, dtype, tokens.data(), T, S, H, meter.limits.threads, rows.data());
      });
    } else {
      meter.sample(state, double((T + S) * row), 2.0 * double(S * H), [&] {
        cpu::unpermute_rows(rows.data(), H, dtype, slots.data(), weights.data(), nullptr, 0, T, k, S, H,
                            meter.limits.threads, y.data());
      });
    }
  }
  meter.report(state);
}

const bool registered = [] {
  for (const Part part : {Part::plan, Part::there, Part::back})
    for (const Model& model : kModels)
      for (const DType dtype : {DType::f32, DType::bf16})
        for (const char* routing : kRoutings) {
          const std::string name = std::string("permute/") + kParts[int(part)] + "/" + model.name +
                                   (dtype == DType::f32 ? "/f32/" : "/bf16/") + routing + "/T";
          auto* bench = benchmark::RegisterBenchmark(
              name.c_str(), [=, &model](benchmark::State& s) { permute(s, part, model, dtype, routing); });
          bench->UseManualTime()->Unit(benchmark::kMicrosecond);
          for (const int64_t T : kTokens) bench->Arg(T);
        }
  return true;
}();

}  // namespace
}  // namespace moert::bench
