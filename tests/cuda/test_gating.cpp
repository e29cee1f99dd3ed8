// The GPU's gating beside the CPU's: ids and scores of single logits are the same bits, softmaxes the same but for the
// order of their sums.
#include "moert/gating.h"

#include <limits>

#include "../cpp/expect.h"
#include "memory.h"
#include "random.h"

using namespace moert;

namespace {

struct Case {
  int64_t T, E, k;
  GatingOptions options;
  bool bias = false;
};

template <typename T>
using Weight = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
void compare(const Case& c, const std::vector<T>& logits, int64_t stride, size_t shift) {
  using W = Weight<T>;
  const DType dtype = DTypeOf<T>::value;
  Random random{uint64_t(c.E * 131 + c.k)};
  const std::vector<W> bias = numbers<W>(random, size_t(c.E), 0.25);
  std::vector<W> weights(size_t(c.T * c.k), W(-7)), dweights = numbers<W>(random, weights.size());
  std::vector<int32_t> ids(weights.size(), -7);
  OnDevice<T> logits_there(logits, shift);
  OnDevice<W> bias_there(bias), weights_there(weights), dweights_there(dweights);
  OnDevice<int32_t> ids_there(ids);
  cpu::topk_gating(logits.data(), dtype, stride, c.bias ? bias.data() : nullptr, c.T, c.E, c.k, c.options, 1,
                   weights.data(), ids.data());
  cuda::topk_gating(logits_there.data(), dtype, stride, c.bias ? bias_there.data() : nullptr, c.T, c.E, c.k, c.options,
                    nullptr, weights_there.data(), ids_there.data());
  EXPECT(ids_there.read() == ids);
  const std::vector<W> got = weights_there.read();
  const bool sums = c.options.renormalize || c.options.score == Score::softmax ||
                    c.options.score == Score::softmax_over_topk || dtype == DType::f64;
  EXPECT(rows_close(got, weights, size_t(c.k), sums ? 1e-6 : 0));

  // Gradients, with choices outside of [0, E).
  for (size_t i = 0; i < ids.size(); ++i)
    if (i % 7 == 3) ids[i] = i % 2 ? -1 : int32_t(c.E);
  copy(ids_there.data(), ids.data(), ids.size() * sizeof(int32_t));
  std::vector<T> dlogits(size_t(c.T * c.E), rounded<T>(-7));
  OnDevice<T> dlogits_there(dlogits);
  cpu::topk_gating_backward(dweights.data(), logits.data(), dtype, stride, ids.data(), c.T, c.E, c.k, c.options, 1,
                            dlogits.data());
  cuda::topk_gating_backward(dweights_there.data(), logits_there.data(), dtype, stride, ids_there.data(), c.T, c.E, c.k,
                             c.options, nullptr, dlogits_there.data());
  const double unit = sizeof(T) == 2 ? (dtype == DType::bf16 ? 0x1p-8 : 0x1p-11) : 2e-6;
  EXPECT(rows_close(dlogits_there.read(), dlogits, size_t(c.E), unit));
}

template <typename T>
void in_every_layout(const Case& c) {
  Random random{uint64_t(c.T * 31 + c.E)};
  for (const auto& [pad, shift] : {std::pair<int64_t, size_t>{0, 0}, {0, 1}, {5, 0}, {8, 0}}) {
    const int64_t stride = c.E + pad;
    std::vector<T> logits = numbers<T>(random, size_t(c.T * stride), 4);
    const T nan = rounded<T>(std::numeric_limits<double>::quiet_NaN());
    const T infinity = rounded<T>(std::numeric_limits<double>::infinity());
    compare(c, logits, stride, shift);
    if (c.T * c.E == 0) continue;
    for (int64_t i = 0; i < c.T * c.E; i += 11)
      logits[size_t(i / c.E * stride + i % c.E)] = i % 3   ? nan
                                                   : i % 2 ? rounded<T>(-value(infinity))
                                                           : rounded<T>(-0.0);
    if (c.options.score != Score::softmax_over_topk) compare(c, logits, stride, shift);
  }
}

GatingOptions with(Score score, bool renormalize = false, double scale = 1) {
  GatingOptions options;
  options.score = score;
  options.renormalize = renormalize;
  options.scale = scale;
  return options;
}

GatingOptions limited(GatingOptions options, int64_t groups, int64_t topk, GroupScore score) {
  options.num_groups = groups;
  options.topk_groups = topk;
  options.group_score = score;
  return options;
}

void tests() {
  const int64_t shapes[][3] = {{0, 8, 2},   {1, 1, 1},    {5, 6, 6},    {7, 60, 4},   {9, 64, 8},
                               {6, 129, 8}, {3, 256, 32}, {3, 500, 10}, {2, 1024, 9}, {3, 40, 0}};
  for (const auto& [T, E, k] : shapes)
    for (Score score : {Score::softmax, Score::softmax_over_topk, Score::sigmoid, Score::relu, Score::identity})
      for (bool renormalize : {false, true}) {
        const Case c{T, E, k, with(score, renormalize, renormalize ? 2.5 : 1), false};
        in_every_layout<float>(c);
        in_every_layout<bf16>(c);
        if (renormalize) continue;
        in_every_layout<f16>(c);
        in_every_layout<double>(c);
      }
  for (int64_t E : {8, 64, 256}) {
    for (GroupScore by : {GroupScore::max, GroupScore::top2}) {
      in_every_layout<float>({9, E, 4, limited(with(Score::sigmoid, true, 2.5), 4, 2, by), true});
      in_every_layout<bf16>({9, E, 3, limited(with(Score::identity), 4, 3, by), false});
      in_every_layout<double>({3, E, 2, limited(with(Score::relu), 4, 1, by), true});
    }
    in_every_layout<float>({9, E, 4, with(Score::sigmoid), true});
    in_every_layout<bf16>({9, E, 4, with(Score::identity, true), true});
  }
  in_every_layout<float>({4, 1024, 8, limited(with(Score::sigmoid), 32, 5, GroupScore::top2), true});
}

}  // namespace

int main() { return run_tests(tests); }
