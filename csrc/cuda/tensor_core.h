// What the kernels over tensor cores are written in: asynchronous copies, ldmatrix and mma.  Instructions under nvcc,
// in the host emulation functions of the same name (emulate_tensor_core.h).
#pragma once

#include <cute/tensor.hpp>

#if !defined(__CUDACC__)
#include "cuda/emulate_tensor_core.h"
#endif

#include "cuda/simt.h"

namespace moert::cuda {

#if defined(__CUDACC__)

using Ldmatrix = cute::SM75_U32x4_LDSM_N;
using LdmatrixTransposed = cute::SM75_U16x8_LDSM_T;
using MmaBf16 = cute::SM80_16x8x16_F32BF16BF16F32_TN;
using MmaF16 = cute::SM80_16x8x16_F32F16F16F32_TN;
using MmaInt8 = cute::SM80_16x8x32_S32S8S8S32_TN;
using MmaTf32 = cute::SM80_16x8x8_F32TF32TF32F32_TN;

// 16 bytes from global to shared memory; zeros where `inside` is false, and then nothing is read.
MOERT_DEVICE_INLINE void copy_async(void* to, const void* from, bool inside) {
  const uint32_t address = cute::cast_smem_ptr_to_uint(to);
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}

// The thread's copies since the last call are one group.
MOERT_DEVICE_INLINE void close_group() { cute::cp_async_fence(); }

// Waits for all groups but the newest n.
template <int n>
MOERT_DEVICE_INLINE void wait_groups() {
  cute::cp_async_wait<n>();
}

#endif

}  // namespace moert::cuda
