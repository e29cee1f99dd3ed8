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
