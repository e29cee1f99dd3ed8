#include "moert/permute.h"

#include <sys/mman.h>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "expect.h"
#include "moert/dispatch.h"

template <typename T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, moert::bf16>) {
    return moert::to_bf16(x);
  } else if constexpr (std::is_same_v<T, moert::f16>) {
    return moert::to_f16(x);
  } else {
    return x;
  }
}

template <typename T>
auto to_value(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return moert::to_float(x);
  }
}

struct Plan {
  std::vector<int32_t> offsets, tokens, slots;
};

Plan plan_of(const std::vector<int32_t>& ids, int64_t k, int64_t E, int64_t threads, int64_t capacity = -1) {
  const int64_t T = int64_t(ids.size()) / k, S = capacity < 0 ? T * k : E * capacity;
  Plan plan{std::vector<int32_t>(E + 1, -7), std::vector<int32_t>(S, -7), std::vector<int32_t>(T * k, -7)};
  moert::cpu::permute_plan(ids.data(), T, k, E, capacity, threads, plan.offsets.data(), plan.tokens.data(),
                           plan.slots.data());
  return plan;
}

void small_plan() {
  const Plan plan = plan_of({2, 0, 0, 3, 2, -1}, 2, 3, 1);  // 3 is the sentinel
  EXPECT((plan.offsets == std::vector<int32_t>{0, 2, 2, 4}));
  EXPECT((plan.tokens == std::vector<int32_t>{0, 1, 0, 2, -1, -1}));
  EXPECT((plan.slots == std::vector<int32_t>{2, 0, 1, -1, 3, -1}));
}

// Two slots an expert: the third choice of expert 0 is dropped, experts 1 and 2 leave slots empty.
void small_capacity() {
  const Plan plan = plan_of({2, 0, 0, 3, 0, -1}, 2, 3, 1, 2);
  EXPECT((plan.offsets == std::vector<int32_t>{0, 2, 4, 6}));
  EXPECT((plan.tokens == std::vector<int32_t>{0, 1, -1, -1, 0, -1}));
  EXPECT((plan.slots == std::vector<int32_t>{4, 0, 1, -1, -1, -1}));
  float rows[6] = {1, 1, 1, 1, 1, 1};  // of no tokens, whose x may be null
  moert::cpu::permute_rows(nullptr, 3, moert::DType::f32, plan_of({}, 1, 2, 1, 1).tokens.data(), 0, 2, 3, 1, rows);
  for (const float value : rows) EXPECT(value == 0);
  EXPECT((plan_of({0, 1}, 1, 2, 1, 0).slots == std::vector<int32_t>{-1, -1}));
}

void no_tokens() { EXPECT((plan_of({}, 2, 3, 4).offsets == std::vector<int32_t>{0, 0, 0, 0})); }

// Whatever the threads: every kept choice has one slot, in its expert's range, in the order of the tokens.
void stable_on_any_threads() {
  const int64_t T = 50003, k = 3, E = 61;  // enough choices for several threads to share the sort
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
    const Plan few = plan_of(ids, k, E, threads, 1000), fewer = plan_of(ids, k, E, 1, 1000);
    EXPECT(few.offsets == fewer.offsets && few.tokens == fewer.tokens && few.slots == fewer.slots);
  }
}

// Rows of small integers, which every dtype holds exactly; `stride` elements from row to row, -99 between them.
template <typename T>
std::vector<T> integers(int64_t rows, int64_t H, int64_t stride, uint32_t state) {
  std::vector<T> x(rows * stride, from_float<T>(-99));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < H; ++h)
      x[r * stride + h] = from_float<T>(float(int((state = state * 1664525u + 1013904223u) >> 29) - 3));
  return x;
}

template <typename T, typename Value>
void rows_there_and_back(int64_t H, int64_t threads) {
  const int64_t tokens = 3, k = 2, S = tokens * k, stride = H + 3;
  const Plan plan = plan_of({2, 0, 0, 3, 2, -1}, k, 3, 1);
  const std::vector<Value> weights = {1, 2, -1, 5, 3, 7};
  const auto x = integers<T>(tokens, H, stride, 1), dy = integers<T>(tokens, H, stride, 2);
  const auto dtype = moert::DTypeOf<T>::value;

  std::vector<T> rows(S * H);
  moert::cpu::permute_rows(x.data(), stride, dtype, plan.tokens.data(), tokens, S, H, threads, rows.data());
  for (int64_t s = 0; s < S; ++s)
    for (int64_t h = 0; h < H; ++h) {
      const int64_t t = plan.tokens[s];
      EXPECT(to_value(rows[s * H + h]) == (t < 0 ? 0 : to_value(x[t * stride + h])));
    }

  std::vector<T> y(tokens * H), drows(S * H);
  std::vector<Value> dweights(S);
  moert::cpu::unpermute_rows(rows.data(), H, dtype, plan.slots.data(), weights.data(), dy.data(), stride, tokens, k, S,
                             H, threads, y.data());
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < H; ++h) {
      Value sum = to_value(dy[t * stride + h]);
      for (int64_t j = 0; j < k; ++j)
        if (plan.slots[t * k + j] >= 0) sum += weights[t * k + j] * to_value(x[t * stride + h]);
      EXPECT(to_value(y[t * H + h]) == sum);
    }
  moert::cpu::unpermute_rows(rows.data(), H, dtype, plan.slots.data(), weights.data(), nullptr, 0, tokens, k, S, H,
                             threads, y.data());
  moert::cpu::unpermute_rows_backward(dy.data(), stride, rows.data(), H, dtype, plan.tokens.data(), plan.slots.data(),
                                      weights.data(), tokens, k, S, H, threads, drows.data(), dweights.data());
  for (int64_t t = 0; t < tokens; ++t) {
    Value weight = 0, dot = 0;
    for (int64_t h = 0; h < H; ++h) dot += Value(to_value(x[t * stride + h]) * to_value(dy[t * stride + h]));
    for (int64_t j = 0; j < k; ++j) {
      const int64_t s = plan.slots[t * k + j];
      EXPECT(dweights[t * k + j] == (s < 0 ? 0 : dot));
      if (s < 0) continue;
      weight += weights[t * k + j];
      for (int64_t h = 0; h < H; ++h)
        EXPECT(to_value(drows[s * H + h]) == weights[t * k + j] * to_value(dy[t * stride + h]));
    }
    for (int64_t h = 0; h < H; ++h) EXPECT(to_value(y[t * H + h]) == weight * to_value(x[t * stride + h]));
  }
  for (int64_t i = plan.offsets[3] * H; i < S * H; ++i) EXPECT(to_value(drows[i]) == 0);
}

void rows_of_every_dtype() {
  for (int64_t threads : {1, 3})
    for (int64_t H : {0, 1, 7, 16, 33, 128, 300}) {
      rows_there_and_back<float, float>(H, threads);
      rows_there_and_back<moert::bf16, float>(H, threads);
      rows_there_and_back<moert::f16, float>(H, threads);
      rows_there_and_back<double, double>(H, threads);
    }
}

// A plan from a caller never reaches an address unchecked, and nothing is written before the error.
void refuses_bad_plans() {
  const std::vector<float> x(8);
  std::vector<float> rows(16, 5);
  for (int32_t bad : {4, -2, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()}) {
    const std::vector<int32_t> index = {0, 1, -1, bad};
    std::string message;
    try {
      moert::cpu::permute_rows(x.data(), 2, moert::DType::f32, index.data(), 4, 4, 2, 1, rows.data());
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    EXPECT(message == "tokens must hold -1 or be in [0, T=4), got " + std::to_string(bad));
    message.clear();
    try {
      moert::cpu::unpermute_rows(x.data(), 2, moert::DType::f32, index.data(), nullptr, nullptr, 0, 2, 2, 4, 2, 1,
                                 rows.data());
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    EXPECT(message == "slots must hold -1 or be in [0, S=4), got " + std::to_string(bad));
  }
  for (float value : rows) EXPECT(value == 5);
}

// What has 16 MB and more is stored past the caches: rows of lengths that begin anywhere, a dropped one among them.
void stores_past_the_caches() {
  constexpr int64_t T = 1100, k = 4, S = T * k;
  for (const int64_t H : {2055, 2048, 1921}) {
    std::vector<moert::bf16> x(T * H), rows(S * H + 1, moert::to_bf16(7)), drows = rows;
    for (size_t i = 0; i < x.size(); ++i) x[i] = moert::to_bf16(float(int64_t(i * 31 + i / 251) % 255 - 127));
    std::vector<int32_t> tokens(S), slots(S, -1);
    std::vector<int64_t> next(T, 0);
    for (int64_t s = 0; s < S; ++s) {
      tokens[s] = s % 97 == 5 ? -1 : int32_t(s * 389 % T);
      if (tokens[s] >= 0) slots[tokens[s] * k + next[tokens[s]]++] = int32_t(s);
    }
    const std::vector<float> weights(S, 0.5f);
    std::vector<float> dweights(S, 7);
    moert::cpu::permute_rows(x.data(), H, moert::DType::bf16, tokens.data(), T, S, H, 3, rows.data());
    moert::cpu::unpermute_rows_backward(x.data(), H, rows.data(), H, moert::DType::bf16, tokens.data(), slots.data(),
                                        weights.data(), T, k, S, H, 3, drows.data(), dweights.data());
    bool good = true;
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t h = 0; h < H; ++h) {
        const float value = tokens[s] < 0 ? 0 : moert::to_float(x[tokens[s] * H + h]);
        good &= moert::to_float(rows[s * H + h]) == value && moert::to_float(drows[s * H + h]) == value / 2;
      }
    }
    EXPECT(good);
    EXPECT(moert::to_float(rows[S * H]) == 7 && moert::to_float(drows[S * H]) == 7);
    for (int64_t i = 0; i < S; ++i) {
      double sum = 0;  // of integers: exact in float too
      for (int64_t h = 0; h < H; ++h) sum += std::pow(moert::to_float(x[i / k * H + h]), 2);
      EXPECT(dweights[i] == (slots[i] < 0 ? 0 : float(sum)));
    }
  }
}

// More tokens than slots: most of them have none.
void stores_few_rows_of_many_tokens() {
  constexpr int64_t T = 40000, S = 4200, H = 2050;  // 17 MB
  std::vector<moert::bf16> x(T * 2), rows(S * H, moert::to_bf16(7));
  for (int64_t i = 0; i < T * 2; ++i) x[i] = moert::to_bf16(float(i % 251));
  x.resize(T * 2 + H);
  std::vector<int32_t> tokens(S);
  for (int64_t s = 0; s < S; ++s) tokens[s] = s % 13 == 4 ? -1 : int32_t(s * 7919 % T);
  // Rows that overlap in x, two elements apart: as many tokens as this needs no more memory.
  moert::cpu::permute_rows(x.data(), 2, moert::DType::bf16, tokens.data(), T, S, H, 3, rows.data());
  bool good = true;
  for (int64_t s = 0; s < S; ++s)
    for (int64_t h = 0; h < H; ++h)
      good &= moert::to_float(rows[s * H + h]) == (tokens[s] < 0 ? 0 : moert::to_float(x[tokens[s] * 2 + h]));
  EXPECT(good);
}

// Rows that lie more than 2^31 elements and 2^32 bytes apart, in memory of which only the pages of the rows are there.
void rows_beyond_32_bits() {
  constexpr int64_t T = 3, S = 3, H = 40, stride = (int64_t(1) << 30) + 64;
  constexpr auto bf16 = moert::DType::bf16;
  void* memory =
      mmap(nullptr, 2 * (2 * stride + H), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  EXPECT(memory != MAP_FAILED);
  moert::bf16* x = static_cast<moert::bf16*>(memory);
  const auto value = [](int64_t t, int64_t h) { return float(t < 0 ? 0 : 16 * t + h % 7 + 1); };
  for (int64_t t = 0; t < T; ++t)
    for (int64_t h = 0; h < H; ++h) x[t * stride + h] = moert::to_bf16(value(t, h));

  const std::vector<int32_t> tokens = {2, -1, 0}, slots = {2, -1, 0};
  std::vector<moert::bf16> rows(S * H), y(T * H), drows(S * H);
  const std::vector<float> weights(T, 2);
  std::vector<float> dweights(T, 7);
  moert::cpu::permute_rows(x, stride, bf16, tokens.data(), T, S, H, 1, rows.data());
  moert::cpu::unpermute_rows(x, stride, bf16, slots.data(), nullptr, x, stride, T, 1, S, H, 1, y.data());
  moert::cpu::unpermute_rows_backward(x, stride, x, stride, bf16, tokens.data(), slots.data(), weights.data(), T, 1, S,
                                      H, 1, drows.data(), dweights.data());
  for (int64_t i = 0; i < T; ++i) {
    double dot = 0;
    for (int64_t h = 0; h < H; ++h) {
      EXPECT(moert::to_float(rows[i * H + h]) == value(tokens[i], h));
      EXPECT(moert::to_float(y[i * H + h]) == value(i, h) + value(slots[i], h));
      EXPECT(moert::to_float(drows[i * H + h]) == 2 * value(tokens[i], h));
      dot += value(slots[i], h) * value(i, h);
    }
    EXPECT(dweights[i] == float(dot));
  }

  // The row of slot 0 in a place of its own; those of slots 1 and 2 are rows 0 and 1 of the others.
  const std::vector<int32_t> returned = {2, -1, 0};
  moert::cpu::dispatch_combine(
      {x + stride, stride, x + stride, stride, 0, 1, bf16, returned.data(), x, stride, T, 1, S, H}, 1, y.data());
  for (int64_t i = 0; i < T; ++i)
    for (int64_t h = 0; h < H; ++h)
      EXPECT(moert::to_float(y[i * H + h]) == value(i, h) + value(i == 0 ? 2 : i == 1 ? -1 : 1, h));
  EXPECT(munmap(memory, 2 * (2 * stride + H)) == 0);
}

int main() {
  rows_beyond_32_bits();
  small_plan();
  small_capacity();
  no_tokens();
  stable_on_any_threads();
  rows_of_every_dtype();
  stores_past_the_caches();
  stores_few_rows_of_many_tokens();
  refuses_bad_plans();
}
