#include "moert/fused_experts.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "expect.h"

using namespace moert;

std::vector<float> uniform(int64_t n, uint32_t seed) {
  std::vector<float> x(n);
  for (auto& value : x) value = float((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1;
  return x;
}

const int64_t T = 13, k = 2, E = 3, H = 37, I = 19;
const auto x = uniform(T * H, 1), w1 = uniform(E * 2 * I * H, 2), w2 = uniform(E * H * I, 3),
           weights = uniform(T * k, 4);

std::vector<int32_t> routing() {
  std::vector<int32_t> ids(T * k);
  for (int64_t i = 0; i < T * k; ++i) ids[i] = int32_t(i * 7 % (E + 1));  // E is the sentinel
  ids[3] = -5;
  return ids;
}

const auto ids = routing();

RoutedRows tokens() { return {T, k, {x.data(), DType::f32, H}, ids.data(), weights.data()}; }

// gate, then up in w1.
ExpertWeights experts() {
  ExpertWeights w{};
  w.E = E, w.H = H, w.I = I;
  w.gate = {w1.data(), DType::f32, 2 * I * H, H, 1};
  w.up = {w1.data() + I * H, DType::f32, 2 * I * H, H, 1};
  w.down = {w2.data(), DType::f32, H * I, I, 1};
  return w;
}

double swiglu_ffn(int64_t e, int64_t t, int64_t h) {
  double y = 0;
  for (int64_t i = 0; i < I; ++i) {
    double gate = 0, up = 0;
    for (int64_t c = 0; c < H; ++c) {
      gate += double(x[t * H + c]) * w1[(e * 2 * I + i) * H + c];
      up += double(x[t * H + c]) * w1[(e * 2 * I + I + i) * H + c];
    }
    y += gate / (1 + std::exp(-gate)) * up * w2[(e * H + h) * I + i];
  }
  return y;
}

double expected(int64_t t, int64_t h) {
  double y = 0;
  for (int64_t j = 0; j < k; ++j) {
    const int64_t e = ids[t * k + j];
    if (0 <= e && e < E) y += weights[t * k + j] * swiglu_ffn(e, t, h);
  }
  return y;
}

// The arithmetic is float32 over sums of H and I terms of size one: 1e-4 is a hundred times its rounding.
bool close(double a, double b) { return std::abs(a - b) <= 1e-4 * (1 + std::abs(b)); }

void forward() {
  std::vector<float> y(T * H, NAN), again(T * H, NAN), h(T * k * 2 * I, NAN);
  cpu::fused_experts(tokens(), experts(), 1, y.data(), nullptr);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t c = 0; c < H; ++c) EXPECT(close(y[t * H + c], expected(t, c)));
  cpu::fused_experts(tokens(), experts(), 3, again.data(), h.data());
  EXPECT(y == again);  // threads and the saved pre-activations do not change a bit
}

// Weights in panels: the last row of x gives the same bits alone, and the whole is as expected.
void panels() {
  const cpu::Panel panel = cpu::panel_of(DType::f32);
  const int64_t I = 2 * panel.columns, H = 3 * panel.columns;
  const auto x = uniform(T * H, 6), w1 = uniform(E * 2 * I * H, 7), w2 = uniform(E * H * I, 8);
  const auto laid_out = [&](const std::vector<float>& w, int64_t N, int64_t K) {
    std::vector<float> out;
    for (int64_t e = 0; e < E; ++e)
      for (int64_t n = 0; n < N; n += panel.columns)
        for (int64_t k = 0; k < K; ++k)
          for (int64_t c = 0; c < panel.columns; ++c) out.push_back(w[(e * N + n + c) * K + k]);
    return out;
  };
  const auto p1 = laid_out(w1, 2 * I, H), p2 = laid_out(w2, H, I);
  ExpertWeights lying = experts(), ready = experts();
  lying.H = ready.H = H, lying.I = ready.I = I;
  lying.gate = {w1.data(), DType::f32, 2 * I * H, H, 1};
  lying.up = {w1.data() + I * H, DType::f32, 2 * I * H, H, 1};
  lying.down = {w2.data(), DType::f32, H * I, I, 1};
  ready.gate = {p1.data(), DType::f32, 2 * I * H, H, 1, true};
  ready.up = {p1.data() + I * H, DType::f32, 2 * I * H, H, 1, true};
  ready.down = {p2.data(), DType::f32, H * I, I, 1, true};
  const RoutedRows all{T, k, {x.data(), DType::f32, H}, ids.data(), weights.data()};
  const int64_t t = T - 1;
  const RoutedRows last{1, k, {x.data() + t * H, DType::f32, H}, ids.data() + t * k, weights.data() + t * k};
  std::vector<float> y(T * H, NAN), want(T * H, NAN), one(H, NAN);
  cpu::fused_experts(all, ready, 2, y.data(), nullptr);
  cpu::fused_experts(all, lying, 2, want.data(), nullptr);
  cpu::fused_experts(last, ready, 2, one.data(), nullptr);
  for (int64_t i = 0; i < T * H; ++i) EXPECT(close(y[i] / H, want[i] / H));
  EXPECT(std::equal(one.begin(), one.end(), y.begin() + t * H));
}

// dx along one direction against a central difference of sum(y * dy), and dw1 of an expert nobody chose is zero.
void backward() {
  const auto dy = uniform(T * H, 5);
  std::vector<float> dx(T * H, NAN), dw1(E * 2 * I * H, NAN), dw2(E * H * I, NAN), dweights(T * k, NAN);
  ExpertGradients gradients{};
  gradients.dx = dx.data();
  gradients.dweights = dweights.data();
  gradients.dgate = {dw1.data(), DType::f32, 2 * I * H, H, 1};
  gradients.dup = {dw1.data() + I * H, DType::f32, 2 * I * H, H, 1};
  gradients.ddown = {dw2.data(), DType::f32, H * I, I, 1};
  cpu::fused_experts_backward({dy.data(), DType::f32, H}, tokens(), experts(), nullptr, 2, gradients);
  for (int64_t i = 0; i < T * k; ++i) {
    const int64_t e = ids[i], t = i / k;
    double dot = 0;
    if (0 <= e && e < E)
      for (int64_t c = 0; c < H; ++c) dot += dy[t * H + c] * swiglu_ffn(e, t, c);
    EXPECT(close(dweights[i], dot));
  }
  // y is linear in w2: sum(dw2 * w2) = sum(dy * y).
  double by_weight = 0, by_output = 0;
  for (int64_t i = 0; i < E * H * I; ++i) by_weight += double(dw2[i]) * w2[i];
  for (int64_t t = 0; t < T; ++t)
    for (int64_t c = 0; c < H; ++c) by_output += dy[t * H + c] * expected(t, c);
  EXPECT(close(by_weight, by_output));
  // The pre-activations come from w1 and x alike: sum(dw1 * w1) = sum(dx * x).
  double by_w1 = 0, by_x = 0;
  for (int64_t i = 0; i < E * 2 * I * H; ++i) by_w1 += double(dw1[i]) * w1[i];
  for (int64_t i = 0; i < T * H; ++i) by_x += double(dx[i]) * x[i];
  EXPECT(close(by_w1, by_x));
}

// Added to what is there: twice the same bits as one more addition; what nobody chose is not touched.
void accumulate(int64_t threads) {
  const auto dy = uniform(T * H, 5), start1 = uniform(E * 2 * I * H, 6), start2 = uniform(E * H * I, 7);
  auto without_1 = ids;
  std::replace(without_1.begin(), without_1.end(), 1, int32_t(E));
  RoutedRows routed = tokens();
  routed.ids = without_1.data();
  const auto run = [&](std::vector<float>& dw1, std::vector<float>& dw2, bool add) {
    ExpertGradients gradients{};
    gradients.dgate = {dw1.data(), DType::f32, 2 * I * H, H, 1};
    gradients.dup = {dw1.data() + I * H, DType::f32, 2 * I * H, H, 1};
    gradients.ddown = {dw2.data(), DType::f32, H * I, I, 1};
    gradients.accumulate.w1 = gradients.accumulate.w2 = add;
    cpu::fused_experts_backward({dy.data(), DType::f32, H}, routed, experts(), nullptr, threads, gradients);
  };
  std::vector<float> dw1(E * 2 * I * H, NAN), dw2(E * H * I, NAN);
  run(dw1, dw2, false);
  auto sum1 = start1, sum2 = start2;
  std::fill_n(sum1.begin() + 2 * I * H, 2 * I * H, NAN);
  for (int step = 0; step < 2; ++step) run(sum1, sum2, true);
  for (int64_t i = 0; i < E * 2 * I * H; ++i) {
    const bool chosen = i / (2 * I * H) != 1;
    EXPECT(chosen ? sum1[i] == start1[i] + dw1[i] + dw1[i] : std::isnan(sum1[i]) && dw1[i] == 0);
  }
  for (int64_t i = 0; i < E * H * I; ++i) EXPECT(sum2[i] == start2[i] + dw2[i] + dw2[i]);
}

int main() {
  forward();
  panels();
  backward();
  for (int64_t threads : {1, 3}) accumulate(threads);
}
