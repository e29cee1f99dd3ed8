#include "moert/gating.h"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "expect.h"

using moert::DType;
using moert::GatingOptions;
using moert::Score;

struct Gated {
  std::vector<float> weights;
  std::vector<int32_t> ids;
};

Gated gate(const std::vector<float>& logits, int64_t E, int64_t k, const GatingOptions& options, int64_t threads = 1,
           const float* bias = nullptr) {
  const int64_t T = int64_t(logits.size()) / E;
  Gated out{std::vector<float>(T * k, -7), std::vector<int32_t>(T * k, -7)};
  moert::cpu::topk_gating(logits.data(), DType::f32, E, bias, T, E, k, options, threads, out.weights.data(),
                          out.ids.data());
  return out;
}

void ties_go_to_the_lower_id() {
  const Gated out = gate({0, 2, 1, 2}, 4, 3, {});
  EXPECT((out.ids == std::vector<int32_t>{1, 3, 2}));
  EXPECT(out.weights[0] == out.weights[1] && out.weights[1] > out.weights[2]);
}

void scores() {
  GatingOptions options;
  options.score = Score::relu;
  options.renormalize = true;
  options.scale = 2;
  Gated out = gate({3, -1, 1, 0}, 4, 2, options);
  EXPECT((out.ids == std::vector<int32_t>{0, 2}));
  EXPECT((out.weights == std::vector<float>{1.5f, 0.5f}));
  options.score = Score::softmax_over_topk;
  out = gate({1, 1, -1, 0}, 4, 2, options);
  EXPECT((out.weights == std::vector<float>{1, 1}));
  options = {};
  options.score = Score::sigmoid;
  const float bias[] = {0, 0, 9, 0};
  out = gate({0, 1, -200, 0}, 4, 2, options, 1, bias);
  EXPECT((out.ids == std::vector<int32_t>{2, 1}));
  EXPECT(out.weights[0] == 0 && std::abs(out.weights[1] - 0.7310586f) < 1e-7f);
}

void groups() {
  GatingOptions options;
  options.score = Score::relu;
  options.num_groups = 3;
  EXPECT((gate({5, 0, 3, 3, 4, 1}, 6, 2, options).ids == std::vector<int32_t>{0, 1}));
  options.group_score = moert::GroupScore::top2;
  EXPECT((gate({5, 0, 3, 3, 4, 1}, 6, 2, options).ids == std::vector<int32_t>{2, 3}));
}

void nan_loses() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  const Gated out = gate({nan, -inf, nan, 0, nan, nan, nan, nan}, 4, 4, {});
  EXPECT((out.ids == std::vector<int32_t>{3, 1, 0, 2, 0, 1, 2, 3}));
  for (float weight : out.weights) EXPECT(std::isnan(weight));
}

void too_many_choices() {
  bool refused = false;
  try {
    gate({0, 0}, 2, 3, {});
  } catch (const std::runtime_error& error) {
    refused = std::string(error.what()) == "k must be in [0, 2], got 3";
  }
  EXPECT(refused);
}

// Every row like the same row alone, and its gradient a difference quotient, whatever the threads.
void batches_and_gradients() {
  const int64_t T = 1003, E = 37, k = 5;
  std::vector<float> logits(T * E), dweights(T * k, 0);
  uint32_t state = 1;
  for (float& x : logits) x = float((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-22f;
  for (int64_t t = 0; t < T; ++t) dweights[t * k] = 1;
  GatingOptions options;
  options.renormalize = true;
  const Gated out = gate(logits, E, k, options);
  std::vector<float> dlogits(T * E, -7), same(T * E, -7);
  const auto backward = [&](int64_t threads, std::vector<float>& result) {
    moert::cpu::topk_gating_backward(dweights.data(), logits.data(), DType::f32, E, out.ids.data(), T, E, k, options,
                                     threads, result.data());
  };
  backward(1, dlogits);
  for (int64_t threads : {2, 3, 8}) {
    const Gated again = gate(logits, E, k, options, threads);
    EXPECT(again.weights == out.weights && again.ids == out.ids);
    backward(threads, same);
    EXPECT(same == dlogits);
  }
  for (int64_t t : {int64_t(0), int64_t(500), T - 1}) {
    std::vector<float> row(logits.begin() + t * E, logits.begin() + (t + 1) * E);
    const Gated alone = gate(row, E, k, options);
    for (int64_t j = 0; j < k; ++j)
      EXPECT(alone.ids[j] == out.ids[t * k + j] && alone.weights[j] == out.weights[t * k + j]);
    const int32_t best = alone.ids[0];
    row[best] += 1e-2f;
    const float slope = (gate(row, E, k, options).weights[0] - alone.weights[0]) / 1e-2f;
    EXPECT(std::abs(dlogits[t * E + best] - slope) < 2e-3f);
  }
}

int main() {
  ties_go_to_the_lower_id();
  scores();
  groups();
  nan_loses();
  too_many_choices();
  batches_and_gradients();
  EXPECT(gate({}, 4, 2, {}).ids.empty());
}
