#include "moert/union_experts.h"

#include <cmath>
#include <vector>

#include "expect.h"

using namespace moert;

std::vector<float> uniform(int64_t n, uint32_t seed) {
  std::vector<float> x(n);
  for (auto& value : x) value = float((seed = seed * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1;
  return x;
}

const int64_t T = 150, E = 5, H = 37, I = 19;  // more rows than one tile
const auto x = uniform(T * H, 1), w1 = uniform(E * I * H, 2), w2 = uniform(E * H * I, 3), gains = uniform(T * E, 4),
           b1 = uniform(E * I, 5), b2 = uniform(E * H, 6);

// ReLU experts; w2 is [E, H, I], or [E, I, H] if transposed.
ExpertWeights experts(const std::vector<float>& down, bool transposed) {
  ExpertWeights w{};
  w.E = E, w.H = H, w.I = I;
  w.gate = {w1.data(), DType::f32, I * H, H, 1};
  w.down = {down.data(), DType::f32, H * I, transposed ? 1 : I, transposed ? H : 1};
  w.gate_bias = {b1.data(), DType::f32, I};
  w.down_bias = {b2.data(), DType::f32, H};
  w.activation.act = Act::relu;
  return w;
}

double expected(const std::vector<int32_t>& ids, int64_t t, int64_t h) {
  double y = 0;
  for (int32_t e : ids) {
    if (e < 0 || e >= E) continue;
    double out = b2[e * H + h];
    for (int64_t i = 0; i < I; ++i) {
      double act = b1[e * I + i];
      for (int64_t c = 0; c < H; ++c) act += double(x[t * H + c]) * w1[(e * I + i) * H + c];
      if (act > 0) out += act * w2[(e * H + h) * I + i];
    }
    y += gains[t * E + e] * out;
  }
  return y;
}

std::vector<float> run(const std::vector<int32_t>& ids, const ExpertWeights& w, int64_t threads) {
  std::vector<float> y(T * H, NAN);
  cpu::union_experts({T, int64_t(ids.size()), {x.data(), DType::f32, H}, gains.data(), ids.data()}, w, threads,
                     y.data());
  return y;
}

int main() {
  std::vector<float> transposed(E * H * I);
  for (int64_t e = 0; e < E; ++e)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = 0; i < I; ++i) transposed[(e * I + i) * H + h] = w2[(e * H + h) * I + i];
  for (const std::vector<int32_t>& ids : {std::vector<int32_t>{3, -1, 0, 5, 4}, {}, {7}, {2}}) {
    for (bool other_way : {false, true}) {
      const auto y = run(ids, experts(other_way ? transposed : w2, other_way), 1);
      for (int64_t t = 0; t < T; ++t)
        for (int64_t h = 0; h < H; ++h) {
          const double exact = expected(ids, t, h);
          EXPECT(std::abs(y[t * H + h] - exact) <= 1e-4 * (1 + std::abs(exact)));
        }
      EXPECT(y == run(ids, experts(other_way ? transposed : w2, other_way), 3));
    }
  }
}
