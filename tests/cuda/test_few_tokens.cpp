// Experts for a few tokens beside the CPU's: every activation, layout, bias and scale.
#include "cuda/few_tokens.h"

#include "../cpp/expect.h"
#include "memory.h"
#include "random.h"

using namespace moert;

namespace {

struct Case {
  int64_t T, k, E, H, I;
  Activation activation;
  bool transposed, interleaved, biases;
  ScaleOn scale_on = ScaleOn::output;
  size_t shift = 0;  // of the weights past an aligned address
};

// w [E, R, C], or [E, C, R] where transposed.
template <typename X>
ExpertMatrix matrix(X* data, int64_t rows, int64_t columns, bool transposed) {
  const int64_t row = transposed ? 1 : columns, column = transposed ? rows : 1;
  return {data, DTypeOf<X>::value, rows * columns, row, column};
}

template <typename X>
ExpertWeights experts_of(const Case& c, X* w1, X* w2, X* b1, X* b2) {
  const bool gated = is_gated(c.activation.act), alternate = gated && c.interleaved;
  const int64_t width = gated ? 2 * c.I : c.I;
  ExpertWeights w{};
  w.E = c.E, w.H = c.H, w.I = c.I;
  w.gate = matrix(w1, width, c.H, c.transposed);
  if (gated) w.up = w.gate, w.up.data = w1 + (alternate ? 1 : c.I) * w.gate.row_stride;
  if (alternate) w.gate.row_stride = w.up.row_stride = 2 * w.gate.row_stride;
  w.down = matrix(w2, c.H, c.I, c.transposed);
  w.bias1_stride = alternate ? 2 : 1;
  if (c.biases) {
    w.gate_bias = {b1, DTypeOf<X>::value, width};
    if (gated) w.up_bias = {b1 + (alternate ? 1 : c.I), DTypeOf<X>::value, width};
    w.down_bias = {b2, DTypeOf<X>::value, c.H};
  }
  w.activation = c.activation;
  w.scale_on = c.scale_on;
  return w;
}

template <typename X>
void compare(const Case& c) {
  const int64_t width = is_gated(c.activation.act) ? 2 * c.I : c.I;
  Random random{uint64_t(c.H * 7 + c.I + c.T)};
  const auto w1 = numbers<X>(random, size_t(c.E * width * c.H), 0.5), w2 = numbers<X>(random, size_t(c.E * c.H * c.I));
  const auto b1 = numbers<X>(random, size_t(c.E * width)), b2 = numbers<X>(random, size_t(c.E * c.H));
  const auto x = numbers<X>(random, size_t(c.T * (c.H + 8)));
  const auto weights = numbers<Acc<X>>(random, size_t(c.T * c.k)), gains = numbers<Acc<X>>(random, size_t(c.T * c.E));
  std::vector<int32_t> ids(size_t((c.T + 1) * c.k));  // union_experts has a list where there is no token, too
  for (int32_t& id : ids) id = random.below(6) ? int32_t(random.below(c.E)) : random.below(2) ? -1 : int32_t(c.E);
  OnDevice<X> w1_there(w1, c.shift), w2_there(w2, c.shift), b1_there(b1), b2_there(b2), x_there(x);
  OnDevice<Acc<X>> weights_there(weights), gains_there(gains);
  OnDevice<int32_t> ids_there(ids);
  std::vector<X> y(size_t(c.T * c.H), rounded<X>(-7));
  const auto mine = [](const auto& v) { return const_cast<X*>(v.data()); };
  const ExpertWeights here = experts_of<X>(c, mine(w1), mine(w2), mine(b1), mine(b2));
  const ExpertWeights there = experts_of<X>(c, w1_there.data(), w2_there.data(), b1_there.data(), b2_there.data());
  const moert::Rows rows{x.data(), DTypeOf<X>::value, c.H + 8}, rows_there{x_there.data(), DTypeOf<X>::value, c.H + 8};

  OnDevice<X> y_there(y);
  OnDevice<char> workspace(
      std::vector<char>(size_t(cuda::few_tokens_workspace(DTypeOf<X>::value, c.T * c.k, c.I)), char(0xff)));
  cpu::fused_experts({c.T, c.k, rows, ids.data(), weights.data()}, here, 1, y.data(), nullptr);
  cuda::fused_experts_few({c.T, c.k, rows_there, ids_there.data(), weights_there.data()}, there, workspace.data(),
                          nullptr, y_there.data());
  EXPECT(rows_close(y_there.read(), y, size_t(c.H), kUnit<X>));

  if (c.scale_on == ScaleOn::input) return;
  cpu::union_experts({c.T, c.k, rows, gains.data(), ids.data()}, here, 1, y.data());
  cuda::union_experts({c.T, c.k, rows_there, gains_there.data(), ids_there.data()}, there, workspace.data(), nullptr,
                      y_there.data());
  EXPECT(rows_close(y_there.read(), y, size_t(c.H), kUnit<X>));
}

template <typename X>
void every_layout(Case c) {
  for (bool transposed : {false, true})
    for (bool interleaved : {false, true})
      for (size_t shift : {0, 1}) {
        c.transposed = transposed, c.interleaved = interleaved, c.shift = shift;
        compare<X>(c);
      }
}

void tests() {
  for (Act act : {Act::identity, Act::silu, Act::gelu, Act::gelu_tanh, Act::relu, Act::relu2, Act::swiglu, Act::geglu,
                  Act::geglu_tanh, Act::reglu, Act::swiglu_clamped, Act::swiglu_oai})
    for (bool biases : {false, true}) {
      every_layout<float>({2, 3, 5, 24, 16, {act, 1.702, 0.5}, false, false, biases});
      every_layout<bf16>({1, 2, 4, 24, 16, {act, 1.702, 0.5}, false, false, biases});
    }
  // Longer than one step of every loop; nothing a multiple of the vector; nothing at all.
  every_layout<bf16>({1, 2, 3, 2056, 72, {}, false, false, true});
  every_layout<f16>({4, 2, 3, 264, 1032, {}, false, false, true});
  every_layout<float>({1, 3, 7, 33, 19, {}, false, false, true});
  every_layout<double>({3, 2, 4, 18, 20, {Act::swiglu_oai}, false, false, true});
  every_layout<float>({2, 4, 4, 40, 24, {Act::geglu}, false, false, true, ScaleOn::input});
  every_layout<bf16>({2, 4, 4, 40, 24, {}, false, false, false, ScaleOn::input});
  every_layout<float>({2, 0, 4, 16, 8, {}, false, false, true});
  every_layout<float>({0, 2, 4, 16, 8, {}, false, false, true});
}

}  // namespace

int main() { return run_tests(tests); }
