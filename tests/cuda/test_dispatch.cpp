// The GPU's plans and records beside the CPU's, to the bit.
#include "moert/dispatch.h"

#include "../cpp/expect.h"
#include "memory.h"
#include "random.h"

using namespace moert;

namespace {

struct Experts {
  std::vector<int32_t> ranks, locals;
};

Experts experts_of(int64_t E, int64_t R) {
  Experts experts;
  std::vector<int32_t> held(size_t(R), 0);
  for (int64_t e = 0; e < E; ++e) {
    experts.ranks.push_back(int32_t((e * 5 + 1) % R));
    experts.locals.push_back(held[size_t(experts.ranks.back())]++);
  }
  return experts;
}

struct Plan {
  std::vector<int32_t> offsets, tokens, slots;
};

Plan plan_of(const std::vector<int32_t>& ids, int64_t T, int64_t k, const Experts& experts, int64_t R) {
  const int64_t E = int64_t(experts.ranks.size());
  Plan plan{std::vector<int32_t>(size_t(R) + 1, -7), std::vector<int32_t>(ids.size(), -7),
            std::vector<int32_t>(ids.size(), -7)};
  OnDevice<int32_t> there(ids), ranks(experts.ranks), offsets(plan.offsets), tokens(plan.tokens), slots(plan.slots);
  OnDevice<char> workspace(std::vector<char>(size_t(cuda::dispatch_plan_workspace(T, k, R)), 77));
  cuda::dispatch_plan(there.data(), T, k, ranks.data(), E, R, workspace.data(), nullptr, offsets.data(), tokens.data(),
                      slots.data());
  cpu::dispatch_plan(ids.data(), T, k, experts.ranks.data(), E, R, 1, plan.offsets.data(), plan.tokens.data(),
                     plan.slots.data());
  EXPECT(offsets.read() == plan.offsets);
  EXPECT(tokens.read() == plan.tokens);
  EXPECT(slots.read() == plan.slots);
  plan.tokens.resize(size_t(plan.offsets.back()));
  return plan;
}

// Rows `pad` elements longer than H, `shift` past an aligned address.
template <typename X, typename W>
void pack(const std::vector<int32_t>& ids, const Plan& plan, const Experts& experts, int64_t T, int64_t k, int64_t R,
          int64_t H, int64_t pad, size_t shift) {
  Random random{uint64_t(H + 3 * T)};
  const std::vector<X> x = numbers<X>(random, size_t(T * (H + pad)));
  const std::vector<W> weights = numbers<W>(random, size_t(T * k));
  const RecordLayout layout = record_layout(H, sizeof(X), k, sizeof(W));
  const int64_t N = int64_t(plan.tokens.size()), E = int64_t(experts.ranks.size());
  std::vector<char> records(size_t(N * layout.bytes), 'x');
  OnDevice<X> x_there(x, shift);
  OnDevice<W> weights_there(weights);
  OnDevice<int32_t> ids_there(ids), ranks(experts.ranks), locals(experts.locals), offsets(plan.offsets),
      tokens(plan.tokens);
  OnDevice<char> records_there(records);
  const int64_t width = sizeof(W);
  cpu::dispatch_pack({x.data(), H + pad, DTypeOf<X>::value, weights.data(), width, ids.data(), experts.ranks.data(),
                      experts.locals.data(), plan.offsets.data(), plan.tokens.data(), T, H, k, E, R, N},
                     1, records.data());
  cuda::dispatch_pack({x_there.data(), H + pad, DTypeOf<X>::value, weights_there.data(), width, ids_there.data(),
                       ranks.data(), locals.data(), offsets.data(), tokens.data(), T, H, k, E, R, N},
                      nullptr, records_there.data());
  EXPECT(records_there.read() == records);
}

// Rounded rows, of all slots and of some in the middle, and back.
template <typename X>
void rounded(const std::vector<int32_t>& ids, const Plan& plan, const Experts& experts, int64_t T, int64_t k, int64_t R,
             int64_t H) {
  Random random{uint64_t(H + 5 * T)};
  std::vector<X> x = numbers<X>(random, size_t(T * (H + 3)));
  for (int64_t h = 0; h < H && T > 1; ++h) x[size_t(H + 3 + h)] = X{};  // a row of zeros
  const std::vector<float> weights = numbers<float>(random, size_t(T * k));
  const int64_t N = int64_t(plan.tokens.size()), E = int64_t(experts.ranks.size());
  OnDevice<X> x_there(x);
  OnDevice<float> weights_there(weights);
  OnDevice<int32_t> ids_there(ids), ranks(experts.ranks), locals(experts.locals), offsets(plan.offsets),
      tokens(plan.tokens);
  for (const Payload payload : {Payload::none, Payload::int8, Payload::float8_e4m3})
    for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, N}, {N / 3, N - N / 4}}) {
      const RecordLayout layout = record_layout(H, sizeof(X), k, 4, payload);
      std::vector<char> records(size_t((last - first) * layout.bytes), 'x');
      OnDevice<char> records_there(records);
      cpu::dispatch_pack(
          {x.data(), H + 3, DTypeOf<X>::value, weights.data(), 4, ids.data(), experts.ranks.data(),
           experts.locals.data(), plan.offsets.data(), plan.tokens.data(), T, H, k, E, R, N, payload, first, last},
          1, records.data());
      cuda::dispatch_pack(
          {x_there.data(), H + 3, DTypeOf<X>::value, weights_there.data(), 4, ids_there.data(), ranks.data(),
           locals.data(), offsets.data(), tokens.data(), T, H, k, E, R, N, payload, first, last},
          nullptr, records_there.data());
      EXPECT(records_there.read() == records);
      if (payload == Payload::none) continue;
      std::vector<X> rows(size_t((last - first) * H));
      OnDevice<X> rows_there(rows);
      cpu::dispatch_unpack({records.data(), layout.bytes, payload, DTypeOf<X>::value, last - first, H}, 1, rows.data());
      cuda::dispatch_unpack({records_there.data(), layout.bytes, payload, DTypeOf<X>::value, last - first, H}, nullptr,
                            rows_there.data());
      EXPECT(equal_bits(rows_there.read(), rows));
    }
}

// Results of other ranks and of this one, whose slots are the first, in the middle, the last, all or none; slots that
// point nowhere count as none.
template <typename X>
void combine() {
  const int64_t T = 7, k = 3, S = 16;
  Random random{7};
  std::vector<int32_t> slots(size_t(T * k)), wild;
  for (int32_t& slot : slots) slot = random.below(4) ? int32_t(random.below(S)) : -1;
  wild = slots;
  for (int32_t& slot : wild) slot = slot < 0 ? (random.below(2) ? int32_t(S) : -9) : slot;
  OnDevice<int32_t> wild_there(wild);
  for (const int64_t H : {0, 1, 33, 64})
    for (const auto& [first, O] : {std::pair<int64_t, int64_t>{0, 5}, {4, 5}, {S - 5, 5}, {0, S}, {3, 0}})
      for (const auto& [pad, shift] : {std::pair<int64_t, size_t>{0, 0}, {8, 0}, {3, 0}, {0, 1}})
        for (const bool onto : {false, true}) {
          const auto rows = numbers<X>(random, size_t((S - O) * (H + pad))), own = numbers<X>(random, size_t(O * H));
          const auto residual = numbers<X>(random, size_t(T * (H + pad)));
          std::vector<X> y(size_t(T * H), numbers<X>(random, 1)[0]);
          OnDevice<X> rows_there(rows, shift), own_there(own), residual_there(residual, shift), y_there(y);
          const DType dtype = DTypeOf<X>::value;
          cpu::dispatch_combine({rows.data(), H + pad, own.data(), H, first, O, dtype, slots.data(),
                                 onto ? residual.data() : nullptr, H + pad, T, k, S, H},
                                1, y.data());
          cuda::dispatch_combine({rows_there.data(), H + pad, own_there.data(), H, first, O, dtype, wild_there.data(),
                                  onto ? residual_there.data() : nullptr, H + pad, T, k, S, H},
                                 nullptr, y_there.data());
          EXPECT(equal_bits(y_there.read(), y));
        }
}

// Every code, NaN among them, in records that begin and end anywhere.
template <typename X>
void every_code() {
  constexpr int64_t M = 2, H = 256, bytes = H + 5;
  std::vector<uint8_t> records(M * bytes);
  for (int64_t m = 0; m < M; ++m) {
    const float scale = m ? 1e-3f : 1;
    for (int64_t h = 0; h < H; ++h) records[size_t(m * bytes + h)] = uint8_t(h);
    std::memcpy(&records[size_t(m * bytes + H)], &scale, 4);
  }
  OnDevice<uint8_t> there(records, 1);
  for (const Payload payload : {Payload::int8, Payload::float8_e4m3}) {
    std::vector<X> rows(M * H);
    OnDevice<X> rows_there(rows);
    cpu::dispatch_unpack({records.data(), bytes, payload, DTypeOf<X>::value, M, H}, 1, rows.data());
    cuda::dispatch_unpack({there.data(), bytes, payload, DTypeOf<X>::value, M, H}, nullptr, rows_there.data());
    const std::vector<X> got = rows_there.read();
    for (size_t i = 0; i < rows.size(); ++i) {
      const float a = to_float(got[i]), b = to_float(rows[i]);
      EXPECT(a == b || (std::isnan(a) && std::isnan(b)));
    }
  }
}

template <typename X>
void in_every_layout(const std::vector<int32_t>& ids, const Plan& plan, const Experts& experts, int64_t T, int64_t k,
                     int64_t R) {
  for (int64_t H : {0, 1, 3, 33, 64, 520}) {
    if constexpr (sizeof(X) < 8) rounded<X>(ids, plan, experts, T, k, R, H);
    for (const auto& [pad, shift] : {std::pair<int64_t, size_t>{0, 0}, {16, 0}, {3, 0}, {0, 1}}) {
      pack<X, Acc<X>>(ids, plan, experts, T, k, R, H, pad, shift);
      pack<X, X>(ids, plan, experts, T, k, R, H, pad, shift);
    }
  }
}

// Ranks, tokens and ids of the device's memory that point nowhere go nowhere; nothing is thrown.
void numbers_out_of_range() {
  const std::vector<int32_t> ids{0, 1, 2, 5}, ranks{0, 9, -4}, locals{40000, 0, 0}, offsets{0, 2}, tokens{0, 7};
  std::vector<int32_t> at(2, -7), slots(4, -7), of(4, -7);
  OnDevice<int32_t> ids_there(ids), ranks_there(ranks), locals_there(locals), offsets_there(at), slots_there(slots),
      of_there(of);
  OnDevice<char> workspace(std::vector<char>(size_t(cuda::dispatch_plan_workspace(2, 2, 1)), 77));
  cuda::dispatch_plan(ids_there.data(), 2, 2, ranks_there.data(), 3, 1, workspace.data(), nullptr, offsets_there.data(),
                      of_there.data(), slots_there.data());
  EXPECT((offsets_there.read() == std::vector<int32_t>{0, 1}));
  EXPECT((of_there.read() == std::vector<int32_t>{0, -1, -1, -1}));
  EXPECT((slots_there.read() == std::vector<int32_t>{0, -1, -1, -1}));

  const std::vector<float> x{1, 2, 3, 4}, weights{.1f, .2f, .3f, .4f};
  OnDevice<float> x_there(x), weights_there(weights);
  OnDevice<int32_t> starts(offsets), tokens_there(tokens);
  OnDevice<char> records(std::vector<char>(64, 'x'));
  cuda::dispatch_pack({x_there.data(), 2, DType::f32, weights_there.data(), 4, ids_there.data(), ranks_there.data(),
                       locals_there.data(), starts.data(), tokens_there.data(), 2, 2, 2, 3, 1, 2},
                      nullptr, records.data());
  const std::vector<char> got = records.read();
  const float first[4] = {1, 2, 0, 0}, second[4] = {};
  const int16_t none[2] = {-1, -1};  // the one expert of the rank has a number that 16 bits cannot hold
  EXPECT(std::memcmp(got.data(), first, 16) == 0 && std::memcmp(got.data() + 16, none, 4) == 0);
  EXPECT(std::memcmp(got.data() + 32, second, 16) == 0 && std::memcmp(got.data() + 48, none, 4) == 0);
}

void tests() {
  const int64_t shapes[][4] = {{0, 2, 8, 3}, {1, 1, 1, 1}, {5, 0, 3, 2}, {37, 4, 60, 8}, {600, 8, 128, 4}};
  for (const auto& [T, k, E, R] : shapes) {
    Random random{uint64_t(T + E)};
    std::vector<int32_t> ids(size_t(T * k));
    for (int32_t& id : ids) id = int32_t(random.below(E + 3)) - 1;
    const Experts experts = experts_of(E, R);
    const Plan plan = plan_of(ids, T, k, experts, R);
    if (T > 40) continue;
    in_every_layout<float>(ids, plan, experts, T, k, R);
    in_every_layout<bf16>(ids, plan, experts, T, k, R);
    in_every_layout<f16>(ids, plan, experts, T, k, R);
    in_every_layout<double>(ids, plan, experts, T, k, R);
  }
  every_code<float>();
  every_code<bf16>();
  every_code<f16>();
  combine<float>();
  combine<bf16>();
  combine<f16>();
  combine<double>();
  numbers_out_of_range();
}

}  // namespace

int main() { return run_tests(tests); }
