// The GPU's plans beside the CPU's, to the bit; rows and their gradients beside the CPU's.
#include "moert/permute.h"

#include "../cpp/expect.h"
#include "memory.h"
#include "random.h"

using namespace moert;

namespace {

enum class Kind { uniform, one_expert, sentinels, skewed };

std::vector<int32_t> choices(Random& random, int64_t n, int64_t E, Kind kind) {
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int32_t& id : ids) {
    id = int32_t(random.below(E));
    if (kind == Kind::one_expert) id = int32_t(E / 2);
    if (kind == Kind::sentinels && random.below(3) == 0) id = random.below(2) ? -1 : int32_t(E + random.below(2));
    if (kind == Kind::skewed) id = int32_t(random.below(id + 1));
  }
  return ids;
}

struct Plan {
  std::vector<int32_t> offsets, tokens, slots;
};

Plan plan_of(const std::vector<int32_t>& ids, int64_t T, int64_t k, int64_t E, int64_t capacity) {
  const size_t S = size_t(capacity < 0 ? T * k : E * capacity);
  Plan plan{std::vector<int32_t>(size_t(E) + 1, -7), std::vector<int32_t>(S, -7), std::vector<int32_t>(ids.size(), -7)};
  OnDevice<int32_t> ids_there(ids), offsets(plan.offsets), tokens(plan.tokens), slots(plan.slots);
  OnDevice<char> workspace(std::vector<char>(size_t(cuda::permute_plan_workspace(T, k, E)), 77));
  cuda::permute_plan(ids_there.data(), T, k, E, capacity, workspace.data(), nullptr, offsets.data(), tokens.data(),
                     slots.data());
  cpu::permute_plan(ids.data(), T, k, E, capacity, 1, plan.offsets.data(), plan.tokens.data(), plan.slots.data());
  EXPECT(offsets.read() == plan.offsets);
  EXPECT(slots.read() == plan.slots);
  EXPECT(tokens.read() == plan.tokens);
  return plan;
}

template <typename X>
constexpr double kUnit = sizeof(X) == 2   ? 0x1p-8
                         : sizeof(X) == 4 ? 1e-6
                                          : 1e-14;

// Rows of H elements, `pad` more from one to the next, the first `shift` past an aligned address.
template <typename X>
struct Rows {
  std::vector<X> here;
  OnDevice<X> there;
  int64_t stride;

  Rows(Random& random, int64_t rows, int64_t H, int64_t pad, size_t shift)
      : here(numbers<X>(random, size_t(rows * (H + pad)))), there(here, shift), stride(H + pad) {}
};

template <typename X>
void rows_there_and_back(const Plan& plan, int64_t T, int64_t k, int64_t H, int64_t pad, size_t shift) {
  using W = Acc<X>;
  const DType dtype = DTypeOf<X>::value;
  const int64_t S = int64_t(plan.tokens.size());
  Random random{uint64_t(S * 7 + H)};
  Rows<X> x(random, T, H, pad, shift), rows(random, S, H, pad, shift), dy(random, T, H, pad, shift);
  const std::vector<W> weights = numbers<W>(random, size_t(T * k));
  OnDevice<W> weights_there(weights);
  OnDevice<int32_t> tokens(plan.tokens), slots(plan.slots);

  std::vector<X> out(size_t(S * H), rounded<X>(-7));
  OnDevice<X> out_there(out, shift);
  cpu::permute_rows(x.here.data(), x.stride, dtype, plan.tokens.data(), T, S, H, 1, out.data());
  cuda::permute_rows(x.there.data(), x.stride, dtype, tokens.data(), T, S, H, nullptr, out_there.data());
  EXPECT(rows_close(out_there.read(), out, size_t(H), 0));

  std::vector<X> y(size_t(T * H), rounded<X>(-7));
  for (bool weighted : {false, true})
    for (bool onto : {false, true}) {
      OnDevice<X> y_there(y, shift);
      cpu::unpermute_rows(rows.here.data(), rows.stride, dtype, plan.slots.data(), weighted ? weights.data() : nullptr,
                          onto ? x.here.data() : nullptr, x.stride, T, k, S, H, 1, y.data());
      cuda::unpermute_rows(rows.there.data(), rows.stride, dtype, slots.data(),
                           weighted ? weights_there.data() : nullptr, onto ? x.there.data() : nullptr, x.stride, T, k,
                           S, H, nullptr, y_there.data());
      EXPECT(rows_close(y_there.read(), y, size_t(H), kUnit<X>));
    }

  std::vector<W> dweights(size_t(T * k), -7);
  OnDevice<X> drows_there(out, shift);
  OnDevice<W> dweights_there(dweights);
  cpu::unpermute_rows_backward(dy.here.data(), dy.stride, rows.here.data(), rows.stride, dtype, plan.tokens.data(),
                               plan.slots.data(), weights.data(), T, k, S, H, 1, out.data(), dweights.data());
  cuda::unpermute_rows_backward(dy.there.data(), dy.stride, rows.there.data(), rows.stride, dtype, tokens.data(),
                                slots.data(), weights_there.data(), T, k, S, H, nullptr, drows_there.data(),
                                dweights_there.data());
  EXPECT(rows_close(drows_there.read(), out, size_t(H), kUnit<X>));
  // Sums in another order: each of H additions rounds a sum of about sqrt(H), and one sum may cancel.
  const std::vector<W> dweights_got = dweights_there.read();
  for (size_t i = 0; i < dweights.size(); ++i)
    EXPECT(std::fabs(double(dweights_got[i]) - double(dweights[i])) <= double(H) * 0x1p-23);
}

template <typename X>
void in_every_layout(const Plan& plan, int64_t T, int64_t k) {
  for (int64_t H : {0, 1, 33, 64, 256, 520})
    for (const auto& [pad, shift] : {std::pair<int64_t, size_t>{0, 0}, {16, 0}, {3, 0}, {0, 1}})
      rows_there_and_back<X>(plan, T, k, H, pad, shift);
}

void without_experts() {
  for (int64_t T : {0, 7, 3000})
    for (int64_t capacity : {-1, 0, 3}) {
      const Plan plan = plan_of(std::vector<int32_t>(size_t(2 * T)), T, 2, 0, capacity);
      EXPECT(plan.offsets == std::vector<int32_t>{0} && plan.slots == std::vector<int32_t>(size_t(2 * T), -1));
    }
}

// Tokens and slots that point nowhere are left out.
void numbers_out_of_range() {
  Plan plan{{0, 4}, {0, 9, -5, 1}, {0, 7, 3, -9}};
  const Plan good{{0, 4}, {0, -1, -1, 1}, {0, -1, 3, -1}};
  Random random;
  Rows<float> x(random, 2, 8, 0, 0);
  OnDevice<int32_t> tokens(plan.tokens), slots(plan.slots);
  std::vector<float> out(32), y(16);
  OnDevice<float> out_there(out), y_there(y);
  cpu::permute_rows(x.here.data(), 8, DType::f32, good.tokens.data(), 2, 4, 8, 1, out.data());
  cuda::permute_rows(x.there.data(), 8, DType::f32, tokens.data(), 2, 4, 8, nullptr, out_there.data());
  EXPECT(out_there.read() == out);
  cpu::unpermute_rows(out.data(), 8, DType::f32, good.slots.data(), nullptr, nullptr, 0, 2, 2, 4, 8, 1, y.data());
  cuda::unpermute_rows(out_there.data(), 8, DType::f32, slots.data(), nullptr, nullptr, 0, 2, 2, 4, 8, nullptr,
                       y_there.data());
  EXPECT(y_there.read() == y);
}

template <typename Id>
void ids_of_any_type() {
  const int64_t T = 37, k = 3, E = 100, row = 8, column = 2;
  std::vector<Id> ids(size_t(T * row));
  Random random;
  for (Id& id : ids) id = Id(uint64_t(random.below(140)) - 20 + (random.below(2) << 32));
  std::vector<int32_t> out(size_t(T * k), -7), expected;
  for (int64_t i = 0; i < T * k; ++i) {
    const Id id = ids[size_t(i / k * row + i % k * column)];
    expected.push_back(id >= 0 && uint64_t(id) < uint64_t(E) ? int32_t(id) : -1);
  }
  OnDevice<Id> ids_there(ids);
  OnDevice<int32_t> out_there(out);
  cuda::narrow_ids(ids_there.data(), sizeof(Id), std::is_signed_v<Id>, row, column, T, k, E, nullptr, out_there.data());
  EXPECT(out_there.read() == expected);
}

void tests() {
  const int64_t shapes[][3] = {{0, 2, 8}, {1, 1, 1}, {1, 8, 128}, {5, 0, 3}, {300, 4, 60}, {513, 8, 7}, {33, 2, 9000}};
  for (const auto& [T, k, E] : shapes)
    for (Kind kind : {Kind::uniform, Kind::one_expert, Kind::sentinels, Kind::skewed}) {
      Random random{uint64_t(T + E)};
      const std::vector<int32_t> ids = choices(random, T * k, E, kind);
      for (int64_t capacity : {0, 3, 40}) plan_of(ids, T, k, E, capacity);
      const Plan plan = plan_of(ids, T, k, E, -1);
      if (T > 40 || E > 1000) continue;
      in_every_layout<float>(plan, T, k);
      in_every_layout<bf16>(plan, T, k);
    }
  // Several blocks, and more than the scan's lanes of them.
  for (Kind kind : {Kind::uniform, Kind::sentinels, Kind::skewed}) {
    Random random{99};
    plan_of(choices(random, 3000 * 8, 128, kind), 3000, 8, 128, kind == Kind::skewed ? 200 : -1);
    plan_of(choices(random, 70000 * 2, 16, kind), 70000, 2, 16, -1);
  }
  Random random{3};
  const std::vector<int32_t> ids = choices(random, 40 * 3, 12, Kind::sentinels);
  for (int64_t capacity : {-1, 7}) {
    const Plan plan = plan_of(ids, 40, 3, 12, capacity);
    in_every_layout<f16>(plan, 40, 3);
    in_every_layout<double>(plan, 40, 3);
  }
  without_experts();
  numbers_out_of_range();
  ids_of_any_type<int8_t>();
  ids_of_any_type<uint8_t>();
  ids_of_any_type<int16_t>();
  ids_of_any_type<int32_t>();
  ids_of_any_type<uint32_t>();
  ids_of_any_type<int64_t>();
}

}  // namespace

int main() { return run_tests(tests); }
