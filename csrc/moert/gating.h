// Gating: which experts a token goes to, and with what weights.
#pragma once

#include <cstdint>

#include "moert/dtype.h"

namespace moert {

enum class Score : int32_t { softmax, softmax_over_topk, sigmoid, relu, identity };
enum class GroupScore : int32_t { max, top2 };

struct GatingOptions {
  Score score = Score::softmax;
  bool renormalize = false;  // weights / (their sum + 1e-20)
  double scale = 1;          // of the weights, last
  int64_t num_groups = 1;    // experts in equal contiguous groups ...
  int64_t topk_groups = 1;   // ... of which only the best may be chosen
  GroupScore group_score = GroupScore::max;
};

}  // namespace moert

namespace moert::cpu {

// logits [T, E] of dtype, rows `stride` elements apart, bias [E] or null
//   -> weights [T, k] in the order of their selection scores, ids [T, k]; ties go to the lower id.
// bias and weights are float, or double where dtype is f64; so is the arithmetic.  A NaN loses to everything; the ids
// of a row are always distinct.  Needs 0 <= k <= topk_groups * E / num_groups.
void topk_gating(const void* logits, DType dtype, int64_t stride, const void* bias, int64_t T, int64_t E, int64_t k,
                 const GatingOptions& options, int64_t threads, void* weights, int32_t* ids);

// dweights [T, k] (float, or double), logits and ids as above -> dlogits [T, E] of dtype, contiguous.
// Ids outside [0, E) get no gradient.
void topk_gating_backward(const void* dweights, const void* logits, DType dtype, int64_t stride, const int32_t* ids,
                          int64_t T, int64_t E, int64_t k, const GatingOptions& options, int64_t threads,
                          void* dlogits);

}  // namespace moert::cpu

// The same on the current device, ordered by `stream` (a cudaStream_t); the pointers are the device's.  E is at most
// 1024, k and the groups at most 32.
namespace moert::cuda {

constexpr int64_t kMostExperts = 1024, kMostChoices = 32, kMostGroups = 32;

void topk_gating(const void* logits, DType dtype, int64_t stride, const void* bias, int64_t T, int64_t E, int64_t k,
                 const GatingOptions& options, void* stream, void* weights, int32_t* ids);

void topk_gating_backward(const void* dweights, const void* logits, DType dtype, int64_t stride, const int32_t* ids,
                          int64_t T, int64_t E, int64_t k, const GatingOptions& options, void* stream, void* dlogits);

}  // namespace moert::cuda
