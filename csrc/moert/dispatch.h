// Dispatch: rows packed for the ranks that hold their experts.  R ranks; E experts, of all ranks together.
#pragma once

#include <cstdint>

#include "moert/dtype.h"

namespace moert {

// A row as it travels: its H elements, its k routing weights, its k expert ids (int16, of the experts of the rank it
// goes to; -1 for a choice that goes elsewhere or nowhere), and nothing up to a multiple of 16 bytes.
struct RecordLayout {
  int64_t weights, ids, bytes;  // where the weights and the ids begin; the size of it all
};

constexpr RecordLayout record_layout(int64_t H, int64_t element_size, int64_t k, int64_t weight_size) {
  const int64_t weights = (H * element_size + weight_size - 1) / weight_size * weight_size;
  const int64_t ids = weights + k * weight_size;
  const int64_t end = ids + 2 * k;
  return {weights, ids, end ? (end + 15) / 16 * 16 : 16};  // a record of nothing is one still
}

constexpr int64_t kMostLocalExperts = 32767;  // what an id of 16 bits can tell apart

struct Packing {
  const void* x;  // [T, H], x_stride elements from row to row
  int64_t x_stride;
  DType dtype;
  const void* weights;  // [T, k], elements of weight_size bytes
  int64_t weight_size;
  const int32_t* ids;             // [T, k]
  const int32_t* expert_to_rank;  // [E]
  const int32_t* local_ids;       // [E], in [0, kMostLocalExperts]
  const int32_t* offsets;         // [R+1]
  const int32_t* tokens;          // [N], N = offsets[R]
  int64_t T, H, k, E, R, N;
};

}  // namespace moert

namespace moert::cpu {

// Stable counting sort of the tokens by rank, a token once for each rank that has one of its experts.
// ids [T, k], those outside [0, E) are dropped; expert_to_rank [E], in [0, R).
//   offsets [R+1]   the slots of rank r are offsets[r] .. offsets[r+1]-1
//   tokens  [T*k]   token of each slot; -1 from offsets[R] on
//   slots   [T, k]  slot of the token's copy that choice j needs, at the first choice that needs it; else -1
// Throws, before it writes, where a rank is outside [0, R).
void dispatch_plan(const int32_t* ids, int64_t T, int64_t k, const int32_t* expert_to_rank, int64_t E, int64_t R,
                   int64_t threads, int32_t* offsets, int32_t* tokens, int32_t* slots);

// records [N, record_layout(...).bytes]: the row of each slot, as it travels.  Weights of choices that do not travel
// with it are zero.  Throws, before it writes, where an offset, a token or a local id is out of range.
void dispatch_pack(const Packing& packing, int64_t threads, void* records);

}  // namespace moert::cpu

// The same on the current device, ordered by `stream` (a cudaStream_t); the pointers are the device's.  Nothing is
// thrown for what lies in the device's memory: a rank, token or local id out of range counts as none.
namespace moert::cuda {

// Bytes of memory that dispatch_plan works in.
int64_t dispatch_plan_workspace(int64_t T, int64_t k, int64_t R);

void dispatch_plan(const int32_t* ids, int64_t T, int64_t k, const int32_t* expert_to_rank, int64_t E, int64_t R,
                   void* workspace, void* stream, int32_t* offsets, int32_t* tokens, int32_t* slots);

void dispatch_pack(const Packing& packing, void* stream, void* records);

}  // namespace moert::cuda
