// Scores and choice of experts: gating/<softmax|sigmoid|grouped>/<model>/<dtype>/T:<tokens>.
//
// GB/s are of logits read and of weights and ids written; the share is of the read bandwidth, though what a token costs
// in instructions binds before it.  Every call takes the next logits of a ring that the second-level cache does not
// hold.
#include "layers.h"
#include "moert/gating.h"

namespace moert::bench {

namespace {

struct Gate {
  const char* name;
  GatingOptions options;
  bool bias;
};

constexpr Gate kGates[] = {{"softmax", {Score::softmax, true}, false},
                           {"sigmoid", {Score::sigmoid, true}, true},
                           {"grouped", {Score::sigmoid, true, 1, 8, 4, GroupScore::top2}, true}};

void gating(benchmark::State& state, const Gate& gate, const Model& model, DType dtype) {
  const int64_t T = state.range(0), E = model.E, k = model.k, row = E * size_of(dtype);
  const int64_t calls = std::max<int64_t>(2, (int64_t(64) << 20) / (T * row));
  const Bytes logits = values(calls * T * E, dtype, 4), bias = values(E, DType::f32, 1);
  std::vector<float> weights(T * k);
  std::vector<int32_t> ids(T * k);
  Meter<Peak::fma> meter;
  int64_t call = 0;
  for (auto _ : state) {
    const char* own = logits.data() + call * T * row;
    meter.sample(state, double(T * (row + 8 * k)), 5.0 * double(T * E), [&] {
      cpu::topk_gating(own, dtype, E, gate.bias ? bias.data() : nullptr, T, E, k, gate.options, meter.limits.threads,
                       weights.data(), ids.data());
    });
    call = (call + 1) % calls;
  }
  meter.report(state);
}

const bool registered = [] {
  for (const Gate& gate : kGates)
    for (const Model& model : kModels)
      for (const DType dtype : {DType::f32, DType::bf16}) {
        if (model.E / gate.options.num_groups < 2) continue;  // a group's score is of two experts
        const std::string name =
            std::string("gating/") + gate.name + "/" + model.name + (dtype == DType::f32 ? "/f32/T" : "/bf16/T");
        auto* bench = benchmark::RegisterBenchmark(
            name.c_str(), [=, &gate, &model](benchmark::State& s) { gating(s, gate, model, dtype); });
        bench->UseManualTime()->Unit(benchmark::kMicrosecond);
        for (const int64_t T : kTokens) bench->Arg(T);
      }
  return true;
}();

}  // namespace
}  // namespace moert::bench
