// The GPU's expert choice beside the CPU's, to the bit, and what the CPU would refuse.
#include "moert/expert_choice.h"

#include <array>
#include <limits>

#include "../cpp/expect.h"
#include "memory.h"
#include "random.h"

using namespace moert;

namespace {

template <typename T>
using Weight = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
struct Chosen {
  std::vector<Weight<T>> weights;
  std::vector<int32_t> ids;
};

template <typename T>
Chosen<T> choose(const std::vector<T>& scores, int64_t stride, const std::vector<int64_t>& segments,
                 const std::vector<int64_t>& capacity, int64_t T_, int64_t E, int64_t D, int64_t k) {
  OnDevice<T> scores_there(scores);
  OnDevice<int64_t> segments_there(segments), capacity_there(capacity);
  OnDevice<char> workspace(std::vector<char>(size_t(cuda::expert_choice_workspace(E, D)), 77));
  OnDevice<Weight<T>> weights(std::vector<Weight<T>>(size_t(T_ * k), -7));
  OnDevice<int32_t> ids(std::vector<int32_t>(size_t(T_ * k), -7));
  cuda::expert_choice(scores_there.data(), DTypeOf<T>::value, stride, segments_there.data(), capacity_there.data(), T_,
                      E, D, k, workspace.data(), nullptr, weights.data(), ids.data());
  return {weights.read(), ids.read()};
}

template <typename T>
void compare(int64_t T_, int64_t E, int64_t D, int64_t most, int64_t pad) {
  Random random{uint64_t(T_ * 3 + E)};
  const int64_t stride = E + pad;
  const std::vector<T> scores = numbers<T>(random, size_t(T_ * stride), 2);
  std::vector<int64_t> segments(static_cast<size_t>(T_)), capacity(size_t(D * E));
  for (int64_t& d : segments) d = random.below(D + 2) - 1;
  for (int64_t& c : capacity) c = random.below(most + 1);
  Chosen<T> here{std::vector<Weight<T>>(size_t(T_ * E), -7), std::vector<int32_t>(size_t(T_ * E), -7)};
  std::vector<int32_t> offsets(size_t(E) + 1), tokens(size_t(T_ * E)), slots(size_t(T_ * E));
  cpu::expert_choice(scores.data(), DTypeOf<T>::value, stride, segments.data(), capacity.data(), T_, E, D, E, T_ * E, 1,
                     here.weights.data(), here.ids.data(), offsets.data(), tokens.data(), slots.data());
  const Chosen<T> there = choose(scores, stride, segments, capacity, T_, E, D, E);
  EXPECT(there.ids == here.ids);
  EXPECT(there.weights == here.weights);
}

template <typename T>
void compare_all() {
  for (const auto& [tokens, E, D, most] :
       {std::array<int64_t, 4>{0, 4, 1, 3}, {1, 1, 1, 1}, {40, 5, 3, 6}, {300, 33, 2, 40}, {700, 4, 1, 900}})
    for (int64_t pad : {0, 3}) compare<T>(tokens, E, D, most, pad);
}

// What the CPU refuses: NaN, a negative capacity, too few places.
void what_cannot_be_refused() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> scores{nan, 1, -infinity, 1, 5, 1};  // [3, 2]
  const Chosen<float> one = choose<float>(scores, 2, {0, 0, 0}, {2, -1}, 3, 2, 1, 2);
  EXPECT((one.ids == std::vector<int32_t>{2, 2, 0, 2, 0, 2}));
  const Chosen<float> all = choose<float>(scores, 2, {0, 0, 0}, {3, 1}, 3, 2, 1, 1);
  EXPECT((all.ids == std::vector<int32_t>{0, 0, 0}) && all.weights[0] != all.weights[0] && all.weights[2] == 5);
}

void tests() {
  compare_all<float>();
  compare_all<bf16>();
  compare_all<f16>();
  compare_all<double>();
  what_cannot_be_refused();
}

}  // namespace

int main() { return run_tests(tests); }
