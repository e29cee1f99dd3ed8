#include "moert/expert_choice.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "expect.h"

using moert::DType;

struct Chosen {
  std::vector<float> weights;
  std::vector<int32_t> ids, offsets, tokens, slots;
};

Chosen choose(const std::vector<float>& scores, const std::vector<int64_t>& segments,
              const std::vector<int64_t>& capacity, int64_t E, int64_t k, int64_t threads = 1, int64_t S = -1) {
  const int64_t T = int64_t(segments.size());
  S = S < 0 ? T * k : S;
  const auto ints = [](int64_t n) { return std::vector<int32_t>(n, -7); };
  Chosen out{std::vector<float>(T * k, -7), ints(T * k), ints(E + 1), ints(S), ints(T * k)};
  moert::cpu::expert_choice(scores.data(), DType::f32, E, segments.data(), capacity.data(), T, E,
                            int64_t(capacity.size()) / E, k, S, threads, out.weights.data(), out.ids.data(),
                            out.offsets.data(), out.tokens.data(), out.slots.data());
  return out;
}

void each_expert_takes_its_best_tokens() {
  const Chosen out = choose({3, 1, 2, 5, 1, 4}, {0, 0, 0}, {2, 1}, 2, 2);
  EXPECT((out.ids == std::vector<int32_t>{0, 2, 0, 1, 2, 2}));
  EXPECT((out.weights == std::vector<float>{3, 0, 2, 5, 0, 0}));
}

void the_plan_lists_the_tokens_of_each_expert() {
  const Chosen out = choose({3, 1, 2, 5, 1, 4}, {0, 0, 0}, {2, 1}, 2, 2, 1, 4);
  EXPECT((out.offsets == std::vector<int32_t>{0, 2, 3}));
  EXPECT((out.tokens == std::vector<int32_t>{0, 1, 1, -1}));
  EXPECT((out.slots == std::vector<int32_t>{0, -1, 1, 2, -1, -1}));
}

void ties_go_to_the_earlier_token_and_zeros_are_equal() {
  const Chosen out = choose({-0.0f, 0, 0, -0.0f}, {0, 0, 0, 0}, {2}, 1, 1);
  EXPECT((out.ids == std::vector<int32_t>{0, 0, 1, 1}));
}

void segments_compete_apart() {
  const Chosen out = choose({1, 9, 2, 8, NAN}, {0, 1, 0, 1, -1}, {1, 5}, 1, 1);
  EXPECT((out.ids == std::vector<int32_t>{1, 0, 0, 0, 1}));
}

void threads_change_nothing() {
  const int64_t T = 3000, E = 8;
  std::vector<float> scores(T * E);
  for (int64_t i = 0; i < T * E; ++i) scores[i] = float((i * 7919) % 1009) - 500;
  std::vector<int64_t> segments(T), capacity(3 * E, 100);
  for (int64_t t = 0; t < T; ++t) segments[t] = t % 3;
  const Chosen one = choose(scores, segments, capacity, E, E), three = choose(scores, segments, capacity, E, E, 3);
  EXPECT(one.ids == three.ids && one.weights == three.weights);
  EXPECT(one.offsets == three.offsets && one.tokens == three.tokens && one.slots == three.slots);
  int64_t count = 0;
  for (int32_t id : one.ids) count += id < E;
  EXPECT(count == 3 * E * 100);
}

template <typename F>
void throws(const F& f, const char* words) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    EXPECT(std::string(error.what()).find(words) != std::string::npos);
    return;
  }
  EXPECT(false);
}

int main() {
  each_expert_takes_its_best_tokens();
  the_plan_lists_the_tokens_of_each_expert();
  ties_go_to_the_earlier_token_and_zeros_are_equal();
  segments_compete_apart();
  threads_change_nothing();
  throws([] { choose({NAN}, {0}, {1}, 1, 1); }, "scores must be numbers, got NaN");
  throws([] { choose({1}, {0}, {-1}, 1, 1); }, "capacity must be at least 0, got -1");
  throws([] { choose({1, 1}, {0}, {1, 1}, 2, 1); }, "max_choices must be at least the 2 experts");
  throws([] { choose({1, 1}, {0}, {1, 1}, 2, 2, 1, 1); }, "max_slots must be at least the 2 choices");
}
