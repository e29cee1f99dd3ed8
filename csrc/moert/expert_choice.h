// Expert choice: which tokens each expert takes, a top-k over the columns of the scores.
#pragma once

#include <cstdint>

#include "moert/dtype.h"

namespace moert::cpu {

// Of the tokens of segment d, expert e takes the capacity[d, e] with the largest scores, all where there are fewer;
// ties go to the earlier token.  scores [T, E] of dtype, rows `stride` elements apart; segments [T], where a token
// outside [0, D) takes no part; capacity [D, E].
//   -> ids [T, k] the experts that took the token in ascending order, then E; weights [T, k] their scores, then 0;
// weights are float, or double where dtype is f64.  Throws where a score that takes part is NaN, where a capacity is
// negative and where more than k experts take a token.
void expert_choice(const void* scores, DType dtype, int64_t stride, const int64_t* segments, const int64_t* capacity,
                   int64_t T, int64_t E, int64_t D, int64_t k, int64_t threads, void* weights, int32_t* ids);

}  // namespace moert::cpu
