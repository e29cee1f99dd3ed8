// fused_experts of a few tokens, and union_experts: no sort, every choice by itself.
#pragma once

#include "moert/fused_experts.h"
#include "moert/union_experts.h"

namespace moert::cuda {

// From so many tokens on sorting them by expert pays, because experts that several chose are read once.
constexpr int64_t kFewTokens = 4;

// Bytes of memory that the first product is kept in.
int64_t few_tokens_workspace(DType dtype, int64_t choices, int64_t I);

void fused_experts_few(const RoutedRows& tokens, const ExpertWeights& experts, void* workspace, void* stream, void* y);

}  // namespace moert::cuda
