#include "moert/permute.h"

#include <limits>
#include <vector>

#include "expect.h"

struct Plan {
  std::vector<int32_t> offsets, tokens, slots;
};

Plan plan_of(const std::vector<int32_t>& ids, int64_t k, int64_t E, int64_t threads) {
  const int64_t T = int64_t(ids.size()) / k;
  Plan plan{std::vector<int32_t>(E + 1, -7), std::vector<int32_t>(T * k, -7), std::vector<int32_t>(T * k, -7)};
  moert::cpu::permute_plan(ids.data(), T, k, E, threads, plan.offsets.data(), plan.tokens.data(), plan.slots.data());
  return plan;
}

void small_plan() {
  const Plan plan = plan_of({2, 0, 0, 3, 2, -1}, 2, 3, 1);  // 3 is the sentinel
  EXPECT((plan.offsets == std::vector<int32_t>{0, 2, 2, 4}));
  EXPECT((plan.tokens == std::vector<int32_t>{0, 1, 0, 2, -1, -1}));
  EXPECT((plan.slots == std::vector<int32_t>{2, 0, 1, -1, 3, -1}));
}

void no_tokens() { EXPECT((plan_of({}, 2, 3, 4).offsets == std::vector<int32_t>{0, 0, 0, 0})); }

// Whatever the threads: every kept choice has one slot, in its expert's range, in the order of the tokens.
void stable_on_any_threads() {
  const int64_t T = 5003, k = 3, E = 61;
  std::vector<int32_t> ids(T * k);
  uint32_t state = 1;
  for (auto& id : ids) id = int32_t((state = state * 1664525u + 1013904223u) >> 16) % (E + 3) - 1;
  ids[5] = std::numeric_limits<int32_t>::min();
  ids[6] = std::numeric_limits<int32_t>::max();
  const Plan plan = plan_of(ids, k, E, 1);
  std::vector<int32_t> next(plan.offsets.begin(), plan.offsets.end() - 1);
  for (int64_t i = 0; i < T * k; ++i) {
    const bool kept = 0 <= ids[i] && ids[i] < E;
    EXPECT(plan.slots[i] == (kept ? next[ids[i]]++ : -1));
    if (kept) EXPECT(plan.tokens[plan.slots[i]] == i / k);
  }
  for (int64_t e = 0; e < E; ++e) EXPECT(next[e] == plan.offsets[e + 1]);
  for (int64_t threads : {2, 3, 8}) {
    const Plan same = plan_of(ids, k, E, threads);
    EXPECT(same.offsets == plan.offsets && same.tokens == plan.tokens && same.slots == plan.slots);
  }
}

int main() {
  small_plan();
  no_tokens();
  stable_on_any_threads();
}
