// What the GPU's operators refuse, in which words, and how many kernels one of them starts.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../cpp/expect.h"
#include "cuda/gpu.h"
#include "memory.h"
#include "moert/dispatch.h"
#include "moert/fused_experts.h"
#include "moert/gating.h"
#include "moert/permute.h"
#include "random.h"

#if defined(MOERT_EMULATED)
#include "cuda/emulate.h"
#endif

using namespace moert;

namespace {

void test_words() {
  EXPECT(words([] { cuda::require_capability(7, 5, 3); }) ==
         "the GPU must have compute capability >= 8.0, got 7.5 (device 3)");
  EXPECT(words([] { cuda::require_capability(12, 0, 0); }) == "nothing is thrown");
  GatingOptions options;
  const auto gating = [&](int64_t E, int64_t k) {
    return words(
        [&] { cuda::topk_gating(nullptr, DType::f32, E, nullptr, 1, E, k, options, nullptr, nullptr, nullptr); });
  };
  EXPECT(gating(1025, 2) == "logits must have at most 1024 experts on a GPU, got E=1025");
  EXPECT(gating(64, 33) == "k must be at most 32 on a GPU, got 33");
  options.num_groups = 64;
  EXPECT(gating(128, 2) == "num_groups must be at most 32 on a GPU, got 64");
  EXPECT(words([] { cuda::permute_plan(nullptr, 1, 1, 12289, -1, nullptr, nullptr, nullptr, nullptr, nullptr); }) ==
         "num_experts must be at most 12288 on a GPU, got 12289");
  EXPECT(words([] { cuda::narrow_ids(nullptr, 4, true, 1, 1, int64_t(1) << 40, 1, 8, nullptr, nullptr); }) ==
         "a grid must have at most 2^31 - 1 by 65535 blocks, got 4294967296 by 1");
  EXPECT(words([] {
           const int64_t T = 2, H = 8, I = 4;
           bf16 some[1];
           ExpertWeights w{};
           w.E = 1, w.H = H, w.I = I;
           w.gate = {some, DType::bf16, 2 * I * H, H, 1};
           w.up = {some + 3 * H, DType::bf16, 2 * I * H, H, 1};
           w.down = {some, DType::bf16, H * I, I, 1};
           const RoutedRows rows{T, 1, {some, DType::bf16, H}, nullptr, nullptr};
           cuda::fused_experts_backward({some, DType::bf16, H}, rows, w, some, nullptr, nullptr, {});
         }) ==
         "w1 must hold its gate and up rows one after the other or in turns, got halves that are 24 elements apart");
  setenv("MOERT_FUSED_COMBINE", "yes", 1);
  EXPECT(words([] { cuda::is_on("MOERT_FUSED_COMBINE"); }) == "MOERT_FUSED_COMBINE must be 0 or 1, got yes");
  unsetenv("MOERT_FUSED_COMBINE");
  EXPECT(!cuda::is_on("MOERT_FUSED_COMBINE"));
}

#if defined(MOERT_EMULATED)

template <typename F>
int64_t kernels_of(const F& f) {
  const int64_t before = emulate::kernels_run;
  f();
  return emulate::kernels_run - before;
}

int64_t kernels_of_gating(int64_t T, int64_t E, int64_t k) {
  OnDevice<float> logits(std::vector<float>(size_t(T * E))), weights(std::vector<float>(size_t(T * k)));
  OnDevice<int32_t> ids(std::vector<int32_t>(size_t(T * k)));
  return kernels_of([&] {
    cuda::topk_gating(logits.data(), DType::f32, E, nullptr, T, E, k, {}, nullptr, weights.data(), ids.data());
  });
}

int64_t kernels_of_plan(int64_t T, int64_t k, int64_t E) {
  OnDevice<int32_t> ids(std::vector<int32_t>(size_t(T * k))), offsets(std::vector<int32_t>(size_t(E + 1))),
      tokens(std::vector<int32_t>(size_t(T * k))), slots(std::vector<int32_t>(size_t(T * k)));
  OnDevice<char> workspace(std::vector<char>(size_t(cuda::permute_plan_workspace(T, k, E))));
  return kernels_of([&] {
    cuda::permute_plan(ids.data(), T, k, E, -1, workspace.data(), nullptr, offsets.data(), tokens.data(), slots.data());
  });
}

int64_t kernels_of_experts(int64_t T, bool planned) {
  const int64_t k = 2, E = 4, H = 16, I = 8;
  OnDevice<bf16> x(std::vector<bf16>(size_t(T * H))), w1(std::vector<bf16>(size_t(E * 2 * I * H))),
      w2(std::vector<bf16>(size_t(E * H * I))), y(std::vector<bf16>(size_t(T * H)));
  OnDevice<float> weights(std::vector<float>(size_t(T * k)));
  OnDevice<int32_t> ids(std::vector<int32_t>(size_t(T * k))), offsets(std::vector<int32_t>(size_t(E + 1))),
      tokens(std::vector<int32_t>(size_t(T * k))), slots(std::vector<int32_t>(size_t(T * k)));
  RoutedRows rows{T, k, {x.data(), DType::bf16, H}, ids.data(), weights.data()};
  if (planned) rows.offsets = offsets.data(), rows.tokens = tokens.data(), rows.slots = slots.data(), rows.S = T * k;
  ExpertWeights w{};
  w.E = E, w.H = H, w.I = I;
  w.gate = {w1.data(), DType::bf16, 2 * I * H, H, 1};
  w.up = {w1.data() + I * H, DType::bf16, 2 * I * H, H, 1};
  w.down = {w2.data(), DType::bf16, H * I, I, 1};
  OnDevice<char> workspace(std::vector<char>(size_t(cuda::fused_experts_workspace(rows, w, false))));
  return kernels_of([&] { cuda::fused_experts(rows, w, workspace.data(), nullptr, y.data(), nullptr); });
}

void test_launches() {
  for (const int64_t E : {8, 128, 1024}) EXPECT(kernels_of_gating(9, E, 8) == 1);
  EXPECT(kernels_of_gating(2, 40, 32) == 1);
  EXPECT(kernels_of_plan(1, 8, 128) == 1);
  EXPECT(kernels_of_plan(512, 8, 128) == 1);
  EXPECT(kernels_of_plan(513, 8, 128) == 3);
  EXPECT(kernels_of_plan(32768, 8, 128) == 3);
  for (const int64_t T : {1, 2, 3, 4}) EXPECT(kernels_of_experts(T, false) == 2);
  EXPECT(kernels_of_experts(5, false) == 4);  // the plan, two products, the sums
  EXPECT(kernels_of_experts(5, true) == 3);
}

#endif

void tests() {
  test_words();
#if defined(MOERT_EMULATED)
  test_launches();
#endif
}

}  // namespace

int main() { return run_tests(tests); }
