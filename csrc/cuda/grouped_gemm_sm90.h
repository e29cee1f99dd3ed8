// Grouped GEMM by CUTLASS's pointer-array kernel for sm_90a: TMA, wgmma, one problem an expert.
#pragma once

#include "cuda/grouped_gemm_product.h"

namespace moert::cuda {

// Whether the current device and the product are of the kind: one that fits_tensor_cores, of 16-bit elements, with x in
// expert order and nothing for an epilogue to do.
template <typename T>
bool takes_pointer_arrays(const Product<T>& p);

// Bytes of device memory that E experts' problems need on the current device; 0 where it has no such kernel.
int64_t pointer_array_workspace(int64_t E);

// `workspace` is aligned to 256.
template <typename T>
void grouped_gemm_by_pointer_arrays(const Product<T>& p, void* workspace, void* stream);

}  // namespace moert::cuda
