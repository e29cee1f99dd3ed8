// Gating: which experts a token goes to, and with what weights.
#pragma once

#include <cstdint>

#include "moert/dtype.h"

namespace moert {

enum class Score : int32_t { softmax, softmax_over_topk, sigmoid, relu };
enum class GroupScore : int32_t { max, top2 };

struct GatingOptions {
  Score score = Score::softmax;
  bool renormalize = false;    // weights / (their sum + 1e-20)
  float scale = 1;             // of the weights, last
  int64_t num_groups = 1;      // experts in equal contiguous groups ...
  int64_t topk_groups = 1;     // ... of which only the best may be chosen
  GroupScore group_score = GroupScore::max;
};

}  // namespace moert
