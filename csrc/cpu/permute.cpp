#include "moert/permute.h"

#include <algorithm>

namespace moert::cpu {

void permute_plan(const int32_t* ids, int64_t T, int64_t k, int64_t E, int64_t /*threads*/, int32_t* offsets,
                  int32_t* tokens, int32_t* slots) {
  const int64_t n = T * k;
  std::fill(offsets, offsets + E + 1, 0);
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] >= 0 && ids[i] < E) ++offsets[ids[i] + 1];
  for (int64_t e = 0; e < E; ++e) offsets[e + 1] += offsets[e];
  std::fill(tokens, tokens + n, -1);
  // offsets[e] runs ahead to the start of expert e + 1 while slots are given out, then all move back by one.
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = ids[i] >= 0 && ids[i] < E;
    slots[i] = kept ? offsets[ids[i]]++ : -1;
    if (kept) tokens[slots[i]] = int32_t(i / k);
  }
  for (int64_t e = E; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

}  // namespace moert::cpu
