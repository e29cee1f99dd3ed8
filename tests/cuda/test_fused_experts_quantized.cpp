// Experts of packed weights beside the CPU's, in full precision: every format, dtype, activation, bias and scale;
// forward, with the kernels over tensor cores where they are built, and backward.
#include "../cpp/expect.h"
#include "cuda/expert_tiles.h"
#include "cuda/packed_weights.h"
#include "quantized_experts.h"

using namespace moert;

namespace {

template <typename X>
void compare(const Packing& first, const Packing& second, const Case& c) {
  Random random{uint64_t(c.H * 7 + c.I + c.T + int64_t(first.format))};
  Experts<X> experts(first, second, c, is_gated(c.activation.act) ? 2 * c.I : c.I, random);
  const Inputs<X> in(c, random);
  const std::vector<X> y = on_device(c, experts, in.x, in.ids, in.weights);
  EXPECT(rows_close(y, on_cpu(c, experts, in, Precision::full), size_t(c.H), kUnit<X>));
  alone(c, experts, in, y, Precision::full);
}

template <typename X>
struct Gradients {
  std::vector<X> dx;
  std::vector<Acc<X>> dweights;
  bool operator==(const Gradients& other) const {
    const bool same = dx.empty() || std::memcmp(dx.data(), other.dx.data(), dx.size() * sizeof(X)) == 0;
    return same && dweights == other.dweights;
  }
};

template <typename X>
Gradients<X> gradients_on_device(const Case& c, Experts<X>& experts, const Inputs<X>& in, bool wants_x,
                                 bool wants_weights) {
  OnDevice<X> x(in.x), dy(in.dy), dx(std::vector<X>(size_t(c.T * c.H), rounded<X>(-7)));
  OnDevice<int32_t> ids(in.ids);
  OnDevice<Acc<X>> weights(in.weights), dweights(std::vector<Acc<X>>(size_t(c.T * c.k), -7));
  const RoutedRows tokens{c.T, c.k, {x.data(), DTypeOf<X>::value, c.H + c.pad}, ids.data(), weights.data()};
  const QuantizedExperts there{experts.w1.there(), experts.w2.there(),
                               experts.floats(c, experts.b1_there.data(), experts.b2_there.data())};
  ExpertGradients wanted;
  if (wants_x) wanted.dx = dx.data();
  if (wants_weights) wanted.dweights = dweights.data();
  OnDevice<char> workspace(
      std::vector<char>(size_t(cuda::fused_experts_quantized_backward_workspace(tokens, there, wanted)), char(0xff)));
  cuda::fused_experts_quantized_backward({dy.data(), DTypeOf<X>::value, c.H + c.pad}, tokens, there, workspace.data(),
                                         nullptr, wanted);
  return {dx.read(), dweights.read()};
}

// What lies between the products, and the weights, are rounded to X here and to float on the CPU: half a unit of the
// last place each, in the terms of choices that partly cancel.
template <typename X>
constexpr double kBackwardUnit = std::is_same_v<X, bf16>  ? 8 * 0x1p-8
                                 : std::is_same_v<X, f16> ? 8 * 0x1p-11
                                 : sizeof(X) == 4         ? 1e-5
                                                          : 1e-12;

template <typename X>
void compare_backward(const Packing& first, const Packing& second, const Case& c) {
  Random random{uint64_t(c.H * 5 + c.I + c.T + int64_t(first.format))};
  Experts<X> experts(first, second, c, is_gated(c.activation.act) ? 2 * c.I : c.I, random);
  const Inputs<X> in(c, random);
  Gradients<X> expected{std::vector<X>(size_t(c.T * c.H)), std::vector<Acc<X>>(size_t(c.T * c.k))};
  const DType dtype = DTypeOf<X>::value;
  cpu::fused_experts_quantized_backward(
      {in.dy.data(), dtype, c.H + c.pad},
      {c.T, c.k, {in.x.data(), dtype, c.H + c.pad}, in.ids.data(), in.weights.data()},
      {experts.w1.here.packed(), experts.w2.here.packed(), experts.floats(c, experts.b1.data(), experts.b2.data())}, 1,
      expected.dx.data(), expected.dweights.data());
  const Gradients<X> both = gradients_on_device(c, experts, in, true, true);
  EXPECT(rows_close(both.dx, expected.dx, size_t(c.H), kBackwardUnit<X>));
  EXPECT(rows_close(both.dweights, expected.dweights, size_t(c.T * c.k), kBackwardUnit<X>));
  EXPECT(gradients_on_device(c, experts, in, true, true) == both);
  // Each by itself, the other left as it was.
  const std::vector<X> no_x(both.dx.size(), rounded<X>(-7));
  const std::vector<Acc<X>> no_weights(both.dweights.size(), -7);
  EXPECT((gradients_on_device(c, experts, in, true, false) == Gradients<X>{both.dx, no_weights}));
  EXPECT((gradients_on_device(c, experts, in, false, true) == Gradients<X>{no_x, both.dweights}));
}

void every_gradient() {
  for (const Packing& kind : kKinds) {
    compare_backward<float>(kind, kind, {9, 2, 3, 97, 45});  // one expert a part in emulation
    compare_backward<bf16>(kind, kind, {5, 2, 4, 64, 80});
  }
  const Packing int4{Format::int4, 0, 0, 32}, int8{Format::int8, 0, 0, 0}, sub1{Format::sub1, 0, 0, 0};
  for (Act act : {Act::identity, Act::silu, Act::gelu, Act::gelu_tanh, Act::relu, Act::relu2, Act::swiglu, Act::geglu,
                  Act::geglu_tanh, Act::reglu, Act::swiglu_clamped, Act::swiglu_oai})
    for (ScaleOn scale_on : {ScaleOn::output, ScaleOn::input})
      compare_backward<float>(int4, int8, {4, 2, 5, 24, 17, {act, 1.702, 0.5}, scale_on == ScaleOn::output, scale_on});
  compare_backward<f16>(int8, int4, {7, 2, 5, 32, 40});
  compare_backward<double>(int4, sub1, {5, 2, 3, 45, 33});
  for (const Packing& kind : {int4, sub1}) {
    compare_backward<float>(kind, kind, {13, 2, 3, 40, 24, {}, true, ScaleOn::output, 1});  // one expert has all
    compare_backward<float>(kind, kind, {7, 8, 8, 33, 24, {}, true, ScaleOn::input});
    compare_backward<float>(kind, kind, {0, 2, 4, 16, 8});
    compare_backward<float>(kind, kind, {2, 0, 4, 16, 8});
    compare_backward<float>(kind, kind, {3, 2, 4, 16, 8, {}, true, ScaleOn::output, 4});  // every choice is dropped
    compare_backward<float>(kind, kind, {3, 2, 4, 16, 0});
    compare_backward<bf16>(kind, kind, {3, 2, 4, 16, 1});
  }
}

// Rows of many tokens, which tensor cores take by 64: more than one tile, a part of one, none.
template <typename X>
void many_rows() {
  for (const Packing& kind : kKinds) {
    compare<X>(kind, kind, {45, 2, 4, 72, 41});
    compare<X>(kind, kind, {71, 1, 2, 40, 24, {Act::gelu}, true, ScaleOn::input, 1});
  }
  compare<X>(kKinds[5], kKinds[0], {19, 2, 2, 700, 300, {Act::swiglu_oai, 1.702, 0.5}});
  compare<X>(kKinds[7], kKinds[4], {3, 2, 4, 16, 0});
  compare<X>(kKinds[16], kKinds[10], {0, 2, 4, 16, 8});
  compare<X>(kKinds[4], kKinds[7], {40, 2, 3, 16, 8, {}, true, ScaleOn::output, 3});  // every choice is dropped
}

void every_format() {
  for (const Packing& kind : kKinds) {
    compare<float>(kind, kind, {9, 2, 3, 97, 45});
    compare<bf16>(kind, kind, {3, 2, 4, 64, 80});
    compare<f16>(kind, kind, {2, 1, 2, 33, 19});
    compare<double>(kind, kind, {2, 2, 3, 45, 97});
    const size_t shift = kind.format == Format::sub1 ? 2 : 1;  // its codes are of two bytes
    compare<float>(kind, kind, {5, 2, 2, 40, 24, {}, false, ScaleOn::output, -1, 0, shift});
  }
  // Longer than a step of every format, and of two formats.
  for (const Packing& kind : {kKinds[0], kKinds[4], kKinds[7], kKinds[10], kKinds[13], kKinds[16], kKinds[18]}) {
    compare<bf16>(kind, kind, {2, 2, 2, 2700, 40});
    compare<float>(kKinds[4], kind, {1, 1, 2, 40, 2700});
  }
}

// Tables of the last expert's codewords that are wrong: the others are as they were, and nothing else is read.
template <typename X>
void wrong_tables() {
  const Packing sub1{Format::sub1, 0, 0, 0};
  const Case c{9, 2, 3, 150, 40};
  Random random{11};
  Experts<X> experts(sub1, sub1, c, 2 * c.I, random);
  Inputs<X> in(c, random);
  for (size_t t = 0; t < size_t(c.T); ++t) in.ids[2 * t] = int32_t(t % 2), in.ids[2 * t + 1] = t < 6 ? -1 : 2;
  const std::vector<X> expected = on_cpu(c, experts, in, Precision::full);
  const int64_t per_expert = 2 * c.I + 1;
  for (const int32_t wrong : {-1, INT32_MIN, INT32_MAX, 1 << 20}) {
    std::vector<uint8_t>& zeros = experts.w1.here.zeros;
    std::vector<int32_t> table(zeros.size() / 4);
    std::memcpy(table.data(), zeros.data(), zeros.size());
    for (int64_t n = 0; n < per_expert; n += 1 + n % 3) table[size_t(2 * per_expert + n)] = wrong;
    copy(experts.w1.zeros.data(), table.data(), zeros.size());
    std::vector<X> y = on_device(c, experts, in.x, in.ids, in.weights);
    y.resize(size_t(6 * c.H));
    const std::vector<X> wanted(expected.begin(), expected.begin() + 6 * c.H);
    EXPECT(rows_close(y, wanted, size_t(c.H), kUnit<X>));
  }
}

void every_choice() {
  const Packing int4{Format::int4, 0, 0, 32}, int8{Format::int8, 0, 0, 0};
  for (Act act : {Act::identity, Act::silu, Act::gelu, Act::gelu_tanh, Act::relu, Act::relu2, Act::swiglu, Act::geglu,
                  Act::geglu_tanh, Act::reglu, Act::swiglu_clamped, Act::swiglu_oai})
    for (bool biases : {false, true}) {
      compare<float>(int4, int8, {3, 2, 5, 24, 17, {act, 1.702, 0.5}, biases});
      compare<bf16>(int8, int4, {3, 2, 5, 24, 17, {act, 1.702, 0.5}, biases, ScaleOn::input});
    }
  for (const Packing& kind : {int4, kKinds[16], kKinds.back()}) {
    compare<float>(kind, kind, {13, 2, 3, 40, 24, {}, true, ScaleOn::output, 1});  // one expert has all
    compare<float>(kind, kind, {40, 3, 2, 33, 24, {}, true});                      // more slots than tiles
    compare<float>(kind, kind, {2, 8, 8, 33, 24, {}, true});
    compare<float>(kind, kind, {0, 2, 4, 16, 8});
    compare<float>(kind, kind, {2, 0, 4, 16, 8});
    compare<float>(kind, kind, {3, 2, 4, 16, 8, {}, true, ScaleOn::output, 4});  // every choice is dropped
    compare<float>(kind, kind, {3, 2, 4, 16, 0});
  }
}

// A row's columns there and back, and what the two searches for tiles find.
void orders_and_tiles() {
  for (int32_t width : {0, 16, 32, 64, 80})
    for (int64_t columns : {0, 1, 79, 2560, 2700}) {
      const cuda::ColumnOrder order{width};
      for (int64_t c = 0; c < columns; ++c) {
        EXPECT(order.position(c) < order.length(columns));
        EXPECT(order.column(order.position(c)) == c);
      }
    }
  using cuda::ColumnLie;
  for (const cuda::ColumnOrder order :
       {cuda::ColumnOrder{0, 128, ColumnLie::order}, cuda::ColumnOrder{0, 128, ColumnLie::fours},
        cuda::ColumnOrder{0, 128, ColumnLie::twos}, cuda::ColumnOrder{0, 128, ColumnLie::bits},
        cuda::ColumnOrder{0, 160, ColumnLie::trits}}) {
    std::vector<bool> taken(size_t(order.length(600)));
    for (int64_t c = 0; c < order.length(600); ++c) {
      const int64_t at = order.position(c);
      EXPECT(at / 32 * 32 / order.step == c / order.step && order.column(at) == c && !taken[size_t(at)]);
      taken[size_t(at)] = true;
    }
  }
  const std::vector<int32_t> offsets{0, 0, 5, 5, 6, 14, 14};
  const int32_t E = 6, S = 16, rows = 4;
  std::vector<std::vector<int32_t>> by_index, by_slot;
  const auto add = [&](auto& to, const cuda::RowTile& tile) {
    if (tile.rows > 0 && tile.expert < E) to.push_back({tile.expert, tile.row, tile.rows});
  };
  for (int32_t i = 0; i < cuda::num_row_tiles(S, E, rows); ++i)
    add(by_index, cuda::row_tile(offsets.data(), E, S, rows, i));
  for (int32_t s = 0; s < S; ++s) add(by_slot, cuda::row_tile_of_slot(offsets.data(), E, S, rows, s));
  EXPECT(by_index == by_slot && by_slot.size() == 5);
}

// What shorter ways to the value of a code give.
void codes() {
  for (uint32_t code = 0; code < 16; ++code) {
    const float value = e2m1_to_float(code), other = e2m1_to_float_with_subnormals(code);
    EXPECT(float_to_bits(value) == float_to_bits(other));
  }
  for (uint32_t code = 0; code < 256; ++code) {
    if ((code & 0x7f) == 0x7f) continue;
    EXPECT(float_to_bits(e4m3_to_float(uint8_t(code))) == float_to_bits(e4m3_to_float_with_subnormals(code)));
  }
}

void tests() {
  codes();
  orders_and_tiles();
  every_format();
  every_choice();
  wrong_tables<float>();
  wrong_tables<bf16>();
  many_rows<bf16>();
  many_rows<f16>();
  every_gradient();
#if defined(MOERT_EMULATED) && defined(MOERT_CUTLASS)
  emulate::copies_at_once = true;
  many_rows<bf16>();
#endif
}

}  // namespace

int main() { return run_tests(tests); }
