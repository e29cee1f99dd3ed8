// Expert choice: which tokens each expert takes, a top-k over the columns of the scores.
#pragma once

#include <cstdint>

#include "moert/dtype.h"

namespace moert::cpu {

// Of the tokens of segment d, expert e takes the capacity[d, e] with the largest scores, all where there are fewer;
// ties go to the earlier token.  scores [T, E] of dtype, rows `stride` elements apart; segments [T], where a token
// outside [0, D) takes no part; capacity [D, E].
//   -> ids [T, k] the experts that took the token in ascending order, then E; weights [T, k] their scores, then 0;
// weights are float, or double where dtype is f64.  With them the plan that permute_plan makes of the ids, but for the
// number of its slots: offsets [E+1], tokens [S], slots [T, k].  Throws where a score that takes part is NaN, where a
// capacity is negative, where more than k experts take a token and where all choices are more than S.
void expert_choice(const void* scores, DType dtype, int64_t stride, const int64_t* segments, const int64_t* capacity,
                   int64_t T, int64_t E, int64_t D, int64_t k, int64_t S, int64_t threads, void* weights, int32_t* ids,
                   int32_t* offsets, int32_t* tokens, int32_t* slots);

}  // namespace moert::cpu

// ids and weights of the same, without the plan, on the current device, ordered by `stream` (a cudaStream_t); the
// pointers are the device's.  Nothing is thrown for what lies in the device's memory: a NaN is taken last, a negative
// capacity is none, and of more than k experts that take a token the first k are kept.
namespace moert::cuda {

// Bytes of memory that expert_choice works in.
int64_t expert_choice_workspace(int64_t E, int64_t D);

void expert_choice(const void* scores, DType dtype, int64_t stride, const int64_t* segments, const int64_t* capacity,
                   int64_t T, int64_t E, int64_t D, int64_t k, void* workspace, void* stream, void* weights,
                   int32_t* ids);

}  // namespace moert::cuda
