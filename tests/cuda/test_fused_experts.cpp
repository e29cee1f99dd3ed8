#include "moert/fused_experts.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../cpp/expect.h"
#include "cuda/epilogue.h"
#include "memory.h"
#include "moert/permute.h"
#include "random.h"

#if defined(MOERT_EMULATED)
#include "cuda/emulate.h"
#endif

using namespace moert;

namespace {

constexpr Act kActs[] = {Act::identity,   Act::silu,  Act::gelu,           Act::gelu_tanh,
                         Act::relu,       Act::relu2, Act::swiglu,         Act::geglu,
                         Act::geglu_tanh, Act::reglu, Act::swiglu_clamped, Act::swiglu_oai};

// What is added to y beside the choices.
enum class Added { nothing, rows, all };

struct Case {
  int64_t T, k, E, H, I;
  Act act;
  bool transposed = false, alternate = false, bias = false;
  ScaleOn scale_on = ScaleOn::output;
  bool tf32 = false;
  int64_t apart = 0;  // elements between the rows of x and of dy
  Added added = Added::nothing;
  int64_t spare = -1;  // slots more than choices, of a plan that is given; -1: none is
  bool fused_combine = false;
};

template <typename T>
using Values = std::vector<T>;

// All that an expert FFN is given, as vectors.
template <typename T>
struct Problem {
  using A = Acc<T>;
  Case c;
  int64_t width, stride;
  Values<T> x, w1, w2, b1, b2, dy, constants;
  Values<A> weights, scale, mix;
  Values<int32_t> ids, offsets, slot_tokens, slots;

  explicit Problem(const Case& c) : c(c), width(is_gated(c.act) ? 2 * c.I : c.I), stride(c.H + c.apart) {
    Random random;
    x = numbers<T>(random, c.T * stride);
    w1 = numbers<T>(random, c.E * width * c.H, 2 / std::sqrt(double(c.H)));
    w2 = numbers<T>(random, c.E * c.H * c.I, 2 / std::sqrt(double(c.I)));
    b1 = numbers<T>(random, c.E * width);
    b2 = numbers<T>(random, c.E * c.H);
    dy = numbers<T>(random, c.T * stride);
    weights = numbers<A>(random, c.T * c.k);
    for (int64_t i = 0; i < c.T * c.k; ++i) {  // nobody chooses expert 1; E and what is negative is dropped
      const auto e = int32_t(random.below(c.E + 1));
      ids.push_back(e == 1 ? -1 - int32_t(i) : e);
    }
    constants = numbers<T>(random, kConstants * c.H);
    scale = numbers<A>(random, c.T), mix = numbers<A>(random, c.T * kConstants);
    if (c.spare < 0) return;
    offsets.resize(c.E + 1), slot_tokens.resize(c.T * c.k), slots.resize(c.T * c.k);
    cpu::permute_plan(ids.data(), c.T, c.k, c.E, -1, 1, offsets.data(), slot_tokens.data(), slots.data());
    slot_tokens.resize(c.T * c.k + c.spare, -1);
  }

  static constexpr int64_t kConstants = 3;

  int64_t num_slots() const { return c.T * c.k + std::max<int64_t>(c.spare, 0); }

  // What else tokens are given: rows in the place of x.
  void add_to(RoutedRows& tokens, const T* rows, const A* scale, const A* mix, const T* constants) const {
    if (c.added == Added::nothing) return;
    tokens.onto.rows = {rows, kType, stride};
    if (c.added == Added::all) tokens.onto.scale = scale;
    if (c.added == Added::all) tokens.onto.C = kConstants, tokens.onto.mix = mix, tokens.onto.constants = constants;
  }

  void give_plan(RoutedRows& tokens, const int32_t* offsets, const int32_t* slot_tokens, const int32_t* slots) const {
    if (c.spare >= 0)
      tokens.offsets = offsets, tokens.tokens = slot_tokens, tokens.slots = slots, tokens.S = num_slots();
  }

  static constexpr DType kType = DTypeOf<T>::value;

  // W is T, or the type that gradients are added in.
  template <typename W>
  ExpertMatrix half(const W* w, bool up) const {
    const int64_t row = c.transposed ? 1 : c.H, column = c.transposed ? width : 1;
    const int64_t apart = c.alternate ? row : c.I * row;
    return {w + (up ? apart : 0), DTypeOf<W>::value, width * c.H, c.alternate ? 2 * row : row, column};
  }

  template <typename W>
  ExpertMatrix down(const W* w) const {
    return {w, DTypeOf<W>::value, c.H * c.I, c.transposed ? 1 : c.I, c.transposed ? c.H : 1};
  }

  template <typename W>
  ExpertVector half_bias(const W* b, bool up) const {
    return {b + (up ? (c.alternate ? 1 : c.I) : 0), DTypeOf<W>::value, width};
  }

  ExpertWeights experts(const T* w1, const T* w2, const T* b1, const T* b2) const {
    ExpertWeights w{};
    const bool gated = is_gated(c.act);
    w.E = c.E, w.H = c.H, w.I = c.I;
    w.gate = half(w1, false), w.down = down(w2);
    if (gated) w.up = half(w1, true);
    if (c.bias) {
      w.gate_bias = half_bias(b1, false), w.down_bias = {b2, kType, c.H};
      if (gated) w.up_bias = half_bias(b1, true);
    }
    w.bias1_stride = c.alternate ? 2 : 1;
    // Rounded to 16 bits, a pre-activation may fall on either side of a limit among them, and its gradient with it.
    w.activation = {c.act, 1.702, sizeof(T) == 2 ? 50 : 0.5};
    w.scale_on = c.scale_on;
    return w;
  }

  RoutedRows tokens(const T* x, const int32_t* ids, const A* weights) const {
    RoutedRows rows{c.T, c.k, {x, kType, stride}, ids, weights};
    rows.tf32 = c.tf32, rows.fused_combine = c.fused_combine;
    return rows;
  }

  template <typename W>
  ExpertGradients gradients(T* dx, A* dweights, W* dw1, W* dw2, W* db1, W* db2) const {
    ExpertGradients g{};
    const bool gated = is_gated(c.act);
    g.dx = dx, g.dweights = dweights;
    g.dgate = half(dw1, false), g.ddown = down(dw2);
    if (gated) g.dup = half(dw1, true);
    if (c.bias) {
      g.dgate_bias = half_bias(db1, false), g.ddown_bias = {db2, DTypeOf<W>::value, c.H};
      if (gated) g.dup_bias = half_bias(db1, true);
    }
    return g;
  }
};

template <typename T>
Values<T> nan(int64_t n) {
  return Values<T>(n, cuda::narrow<T>(NAN));
}

// Results of a forward and a backward; the gradients of weights and biases in W.
template <typename T, typename W>
struct Results {
  Values<T> y, h, dx;
  Values<Acc<T>> dweights;
  Values<W> dw1, dw2, db1, db2;
};

// What results are before: NaN, or, for the gradients of weights and biases, what they are added to.
template <typename T, typename W>
Results<T, W> at_first(const Problem<T>& p, bool accumulate) {
  const Case& c = p.c;
  Random random{7};
  const auto start = [&](int64_t n) { return accumulate ? numbers<W>(random, n) : nan<W>(n); };
  return {nan<T>(c.T * c.H),          nan<T>(p.num_slots() * p.width), nan<T>(c.T * c.H),    nan<Acc<T>>(c.T * c.k),
          start(c.E * p.width * c.H), start(c.E * c.H * c.I),          start(c.E * p.width), start(c.E * c.H)};
}

template <typename T, typename W>
Results<T, W> on_cpu(const Problem<T>& p, bool accumulate) {
  Results<T, W> r = at_first<T, W>(p, accumulate);
  auto tokens = p.tokens(p.x.data(), p.ids.data(), p.weights.data());
  p.add_to(tokens, p.dy.data(), p.scale.data(), p.mix.data(), p.constants.data());
  p.give_plan(tokens, p.offsets.data(), p.slot_tokens.data(), p.slots.data());
  const auto experts = p.experts(p.w1.data(), p.w2.data(), p.b1.data(), p.b2.data());
  cpu::fused_experts(tokens, experts, 1, r.y.data(), r.h.data());
  auto gradients = p.gradients(r.dx.data(), r.dweights.data(), r.dw1.data(), r.dw2.data(), r.db1.data(), r.db2.data());
  gradients.accumulate = {accumulate, accumulate, accumulate, accumulate};
  cpu::fused_experts_backward({p.dy.data(), p.kType, p.stride}, tokens, experts, nullptr, 1, gradients);
  return r;
}

template <typename T, typename W>
Results<T, W> on_device(const Problem<T>& p, bool saved, bool accumulate) {
  using A = Acc<T>;
  const Results<T, W> start = at_first<T, W>(p, accumulate);
  OnDevice<T> x(p.x), w1(p.w1), w2(p.w2), b1(p.b1), b2(p.b2), dy(p.dy), constants(p.constants);
  OnDevice<A> weights(p.weights), dweights(start.dweights), scale(p.scale), mix(p.mix);
  OnDevice<int32_t> ids(p.ids), offsets(p.offsets), slot_tokens(p.slot_tokens), slots(p.slots);
  OnDevice<T> y(start.y), h(start.h), dx(start.dx);
  OnDevice<W> dw1(start.dw1), dw2(start.dw2), db1(start.db1), db2(start.db2);
  auto tokens = p.tokens(x.data(), ids.data(), weights.data());
  p.add_to(tokens, dy.data(), scale.data(), mix.data(), constants.data());
  p.give_plan(tokens, offsets.data(), slot_tokens.data(), slots.data());
  const auto experts = p.experts(w1.data(), w2.data(), b1.data(), b2.data());
  auto gradients = p.gradients(dx.data(), dweights.data(), dw1.data(), dw2.data(), db1.data(), db2.data());
  gradients.accumulate = {accumulate, accumulate, accumulate, accumulate};
  const auto memory = [](int64_t bytes) { return OnDevice<uint8_t>(Values<uint8_t>(bytes, 0xff)); };
  auto forward = memory(cuda::fused_experts_workspace(tokens, experts, saved));
  cuda::fused_experts(tokens, experts, forward.data(), nullptr, y.data(), saved ? h.data() : nullptr);
  auto backward = memory(cuda::fused_experts_backward_workspace(tokens, experts, saved, gradients));
  cuda::fused_experts_backward({dy.data(), p.kType, p.stride}, tokens, experts, saved ? h.data() : nullptr,
                               backward.data(), nullptr, gradients);
  return {y.read(), h.read(), dx.read(), dweights.read(), dw1.read(), dw2.read(), db1.read(), db2.read()};
}

// What lies between the products is rounded to T here and to float on the CPU: three times on the way to dx, half a
// unit of the last place each, in the terms of choices that partly cancel.
template <typename T>
double tolerance(const Case& c) {
  if (c.tf32) return 8 * 0x1p-11;  // every factor is rounded
  return std::is_same_v<T, bf16> ? 8 * 0x1p-8 : std::is_same_v<T, f16> ? 8 * 0x1p-11 : sizeof(T) == 4 ? 1e-5 : 1e-12;
}

template <typename T, typename W = T>
void check(const Case& c, bool accumulate = false) {
  const Problem<T> p(c);
  const double most = tolerance<T>(c);
  const auto want = on_cpu<T, W>(p, accumulate);
  const auto got = on_device<T, W>(p, true, accumulate), again = on_device<T, W>(p, false, accumulate);
  EXPECT(rows_close(again.y, want.y, c.H, most));
  EXPECT(rows_close(got.y, want.y, c.H, most));
  EXPECT(rows_close(got.h, want.h, p.width, most));
  EXPECT(rows_close(got.dx, want.dx, c.H, most));
  EXPECT(rows_close(got.dweights, want.dweights, c.T * c.k, most));
  EXPECT(rows_close(got.dw1, want.dw1, c.transposed ? p.width : c.H, most));
  EXPECT(rows_close(got.dw2, want.dw2, c.transposed ? c.H : c.I, most));
  if (c.bias) {
    EXPECT(rows_close(got.db1, want.db1, p.width, most));
    EXPECT(rows_close(got.db2, want.db2, c.H, most));
  }
  // What is computed again has the bits of what was saved, and everything has the same in every run.
  EXPECT(equal_bits(got.dx, again.dx) && equal_bits(got.dweights, again.dweights));
  EXPECT(equal_bits(got.dw1, again.dw1) && equal_bits(got.dw2, again.dw2));
  EXPECT(equal_bits(got.db1, again.db1) && equal_bits(got.db2, again.db2));
  if (!accumulate) return;
  const auto start = at_first<T, W>(p, true);  // which the expert that nobody chose keeps
  const auto kept = [&](const Values<W>& a, const Values<W>& b, int64_t n) {
    return c.E < 2 || equal_bits(Values<W>(&a[n], &a[n] + n), Values<W>(&b[n], &b[n] + n));
  };
  EXPECT(kept(got.dw1, start.dw1, p.width * c.H) && kept(got.dw2, start.dw2, c.H * c.I));
  EXPECT(kept(got.db1, start.db1, p.width) && kept(got.db2, start.db2, c.H));
}

// The same gradients, in the type of sums, onto what is there.
template <typename T>
void check_added(const Case& c) {
  check<T, Acc<T>>(c, true);
}

// What is added to the choices, and a plan that is known: as the CPU has them, and of a plan the bits of one that is
// made here.
template <typename T>
void check_given(Case c) {
  for (const Added added : {Added::nothing, Added::rows, Added::all}) {
    c.added = added, c.spare = -1;
    const auto own = on_device<T, T>(Problem<T>(c), true, false);
    for (const int64_t spare : {0, 7}) {
      c.spare = spare;
      check<T>(c);
      const auto given = on_device<T, T>(Problem<T>(c), true, false);
      EXPECT(equal_bits(given.y, own.y) && equal_bits(given.dx, own.dx) && equal_bits(given.dweights, own.dweights));
      EXPECT(equal_bits(given.dw1, own.dw1) && equal_bits(given.dw2, own.dw2));
    }
  }
}

// A plan of anything: nothing is read or written that is not given, which compute-sanitizer and the host see.
template <typename T>
void check_wild_plan(const Case& c) {
  Problem<T> p(c);
  Random random{5};
  const auto wild = [&](Values<int32_t>& values) {
    for (int32_t& value : values) value = int32_t(random.bits()) >> random.below(32);
  };
  for (int round = 0; round < 4; ++round) {
    wild(p.offsets), wild(p.slot_tokens), wild(p.slots);
    for (const bool saved : {false, true}) {
      const auto results = on_device<T, T>(p, saved, false);
      EXPECT(results.y.size() == size_t(c.T * c.H));
    }
  }
}

void test_given() {
  check_given<float>({13, 2, 3, 24, 16, Act::swiglu, false, false, true});
  check_given<bf16>({40, 3, 4, 72, 40, Act::swiglu, true, true, true});
  check_given<f16>({9, 2, 3, 21, 11, Act::relu, false, false, true, ScaleOn::input, false, 3});
  check_given<double>({9, 2, 3, 20, 11, Act::geglu, false, false, true});
  check_given<bf16>({3, 2, 3, 72, 40, Act::swiglu, false, false, true});  // few tokens, which are not sorted
  check_given<float>({0, 2, 3, 8, 8, Act::swiglu});
  check_wild_plan<float>({13, 2, 3, 24, 16, Act::swiglu, false, false, true, ScaleOn::input, false, 0, {}, 3});
  check_wild_plan<bf16>({40, 3, 4, 72, 40, Act::swiglu, false, false, true, ScaleOn::output, false, 0, {}, 3});
}

// Rows added to their tokens' sums by the second product, where no backward follows.
void test_fused_combine() {
  const auto adding = [](Case c) {
    c.fused_combine = true;
    return c;
  };
  for (const ScaleOn scale_on : {ScaleOn::output, ScaleOn::input}) {
    check<float>(adding({13, 2, 3, 21, 16, Act::swiglu, false, false, true, scale_on}));
    check<double>(adding({13, 2, 3, 24, 16, Act::swiglu, true, false, true, scale_on}));
    check<bf16>(adding({70, 3, 4, 72, 40, Act::swiglu, false, false, true, scale_on}));
    check<f16>(adding({70, 3, 4, 72, 40, Act::swiglu_oai, true, true, true, scale_on}));
    check<float>(adding({70, 2, 3, 72, 40, Act::relu, false, false, true, scale_on, true}));
  }
  check_given<bf16>(adding({40, 3, 4, 72, 40, Act::swiglu, true, true, true}));
  check_given<float>(adding({9, 2, 3, 21, 11, Act::relu, false, false, true, ScaleOn::input, false, 3}));
  check_wild_plan<bf16>(adding({40, 3, 4, 72, 40, Act::swiglu, false, false, true, ScaleOn::output, false, 0, {}, 3}));
}

// Between the products lie the gradient of the pre-activations, and one after the other the activation and dx's rows.
void check_memory(const Case& c) {
  const Problem<bf16> p(c);
  const auto tokens = p.tokens(nullptr, nullptr, nullptr);
  const auto experts = p.experts(p.w1.data(), p.w2.data(), p.b1.data(), p.b2.data());
  bf16 some{};
  float number = 0;
  const auto gradients = p.gradients(&some, &number, &some, &some, &some, &some);
  const int64_t slots = c.T * c.k, between = slots * (p.width + std::max(c.H, c.I)) * 2;
  const int64_t routing = slots * (4 * 4 + 4 * ((c.I + 63) / 64)) + (64 << 10);
  EXPECT(cuda::fused_experts_backward_workspace(tokens, experts, true, gradients) <=
         between + routing + cuda::grouped_gemm_workspace(c.E));
}

// The form of each activation against the CPU's formulas, through experts of one number.
void test_activations() {
  for (const Act act : kActs)
    for (const ScaleOn scale_on : {ScaleOn::output, ScaleOn::input}) {
      check<float>({13, 2, 3, 7, 5, act, false, false, true, scale_on});
      check<double>({13, 2, 3, 7, 5, act, false, is_gated(act), true, scale_on});
    }
}

// Without bounds an infinite gate stays one.
void test_infinity() {
  for (const Act act : kActs)
    if (act != Act::swiglu_clamped && act != Act::swiglu_oai) {
      const auto form = cuda::activation_form<float>({act, 1.702, 0.5});
      EXPECT(cuda::activate(form, INFINITY, 1.0f) == INFINITY);
    }
}

// What goes through the tensor cores, where there are any: rows of whole 16-byte pieces.
void test_layouts_in_pieces() {
  for (const bool transposed : {false, true})
    for (const bool alternate : {false, true})
      for (const bool bias : {false, true}) {
        check<bf16>({70, 3, 4, 72, 40, Act::swiglu, transposed, alternate, bias, ScaleOn::input});
        check<f16>({70, 3, 4, 72, 40, Act::swiglu_oai, transposed, alternate, bias});
      }
  check<bf16>({70, 2, 3, 72, 40, Act::relu2, false, false, true});
  check<bf16>({70, 2, 3, 136, 104, Act::swiglu});
  check<bf16>({300, 2, 3, 72, 264, Act::geglu});  // several tiles of rows and columns, the last ones in part
  for (const bool transposed : {false, true}) {
    check<float>({70, 2, 3, 72, 40, Act::swiglu, transposed, transposed, true, ScaleOn::output, true});
    check_added<float>({70, 2, 3, 72, 136, Act::gelu, transposed, false, true, ScaleOn::input, true});
    check_added<bf16>({70, 2, 3, 72, 40, Act::swiglu, transposed, false, true});
    check_added<f16>({70, 2, 3, 72, 40, Act::swiglu, transposed, true, true, ScaleOn::input, false, 8});
    check<f16>({70, 2, 3, 72, 40, Act::swiglu, transposed, false, true, ScaleOn::output, false, 3});  // between pieces
  }
}

void test_layouts() {
  for (const bool transposed : {false, true})
    for (const bool alternate : {false, true})
      for (const bool bias : {false, true}) {
        check<float>({9, 3, 4, 21, 11, Act::swiglu, transposed, alternate, bias});
        check<f16>({9, 3, 4, 21, 11, Act::swiglu_oai, transposed, alternate, bias});
        check_added<float>({9, 3, 4, 21, 70, Act::swiglu, transposed, alternate, bias});
      }
  check_added<bf16>({9, 3, 4, 21, 11, Act::relu, false, false, true, ScaleOn::output, false, 5});
  check_added<double>({9, 3, 4, 21, 11, Act::reglu, true, true, true, ScaleOn::input});
  test_layouts_in_pieces();
}

// Tiles of 8 to 64 rows, and sums in parts, with and without gates.
void test_few_rows() {
  for (const auto& [T, k, E] :
       std::initializer_list<std::array<int64_t, 3>>{{7, 2, 9}, {25, 2, 7}, {40, 2, 5}, {90, 1, 4}}) {
    check<bf16>({T, k, E, 136, 104, Act::swiglu, false, false, true, ScaleOn::input});
    check<f16>({T, k, E, 72, 136, Act::swiglu_oai, false, true, true});
    check<f16>({T, k, E, 72, 104, Act::swiglu_oai, true, true, true});  // as gpt-oss has them
    check<bf16>({T, k, E, 72, 104, Act::swiglu, true, false, true, ScaleOn::input});
    check<bf16>({T, k, E, 136, 72, Act::gelu});
  }
  check<bf16>({6, 1, 1, 1096, 72, Act::swiglu, false, false, true});
  check<bf16>({6, 1, 1, 72, 1096, Act::swiglu, false, true, true});
}

void test_edges() {
  check<float>({1, 1, 1, 1, 1, Act::swiglu});
  check<float>({5, 3, 3, 8, 8, Act::geglu});                              // every expert for every token
  check<float>({0, 2, 3, 8, 8, Act::swiglu});                             // no token: weights' gradients are zero
  check_added<float>({0, 2, 3, 8, 8, Act::swiglu});                       // nothing is added
  check<bf16>({300, 1, 1, 64, 64, Act::swiglu, false});                   // one expert takes all
  check_added<bf16>({9, 1, 2, 16, 16, Act::swiglu, false, false, true});  // few choices, most of one expert
  check_memory({1000, 4, 8, 256, 128, Act::swiglu, false, false, true});
  check_memory({1000, 4, 8, 128, 256, Act::relu2, false, false, true});
}

void tests() {
  test_activations();
  test_layouts();
  test_edges();
  test_given();
  test_fused_combine();
#if defined(MOERT_EMULATED) && defined(MOERT_CUTLASS)
  emulate::copies_at_once = true;
  test_layouts();
#endif
#if !defined(MOERT_EMULATED) || defined(MOERT_CUTLASS)
  setenv("MOERT_PERSISTENT_GEMM", "1", 1);
  test_layouts_in_pieces();
  check<bf16>({300, 2, 3, 72, 264, Act::swiglu, false, false, true});  // wide tiles, where multiprocessors are few
  check<bf16>({300, 2, 3, 72, 264, Act::relu2});
  test_few_rows();
  test_given();
  test_fused_combine();
#endif
}

}  // namespace

int main() {
  test_infinity();
  return run_tests(tests);
}
