// Experts of packed weights on the host and on the device, for the tests of their kernels.
#pragma once

#include "../cpp/expect.h"
#include "../cpp/packed_matrix.h"
#include "memory.h"
#include "moert/fused_experts_quantized.h"
#include "random.h"

namespace moert {

struct Case {
  int64_t T, k, E, H, I;
  Activation activation{};
  bool biases = true;
  ScaleOn scale_on = ScaleOn::output;
  int64_t only = -1;  // every choice is this expert
  int64_t pad = 3;    // elements between the rows of x
  size_t shift = 0;   // bytes of the codes past an aligned address
};

inline const std::vector<Packing> kKinds = {{Format::int8, 0, 0, 0},
                                            {Format::int8, 0, 0, 32},
                                            {Format::int8, 0, 0, 64},
                                            {Format::int8, 0, 0, 128},
                                            {Format::int4, 0, 0, 32},
                                            {Format::int4, 0, 0, 64},
                                            {Format::int4, 0, 0, 128},
                                            {Format::mxfp4, 0, 0, 32},
                                            {Format::int4_asymmetric, 0, 0, 32},
                                            {Format::int4_asymmetric, 0, 0, 64},
                                            {Format::ternary2, 0, 0, 0},
                                            {Format::ternary2, 0, 0, 32},
                                            {Format::ternary2, 0, 0, 128},
                                            {Format::ternary5, 0, 0, 0},
                                            {Format::ternary5, 0, 0, 32},
                                            {Format::ternary5, 0, 0, 128},
                                            {Format::fp8, 0, 0, kFp8Block},
                                            {Format::bit_nested, 0, 0, 32, 3},
                                            {Format::bit_nested, 0, 0, 64, 4},
                                            {Format::bit_nested, 0, 0, 128, 8},
                                            {Format::bit_nested, 0, 0, 32, 1},
                                            {Format::bit_nested, 0, 0, 128, 2},
                                            {Format::bit_nested, 0, 0, 64, 6},
                                            {Format::sub1, 0, 0, 0}};

// A packed matrix on the host and on the device.
struct Both {
  Matrix here;
  OnDevice<uint8_t> codes, scales, zeros;

  Both(Packing kind, int64_t rows, int64_t columns, int64_t E, Random& random, size_t shift)
      : here(of(kind, rows, columns), E, numbers<float>(random, size_t(E * rows * columns))),
        codes(here.codes, shift),
        scales(here.scales),
        zeros(here.zeros) {}

  static Packing of(Packing kind, int64_t rows, int64_t columns) {
    kind.rows = rows, kind.columns = columns;
    return kind;
  }
  PackedMatrix there() { return here.packed(codes.data(), scales.data(), zeros.data()); }
};

template <typename X>
struct Experts {
  Both w1, w2;
  std::vector<X> b1, b2;
  OnDevice<X> b1_there, b2_there;

  Experts(const Packing& first, const Packing& second, const Case& c, int64_t width, Random& random)
      : w1(first, width, c.H, c.E, random, c.shift),
        w2(second, c.H, c.I, c.E, random, c.shift),
        b1(numbers<X>(random, size_t(c.E * width))),
        b2(numbers<X>(random, size_t(c.E * c.H))),
        b1_there(b1),
        b2_there(b2) {}

  ExpertWeights floats(const Case& c, const X* first, const X* second) const {
    ExpertWeights w{};
    w.E = c.E, w.H = c.H, w.I = c.I, w.activation = c.activation, w.scale_on = c.scale_on;
    if (!c.biases) return w;
    const int64_t width = is_gated(c.activation.act) ? 2 * c.I : c.I;
    w.gate_bias = {first, DTypeOf<X>::value, width};
    if (width > c.I) w.up_bias = {first + c.I, DTypeOf<X>::value, width};
    w.down_bias = {second, DTypeOf<X>::value, c.H};
    return w;
  }
};

// What a call is given.
template <typename X>
struct Inputs {
  std::vector<X> x, dy;
  std::vector<Acc<X>> weights;
  std::vector<int32_t> ids;

  Inputs(const Case& c, Random& random)
      : x(numbers<X>(random, size_t(c.T * (c.H + c.pad)))),
        dy(numbers<X>(random, size_t(c.T * (c.H + c.pad)))),
        weights(numbers<Acc<X>>(random, size_t(c.T * c.k))),
        ids(size_t(c.T * c.k)) {
    for (int32_t& id : ids) id = random.below(6) ? int32_t(random.below(c.E)) : random.below(2) ? -1 : int32_t(c.E);
    if (c.only >= 0) std::fill(ids.begin(), ids.end(), int32_t(c.only));
  }
};

template <typename X>
std::vector<X> on_device(const Case& c, Experts<X>& experts, const std::vector<X>& x, const std::vector<int32_t>& ids,
                         const std::vector<Acc<X>>& weights, Precision precision = Precision::full) {
  OnDevice<X> x_there(x), y(std::vector<X>(size_t(c.T * c.H), rounded<X>(-7)));
  OnDevice<int32_t> ids_there(ids);
  OnDevice<Acc<X>> weights_there(weights);
  const RoutedRows tokens{
      c.T, c.k, {x_there.data(), DTypeOf<X>::value, c.H + c.pad}, ids_there.data(), weights_there.data()};
  const QuantizedExperts there{experts.w1.there(), experts.w2.there(),
                               experts.floats(c, experts.b1_there.data(), experts.b2_there.data())};
  // All bits set are a NaN of every type: what is read before it is written shows.
  OnDevice<char> workspace(
      std::vector<char>(size_t(cuda::fused_experts_quantized_workspace(tokens, there, precision)), char(0xff)));
  cuda::fused_experts_quantized(tokens, there, precision, workspace.data(), nullptr, y.data());
  return y.read();
}

template <typename X>
std::vector<X> on_cpu(const Case& c, const Experts<X>& experts, const Inputs<X>& in, Precision precision) {
  std::vector<X> y(size_t(c.T * c.H), rounded<X>(-7));
  const RoutedRows tokens{c.T, c.k, {in.x.data(), DTypeOf<X>::value, c.H + c.pad}, in.ids.data(), in.weights.data()};
  const QuantizedExperts here{experts.w1.here.packed(), experts.w2.here.packed(),
                              experts.floats(c, experts.b1.data(), experts.b2.data())};
  cpu::fused_experts_quantized(tokens, here, precision, 1, y.data());
  return y;
}

// Each of the first tokens by itself has the bits that it has in y, among others.
template <typename X>
void alone(Case c, Experts<X>& experts, const Inputs<X>& in, const std::vector<X>& y, Precision precision) {
  const int64_t T = c.T;
  c.T = 1;
  for (int64_t t = 0; t < std::min<int64_t>(T, 3); ++t) {
    const auto part = [&](const auto& v, int64_t width) {
      return std::remove_cvref_t<decltype(v)>(v.begin() + t * width, v.begin() + (t + 1) * width);
    };
    const std::vector<X> one =
        on_device(c, experts, part(in.x, c.H + c.pad), part(in.ids, c.k), part(in.weights, c.k), precision);
    EXPECT(c.H == 0 || std::memcmp(one.data(), y.data() + t * c.H, size_t(c.H) * sizeof(X)) == 0);
  }
}

}  // namespace moert
