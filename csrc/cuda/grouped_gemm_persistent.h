// Grouped GEMM by one persistent kernel for sm_90a, asked for by MOERT_PERSISTENT_GEMM=1 in the environment, which is
// looked at in every call.
#pragma once

#include "cuda/activation_backward.h"
#include "cuda/grouped_gemm_product.h"
#include "cuda/persistent_choice.h"

namespace moert::cuda {

// Whether the kernel is asked for, and the current device and the product, one that fits_tensor_cores, are of the kind:
// weights of which rows or columns lie side by side, and rows of x that are gathered or, where nothing is gated, lie in
// expert order.
template <typename T, class To>
bool takes_persistent(const Product<T, To>& p);

// Bytes with which products of few tiles are split along K; 0 where the kernel is not asked for.
int64_t persistent_workspace();

// The tile that the product gets.
template <typename T, class To>
PersistentTile tile_of(const Product<T, To>& p);

// T is bf16 or f16; rows that become those of ActivationBackward are gathered.
template <typename T, class To>
void grouped_gemm_persistent(const Product<T, To>& p, void* stream);

}  // namespace moert::cuda
