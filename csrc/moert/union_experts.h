// The experts that a few tokens use between them, each computed for all of these tokens: a feed-forward network that is
// sparse in blocks.
#pragma once

#include <cstdint>

#include "moert/fused_experts.h"

namespace moert {

// The tokens and the list of experts.
struct UnionRows {
  int64_t T, n;
  Rows x;              // [T, H]
  const void* gains;   // [T, E], float32 (float64 where x is)
  const int32_t* ids;  // [n]; outside [0, E): left out
  // The bits of a row of y do not depend on the other rows, nor on listed experts whose gain is zero.
  bool batch_invariant = false;
};

namespace cpu {

// y [T, H] (dense, dtype of x): y[t] = sum over e in ids of gains[t, e] * FFN_e(x[t]), in the order of ids.
// The activations of all listed experts are one matrix [T, n*I], so that their second product is one sum.
void union_experts(const UnionRows& tokens, const ExpertWeights& experts, int64_t threads, void* y);

}  // namespace cpu

// The same on the current device, ordered by `stream` (a cudaStream_t); the pointers are the device's.  A row's bits
// never depend on the other rows.  For few tokens: experts are read again for each.
namespace cuda {

// Bytes of memory that union_experts works in.
int64_t union_experts_workspace(const UnionRows& tokens, const ExpertWeights& experts);

void union_experts(const UnionRows& tokens, const ExpertWeights& experts, void* workspace, void* stream, void* y);

}  // namespace cuda
}  // namespace moert
