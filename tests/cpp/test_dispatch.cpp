#include "moert/dispatch.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "expect.h"
#include "moert/fp8.h"

using moert::DType;
using moert::cpu::dispatch_pack;
using moert::cpu::dispatch_plan;

struct Plan {
  std::vector<int32_t> offsets, tokens, slots;
};

Plan plan_of(const std::vector<int32_t>& ids, int64_t k, const std::vector<int32_t>& ranks, int64_t R,
             int64_t threads) {
  Plan plan{std::vector<int32_t>(R + 1, -7), std::vector<int32_t>(ids.size(), -7),
            std::vector<int32_t>(ids.size(), -7)};
  dispatch_plan(ids.data(), int64_t(ids.size()) / k, k, ranks.data(), int64_t(ranks.size()), R, threads,
                plan.offsets.data(), plan.tokens.data(), plan.slots.data());
  return plan;
}

// Experts 0 and 2 on rank 1, expert 1 on rank 0, none on rank 2.
const std::vector<int32_t> kRanks{1, 0, 1}, kLocal{0, 0, 1}, kIds{2, 0, 1, 2, 3, -1};

void one_copy_for_a_rank() {
  const Plan plan = plan_of(kIds, 2, kRanks, 3, 1);
  EXPECT((plan.offsets == std::vector<int32_t>{0, 1, 3, 3}));
  EXPECT((plan.tokens == std::vector<int32_t>{1, 0, 1, -1, -1, -1}));
  EXPECT((plan.slots == std::vector<int32_t>{1, -1, 0, 2, -1, -1}));
  EXPECT((plan_of({}, 2, kRanks, 3, 4).offsets == std::vector<int32_t>{0, 0, 0, 0}));
}

void records_hold_row_weights_and_ids() {
  const std::vector<float> x{1, 2, 3, -9, 4, 5, 6, -9, 7, 8, 9, -9};  // [3, 3], rows of 4
  const std::vector<float> weights{.1f, .2f, .3f, .4f, .5f, .6f};
  const Plan plan = plan_of(kIds, 2, kRanks, 3, 1);
  constexpr moert::RecordLayout layout = moert::record_layout(3, 4, 2, 4);
  static_assert(layout.weights == 12 && layout.ids == 20 && layout.bytes == 32);
  std::vector<char> records(3 * layout.bytes, 'x');
  dispatch_pack({x.data(), 4, DType::f32, weights.data(), 4, kIds.data(), kRanks.data(), kLocal.data(),
                 plan.offsets.data(), plan.tokens.data(), 3, 3, 2, 3, 3, 3},
                2, records.data());
  const float rows[3][5] = {{4, 5, 6, .3f, 0}, {1, 2, 3, .1f, .2f}, {4, 5, 6, 0, .4f}};
  const int16_t ids[3][2] = {{0, -1}, {1, 0}, {-1, 1}};
  for (int n = 0; n < 3; ++n) {
    const char* record = records.data() + n * layout.bytes;
    EXPECT(std::memcmp(record, rows[n], 20) == 0);
    EXPECT(std::memcmp(record + 20, ids[n], 4) == 0);
    for (int i = 24; i < 32; ++i) EXPECT(record[i] == 0);
  }
}

void padding_before_wider_weights() {
  constexpr moert::RecordLayout layout = moert::record_layout(3, 2, 1, 4);  // 6 bytes of row, weights at 8
  static_assert(layout.weights == 8 && layout.ids == 12 && layout.bytes == 16);
  const std::vector<uint16_t> x{1, 2, 3};
  const float weight = 2;
  const std::vector<int32_t> id{0}, offsets{0, 1}, tokens{0};
  std::vector<char> record(16, 'x');
  dispatch_pack({x.data(), 3, DType::bf16, &weight, 4, id.data(), id.data(), id.data(), offsets.data(), tokens.data(),
                 1, 3, 1, 1, 1, 1},
                1, record.data());
  EXPECT(record[6] == 0 && record[7] == 0 && std::memcmp(record.data() + 8, &weight, 4) == 0);
}

// One row of four elements, rounded and back.
void rounded_rows() {
  const std::vector<float> x{1, -2, 127, 0}, weights{5};
  const std::vector<int32_t> id{0}, offsets{0, 1}, tokens{0};
  constexpr moert::RecordLayout layout = moert::record_layout(4, 4, 1, 4, moert::Payload::int8);
  static_assert(layout.weights == 8 && layout.ids == 12 && layout.bytes == 16);
  std::vector<char> record(16, 'x');
  dispatch_pack({x.data(), 4, DType::f32, weights.data(), 4, id.data(), id.data(), id.data(), offsets.data(),
                 tokens.data(), 1, 4, 1, 1, 1, 1, moert::Payload::int8},
                1, record.data());
  EXPECT(record[0] == 1 && record[1] == -2 && record[2] == 127 && record[3] == 0);
  std::vector<float> back(4);
  moert::cpu::dispatch_unpack({record.data(), 16, moert::Payload::int8, DType::f32, 1, 4}, 1, back.data());
  EXPECT(back == x);
}

void every_code() {
  uint8_t record[260];
  for (int code = 0; code < 256; ++code) record[code] = uint8_t(code);
  const float scale = 1;
  std::memcpy(record + 256, &scale, 4);
  std::vector<float> row(256);
  moert::cpu::dispatch_unpack({record, 260, moert::Payload::float8_e4m3, DType::f32, 1, 256}, 1, row.data());
  for (int code = 0; code < 256; ++code) {
    const float expected = moert::e4m3_to_float(uint8_t(code));
    EXPECT(row[code] == expected || (std::isnan(row[code]) && std::isnan(expected)));
  }
}

// Slots 1 and 2 of four lie apart; token 1 has rows on both sides.
void rows_of_two_places() {
  const std::vector<float> rows{10, 40}, own{20, 30}, residual{100, 200};
  const std::vector<int32_t> slots{3, 1, -1, 2, 0, -1};
  std::vector<float> y(2);
  moert::cpu::dispatch_combine(
      {rows.data(), 1, own.data(), 1, 1, 2, DType::f32, slots.data(), residual.data(), 1, 2, 3, 4, 1}, 1, y.data());
  EXPECT(y[0] == 160 && y[1] == 240);
}

void same_on_any_threads() {
  const int64_t T = 30011, k = 4, E = 61, R = 7;
  std::vector<int32_t> ids(T * k), ranks(E);
  uint32_t state = 1;
  for (auto& id : ids) id = int32_t((state = state * 1664525u + 1013904223u) >> 16) % (E + 3) - 1;
  for (int64_t e = 0; e < E; ++e) ranks[e] = int32_t(e * 5 % R);
  const Plan plan = plan_of(ids, k, ranks, R, 1);
  EXPECT(plan.offsets[R] > 0 && plan.offsets[R] < T * k);
  for (int64_t threads : {2, 3, 8}) {
    const Plan same = plan_of(ids, k, ranks, R, threads);
    EXPECT(same.offsets == plan.offsets && same.tokens == plan.tokens && same.slots == plan.slots);
  }
}

void errors() {
  const auto pack = [](std::vector<int32_t> offsets, std::vector<int32_t> tokens, std::vector<int32_t> local) {
    const float x[2] = {1, 2}, weights[2] = {1, 1};
    const int32_t ids[2] = {0, 0}, ranks[1] = {0};
    char records[64];
    dispatch_pack({x, 1, DType::f32, weights, 4, ids, ranks, local.data(), offsets.data(), tokens.data(), 2, 1, 1, 1,
                   int64_t(offsets.size()) - 1, int64_t(tokens.size())},
                  1, records);
  };
  EXPECT(words([&] { pack({0, 2}, {0, 1}, {0}); }) == "nothing is thrown");
  EXPECT(words([&] { pack({0, 2}, {0, 2}, {0}); }) == "tokens must hold a token in [0, T=2), got 2");
  EXPECT(words([&] { pack({0, 2}, {-1, 1}, {0}); }) == "tokens must hold a token in [0, T=2), got -1");
  EXPECT(words([&] { pack({0, 1}, {0, 1}, {0}); }) == "offsets must be from 0 to N=2, got 0 to 1");
  EXPECT(words([&] { pack({0, 3, 2}, {0, 1}, {0}); }) == "offsets must be in rising order, got 3 before 2");
  EXPECT(words([&] { pack({0, 2}, {0, 1}, {32768}); }) == "local_ids must hold an id in [0, 32768), got 32768");
  EXPECT(words([&] { plan_of(kIds, 2, {0, 3, 1}, 3, 1); }) == "expert_to_rank must hold a rank in [0, R=3), got 3");
}

int main() {
  one_copy_for_a_rank();
  records_hold_row_weights_and_ids();
  padding_before_wider_weights();
  rounded_rows();
  every_code();
  rows_of_two_places();
  same_on_any_threads();
  errors();
}
