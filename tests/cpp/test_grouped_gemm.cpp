#include "moert/grouped_gemm.h"

#include <cmath>
#include <vector>

#include "expect.h"

using namespace moert;

// Small integers: every product and sum is exact in float32, so the result has one right value.
std::vector<float> integers(int64_t n, uint32_t seed) {
  std::vector<float> x(n);
  for (auto& value : x) value = float(int32_t((seed = seed * 1664525u + 1013904223u) >> 24) % 7 - 3);
  return x;
}

const int32_t kOffsets[] = {0, 3, 3, 20, 21};  // expert 1 is empty; slots 21 and 22 are not in use
const int64_t S = 23, E = 4;

// bias and scale on either side, gathered rows, both weight layouts, sizes that no vector length divides.
void forward(int64_t N, int64_t K, bool transposed, ScaleOn scale_on, int64_t threads) {
  const int64_t T = 9;
  const auto x = integers(T * K, 1), w = integers(E * N * K, 2), bias = integers(E * N, 3), scale = integers(S, 4);
  std::vector<int32_t> tokens(S, -1);
  for (int64_t s = 0; s < kOffsets[E]; ++s) tokens[s] = int32_t(s * 5 % T);
  const ExpertMatrix matrix{w.data(), DType::f32, N * K, transposed ? 1 : K, transposed ? N : 1};
  std::vector<float> y(S * N, NAN);
  cpu::grouped_gemm({S,
                     E,
                     N,
                     K,
                     kOffsets,
                     {x.data(), DType::f32, K, tokens.data()},
                     matrix,
                     {bias.data(), DType::f32, N},
                     scale.data(),
                     scale_on},
                    threads, y.data(), N);
  for (int64_t e = 0; e < E; ++e)
    for (int64_t s = kOffsets[e]; s < kOffsets[e + 1]; ++s)
      for (int64_t n = 0; n < N; ++n) {
        float dot = 0;
        for (int64_t c = 0; c < K; ++c)
          dot += x[tokens[s] * K + c] * w[e * N * K + n * matrix.row_stride + c * matrix.col_stride];
        const float b = bias[e * N + n];
        EXPECT(y[s * N + n] == (scale_on == ScaleOn::input ? dot * scale[s] + b : (dot + b) * scale[s]));
      }
  for (int64_t i = kOffsets[E] * N; i < S * N; ++i) EXPECT(y[i] == 0);
}

void wgrad(int64_t N, int64_t K, int64_t threads) {
  const auto dy = integers(S * N, 5), x = integers(S * K, 6);
  std::vector<float> dw(E * N * K, NAN);
  GroupedGemmWgrad product{S, E, N, K, kOffsets, {dy.data(), DType::f32, N}, {x.data(), DType::f32, K}};
  cpu::grouped_gemm_wgrad(product, threads, {dw.data(), DType::f32, N * K, K, 1});
  for (int64_t e = 0; e < E; ++e)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t c = 0; c < K; ++c) {
        float sum = 0;
        for (int64_t s = kOffsets[e]; s < kOffsets[e + 1]; ++s) sum += dy[s * N + n] * x[s * K + c];
        EXPECT(dw[e * N * K + n * K + c] == sum);
      }

  product.accumulate = true;
  for (const bool swap : {false, true}) {  // dw [E, N, K], or [E, K, N], and every second element of another's
    std::vector<float> onto(2 * E * N * K, -0.0f);
    const ExpertMatrix to{onto.data(), DType::f32, 2 * N * K, swap ? 2 : 2 * K, swap ? 2 * N : 2};
    for (int step = 0; step < 2; ++step) cpu::grouped_gemm_wgrad(product, threads, to);
    for (int64_t e = 0; e < E; ++e)
      for (int64_t n = 0; n < N; ++n)
        for (int64_t c = 0; c < K; ++c) {
          const float* at = onto.data() + e * 2 * N * K + n * to.row_stride + c * to.col_stride;
          EXPECT(at[0] == 2 * dw[e * N * K + n * K + c] && std::signbit(at[1]));
          if (kOffsets[e] == kOffsets[e + 1]) EXPECT(std::signbit(at[0]));  // as it was
        }
  }
}

int main() {
  for (int64_t threads : {1, 3})
    for (auto [N, K] : {std::pair<int64_t, int64_t>{1, 1}, {17, 33}, {70, 129}}) {
      for (bool transposed : {false, true})
        for (ScaleOn scale_on : {ScaleOn::output, ScaleOn::input}) forward(N, K, transposed, scale_on, threads);
      wgrad(N, K, threads);
    }
}
