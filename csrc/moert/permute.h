// Permute: rows from token order to expert order and back.
#pragma once

#include <cstdint>

namespace moert::cpu {

// Stable counting sort of the routing: ids [T, k], any id outside [0, E) is dropped.
//   offsets [E+1]   the slots of expert e are offsets[e] .. offsets[e+1]-1; offsets[E] is the number of slots in use
//   tokens  [T*k]   token of each slot; -1 from offsets[E] on
//   slots   [T, k]  slot of each (token, choice); -1 where it was dropped
void permute_plan(const int32_t* ids, int64_t T, int64_t k, int64_t E, int64_t threads, int32_t* offsets,
                  int32_t* tokens, int32_t* slots);

}  // namespace moert::cpu
