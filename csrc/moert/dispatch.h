// Dispatch: rows packed for the ranks that hold their experts.  R ranks; E experts, of all ranks together.
#pragma once

#include <cstdint>

#include "moert/dtype.h"

namespace moert {

// What the elements of a row travel as: themselves, or in eight bits each with one float32 scale for the row.
enum class Payload : int32_t { none, int8, float8_e4m3 };

static constexpr float largest_of(Payload payload) { return payload == Payload::int8 ? 127.0f : 448.0f; }

// Where the scale of a rounded row of H elements lies: after its bytes and zeros up to a multiple of 4.
static constexpr int64_t scale_place(int64_t H) { return (H + 3) / 4 * 4; }

// A row as it travels: its H elements, its k routing weights, its k expert ids (int16, of the experts of the rank it
// goes to; -1 for a choice that goes elsewhere or nowhere), and nothing up to a multiple of 16 bytes.
struct RecordLayout {
  int64_t weights, ids, bytes;  // where the weights and the ids begin; the size of it all
};

constexpr RecordLayout record_layout(int64_t H, int64_t element_size, int64_t k, int64_t weight_size,
                                     Payload payload = Payload::none) {
  const int64_t row = payload == Payload::none ? H * element_size : scale_place(H) + 4;
  const int64_t weights = (row + weight_size - 1) / weight_size * weight_size;
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
  Payload payload = Payload::none;  // else weights are float32, and rows not float64
  int64_t first = 0, last = N;      // the slots whose records are asked for
};

// Records of rounded rows back to rows.
struct Unpacking {
  const void* records;  // [M], `bytes` from one to the next
  int64_t bytes;
  Payload payload;  // not none
  DType dtype;      // of the rows, not float64
  int64_t M, H;
};

// Rows of each token added up: rows [S - O, H] and `own` [O, H], the rows of slots first .. first + O.
struct Returned {
  const void* rows;
  int64_t rows_stride;
  const void* own;
  int64_t own_stride, first, O;
  DType dtype;
  const int32_t* slots;  // [T, k]
  const void* residual;  // [T, H] or null: zero
  int64_t residual_stride, T, k, S, H;
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

// records [last - first, record_layout(...).bytes]: the row of each slot, as it travels.  Weights of choices that do
// not travel with it are zero.  Throws, before it writes, where an offset, a token or a local id is out of range.
//
// A rounded row: its scale is the largest magnitude over that of the type, in float32; each element over the scale goes
// to the nearest value of the type, ties to even.  A row with a value that is not finite in float32 gets the scale NaN.
void dispatch_pack(const Packing& packing, int64_t threads, void* records);

// rows [M, H]: element times scale, within float32, in dtype.
void dispatch_unpack(const Unpacking& unpacking, int64_t threads, void* rows);

// y [T, H] = residual + each token's rows, in the order of its choices, as unpermute_rows without weights adds them.
// Throws, before it writes, where a slot is outside [-1, S).
void dispatch_combine(const Returned& returned, int64_t threads, void* y);

}  // namespace moert::cpu

// The same on the current device, ordered by `stream` (a cudaStream_t); the pointers are the device's.  Nothing is
// thrown for what lies in the device's memory: a rank, token, slot or local id out of range counts as none.
namespace moert::cuda {

// Bytes of memory that dispatch_plan works in.
int64_t dispatch_plan_workspace(int64_t T, int64_t k, int64_t R);

void dispatch_plan(const int32_t* ids, int64_t T, int64_t k, const int32_t* expert_to_rank, int64_t E, int64_t R,
                   void* workspace, void* stream, int32_t* offsets, int32_t* tokens, int32_t* slots);

void dispatch_pack(const Packing& packing, void* stream, void* records);

void dispatch_unpack(const Unpacking& unpacking, void* stream, void* rows);

void dispatch_combine(const Returned& returned, void* stream, void* y);

}  // namespace moert::cuda
