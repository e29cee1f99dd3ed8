// Permute: rows from token order to expert order and back.
//
// Rows are H elements of one dtype side by side, `_stride` elements from one row to the next; outputs are dense.
// Sums are float32, float64 where the rows are float64; that is also the type of weights and dweights.
#pragma once

#include <cstdint>

#include "moert/dtype.h"

namespace moert::cpu {

// Stable counting sort of the routing: ids [T, k], any id outside [0, E) is dropped.
//   offsets [E+1]   the slots of expert e are offsets[e] .. offsets[e+1]-1; offsets[E] is the number of slots in use
//   tokens  [T*k]   token of each slot; -1 from offsets[E] on
//   slots   [T, k]  slot of each (token, choice); -1 where it was dropped
// With a capacity (-1: none) every expert owns `capacity` slots: tokens has E * capacity, -1 where the expert has fewer
// choices, and an expert's later choices are dropped.
void permute_plan(const int32_t* ids, int64_t T, int64_t k, int64_t E, int64_t capacity, int64_t threads,
                  int32_t* offsets, int32_t* tokens, int32_t* slots);

// Throws where offsets, tokens [S] and slots [T, k] are not what permute_plan makes of the ids, but for the number S of
// slots, which may be any that is enough.
void check_plan(const int32_t* ids, int64_t T, int64_t k, int64_t E, int64_t S, const int32_t* offsets,
                const int32_t* tokens, const int32_t* slots);

// rows[s] = x[tokens[s]], zero where tokens[s] is -1.  x [T, H], tokens [S] -> rows [S, H].
// Throws, before it writes, where a token is outside [-1, T).
void permute_rows(const void* x, int64_t x_stride, DType dtype, const int32_t* tokens, int64_t T, int64_t S, int64_t H,
                  int64_t threads, void* rows);

// y[t] = residual[t] + sum over j, in order, of weights[t, j] * rows[slots[t, j]]; choices whose slot is -1 are left
// out.  rows [S, H], slots [T, k], weights [T, k] (null: all one), residual [T, H] (null: zero) -> y [T, H].
// Throws, before it writes, where a slot is outside [-1, S).
void unpermute_rows(const void* rows, int64_t rows_stride, DType dtype, const int32_t* slots, const void* weights,
                    const void* residual, int64_t residual_stride, int64_t T, int64_t k, int64_t S, int64_t H,
                    int64_t threads, void* y);

// The gradients of unpermute_rows: drows[slots[t, j]] = weights[t, j] * dy[t], dweights[t, j] = <rows[slots[t, j]],
// dy[t]>. dy [T, H], rows [S, H], tokens [S], slots [T, k], weights [T, k] -> drows [S, H], dweights [T, k]; both are
// zero where nothing was routed.  Throws, before it writes, where a token or a slot is out of range.
void unpermute_rows_backward(const void* dy, int64_t dy_stride, const void* rows, int64_t rows_stride, DType dtype,
                             const int32_t* tokens, const int32_t* slots, const void* weights, int64_t T, int64_t k,
                             int64_t S, int64_t H, int64_t threads, void* drows, void* dweights);

}  // namespace moert::cpu

// The same on the current device, ordered by `stream` (a cudaStream_t); the pointers are the device's.  Nothing is
// thrown for what lies in the device's memory: a token or slot out of range counts as -1.
namespace moert::cuda {

constexpr int64_t kMostPlanExperts = 12288;  // E of a plan: a counter each fits a block's shared memory

// Bytes of memory that permute_plan works in.
int64_t permute_plan_workspace(int64_t T, int64_t k, int64_t E);

void permute_plan(const int32_t* ids, int64_t T, int64_t k, int64_t E, int64_t capacity, void* workspace, void* stream,
                  int32_t* offsets, int32_t* tokens, int32_t* slots);

void permute_rows(const void* x, int64_t x_stride, DType dtype, const int32_t* tokens, int64_t T, int64_t S, int64_t H,
                  void* stream, void* rows);

void unpermute_rows(const void* rows, int64_t rows_stride, DType dtype, const int32_t* slots, const void* weights,
                    const void* residual, int64_t residual_stride, int64_t T, int64_t k, int64_t S, int64_t H,
                    void* stream, void* y);

void unpermute_rows_backward(const void* dy, int64_t dy_stride, const void* rows, int64_t rows_stride, DType dtype,
                             const int32_t* tokens, const int32_t* slots, const void* weights, int64_t T, int64_t k,
                             int64_t S, int64_t H, void* stream, void* drows, void* dweights);

// ids [T, k] of integers of `bytes` bytes, rows and columns the strides apart -> out [T, k], -1 for what is outside
// [0, E).
void narrow_ids(const void* ids, int64_t bytes, bool is_signed, int64_t row_stride, int64_t column_stride, int64_t T,
                int64_t k, int64_t E, void* stream, int32_t* out);

}  // namespace moert::cuda
