// The experts that a few tokens use between them, each computed for all of these tokens: a feed-forward network that is
// sparse in blocks.
#pragma once

#include <cstdint>

#include "moert/fused_experts.h"

namespace moert::cpu {

// The tokens and the list of experts.
struct UnionRows {
  int64_t T, n;
  Rows x;              // [T, H]
  const void* gains;   // [T, E], float32 (float64 where x is)
  const int32_t* ids;  // [n]; outside [0, E): left out
  // The bits of a row of y do not depend on the other rows, nor on listed experts whose gain is zero.
  bool batch_invariant = false;
};

// y [T, H] (dense, dtype of x): y[t] = sum over e in ids of gains[t, e] * FFN_e(x[t]), in the order of ids.
// The activations of all listed experts are one matrix [T, n*I], so that their second product is one sum.
void union_experts(const UnionRows& tokens, const ExpertWeights& experts, int64_t threads, void* y);

}  // namespace moert::cpu
