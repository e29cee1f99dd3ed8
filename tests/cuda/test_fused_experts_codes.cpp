// Experts of packed weights and rows rounded to int8 or e4m3 beside the CPU's: the codes are the same, and so are bits
// where nothing but integers comes to a sum.
#include <stdexcept>
#include <string>

#include "cuda/simt.h"
#include "quantized_experts.h"

using namespace moert;

namespace {

#if defined(MOERT_EMULATED) && !defined(MOERT_CUTLASS)
constexpr bool kIntegers = false;  // codes times scales are multiplied as float32
#else
constexpr bool kIntegers = true;
#endif

std::vector<Precision> precisions_of(const Packing& kind) {
  std::vector<Precision> all;
  for (const Precision p : kPrecisions)
    if (p != Precision::full && !is_on_cpu_alone(p) && takes(kind.format, p)) all.push_back(p);
  return all;
}

// The last bit of a value between the products may differ, by the order of a sum or within an activation, which makes
// another code of one that is between two: a step of 1 / 127, or 1 / 14 in
// e4m3, of the largest of a row, in one of its I terms.
constexpr double other_code(Precision p) { return p == Precision::fp8_group128 ? 0x1p-4 : 0x1p-6; }

bool rounds_alike(Act act) {
  return act == Act::identity || act == Act::relu || act == Act::relu2 || act == Act::reglu;
}

// Whether all rows are as close as sums are, but for one of 20 with another code.
template <typename X>
bool nearly_all_close(const std::vector<X>& y, const std::vector<X>& expected, int64_t width, double tolerance) {
  if (rows_close(y, expected, size_t(width), kUnit<X>)) return true;
  int64_t far = 0;
  for (auto a = y.begin(), b = expected.begin(); a != y.end(); a += width, b += width)
    far += !rows_close(std::vector<X>(a, a + width), std::vector<X>(b, b + width), size_t(width), kUnit<X>);
  return far * 20 <= int64_t(y.size()) / width && rows_close(y, expected, size_t(width), tolerance);
}

template <typename X>
void compare(const Packing& first, const Packing& second, const Case& c, Precision precision) {
  Random random{uint64_t(c.H * 7 + c.I + c.T + int64_t(first.format))};
  Experts<X> experts(first, second, c, is_gated(c.activation.act) ? 2 * c.I : c.I, random);
  const Inputs<X> in(c, random);
  const std::vector<X> y = on_device(c, experts, in.x, in.ids, in.weights, precision);
  const std::vector<X> expected = on_cpu(c, experts, in, precision);
  if (rounds_alike(c.activation.act))
    EXPECT(nearly_all_close(y, expected, c.H, other_code(precision)));
  else
    EXPECT(rows_close(y, expected, size_t(c.H), other_code(precision)));
  alone(c, experts, in, y, precision);
}

// One choice of weight 1: there is no sum but those of integers, and everything else is rounded once and alike.
template <typename X>
void same_bits(const Packing& kind, Case c) {
  if (!kIntegers) return;
  c.k = 1;
  Random random{uint64_t(c.H * 3 + c.I + c.T + int64_t(kind.format))};
  Experts<X> experts(kind, kind, c, is_gated(c.activation.act) ? 2 * c.I : c.I, random);
  Inputs<X> in(c, random);
  std::fill(in.weights.begin(), in.weights.end(), Acc<X>(1));
  const std::vector<X> y = on_device(c, experts, in.x, in.ids, in.weights, Precision::int8);
  const std::vector<X> expected = on_cpu(c, experts, in, Precision::int8);
  EXPECT(std::memcmp(y.data(), expected.data(), y.size() * sizeof(X)) == 0);
}

void every_format() {
  for (const Packing& kind : kKinds) {
    for (Precision precision : precisions_of(kind)) {
      compare<float>(kind, kind, {9, 2, 3, 97, 45, {Act::reglu}}, precision);
      compare<bf16>(kind, kind, {3, 2, 4, 64, 80, {Act::relu}}, precision);
      compare<f16>(kind, kind, {2, 1, 2, 33, 19, {Act::identity}}, precision);
      compare<float>(kind, kind, {45, 2, 4, 72, 41, {Act::relu2}}, precision);  // more than a tile of few rows
      compare<bf16>(kind, kind, {71, 1, 2, 40, 24, {Act::reglu}, true, ScaleOn::input, 1}, precision);
      compare<float>(kind, kind, {5, 2, 2, 40, 24, {Act::reglu}, false, ScaleOn::output, -1, 0, 1}, precision);
    }
  }
  // Longer than a step, and of two formats.
  for (int kind : {0, 4, 7, 9, 10, 13, 16})
    for (Precision precision : precisions_of(kKinds[kind])) {
      compare<bf16>(kKinds[kind], kKinds[kind], {2, 2, 2, 700, 40, {Act::reglu}}, precision);
      compare<float>(kKinds[kind == 16 ? 16 : 5], kKinds[kind], {1, 1, 2, 40, 700, {Act::reglu}}, precision);
    }
}

void every_activation() {
  for (Act act : {Act::identity, Act::silu, Act::gelu, Act::gelu_tanh, Act::relu, Act::relu2, Act::swiglu, Act::geglu,
                  Act::geglu_tanh, Act::reglu, Act::swiglu_clamped, Act::swiglu_oai})
    for (bool biases : {false, true}) {
      compare<float>(kKinds[4], kKinds[0], {3, 2, 5, 24, 17, {act, 1.702, 0.5}, biases}, Precision::int8);
      compare<bf16>(kKinds[7], kKinds[10], {3, 2, 5, 24, 17, {act, 1.702, 0.5}, biases, ScaleOn::input},
                    Precision::int8_group32);
      compare<float>(kKinds[16], kKinds[16], {3, 2, 5, 24, 17, {act, 1.702, 0.5}, biases}, Precision::fp8_group128);
    }
}

void edges() {
  for (const Packing& kind : {kKinds[0], kKinds[4], kKinds[13], kKinds[16]})
    for (Precision precision : precisions_of(kind)) {
      const auto check = [&](const Case& c) { compare<float>(kind, kind, c, precision); };
      check({13, 2, 3, 40, 24, {Act::reglu}, true, ScaleOn::output, 1});  // one expert has all
      check({2, 8, 8, 33, 24, {Act::reglu}});
      check({0, 2, 4, 16, 8});
      check({2, 0, 4, 16, 8});
      check({3, 2, 4, 16, 8, {Act::reglu}, true, ScaleOn::output, 4});  // every choice is dropped
      check({3, 2, 4, 16, 0});
    }
}

void bits() {
  for (int kind : {0, 10, 13})
    for (Act act : {Act::identity, Act::relu, Act::relu2, Act::reglu}) {
      same_bits<float>(kKinds[kind], {9, 1, 3, 297, 345, {act}});
      same_bits<bf16>(kKinds[kind], {40, 1, 2, 160, 136, {act}});
      same_bits<f16>(kKinds[kind], {3, 1, 2, 33, 700, {act}, false});
    }
}

// Rows of which one number is NaN, infinite, so small that all codes are 0, or large.
void numbers_at_the_end() {
  const Case c{6, 1, 1, 70, 20, {Act::relu}};
  for (const Packing& kind : {kKinds[0], kKinds[4], kKinds[13], kKinds[16]})
    for (Precision precision : precisions_of(kind)) {
      Random random{5};
      Experts<float> experts(kind, kind, c, c.I, random);
      Inputs<float> in(c, random);
      std::fill(in.ids.begin(), in.ids.end(), 0);
      const auto row = [&](int64_t t) { return in.x.data() + t * (c.H + c.pad); };
      row(0)[40] = NAN, row(1)[3] = INFINITY, row(2)[69] = -INFINITY;
      for (int64_t i = 0; i < c.H; ++i) row(3)[i] *= 0x1p-120f, row(4)[i] = 0;
      row(5)[64] = 0x1p100f;
      const std::vector<float> y = on_device(c, experts, in.x, in.ids, in.weights, precision);
      const std::vector<float> expected = on_cpu(c, experts, in, precision);
      EXPECT(rows_close(y, expected, size_t(c.H), other_code(precision)));
      for (int64_t i = 0; i < c.T * c.H; ++i) EXPECT(std::isnan(y[size_t(i)]) == (i < 3 * c.H));
    }
}

// What a call of these experts says.
template <typename X>
std::string refusal(Precision precision) {
  const Case c{2, 1, 2, 16, 8};
  Random random;
  Experts<X> experts(kKinds[0], kKinds[0], c, 2 * c.I, random);
  const Inputs<X> in(c, random);
  try {
    on_device(c, experts, in.x, in.ids, in.weights, precision);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void refusals() {
  const auto says = [](const std::string& said, const std::string& text) { return said.find(text) != text.npos; };
  EXPECT(says(refusal<double>(Precision::int8),
              "x must have dtype float32, bfloat16 or float16 for int8 rows, got float64"));
  for (const Precision p : kPrecisions)
    if (is_on_cpu_alone(p))
      EXPECT(says(refusal<float>(p), std::string("precision must not be ") + name(p) + " on a GPU, got it"));
}

void tests() {
  every_format();
  every_activation();
  edges();
  bits();
  numbers_at_the_end();
  refusals();
#if defined(MOERT_EMULATED) && defined(MOERT_CUTLASS)
  emulate::copies_at_once = true;
  edges();
  bits();
#endif
}

}  // namespace

int main() { return run_tests(tests); }
