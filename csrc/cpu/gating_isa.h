// One declaration per instruction set; gating.cpp picks at run time.
#pragma once

#include "moert/gating.h"

namespace moert::cpu {

struct GatingCall {
  const void* logits;
  DType dtype;
  int64_t stride;
  const void* bias;
  int64_t T, E, k;
  const GatingOptions* options;
  void* weights;  // read by the backward: dweights
  int32_t* ids;   // read by the backward
  void* dlogits;  // written by the backward
};

// Rows of 64 bytes that a thread needs: experts and their keys, the choices in blocks of 16, their ids and keys, then
// the groups.
constexpr int64_t gating_scratch_rows(int64_t E, int64_t k, int64_t num_groups) {
  return (E + 15) / 16 * 32 + (k + 15) / 16 * 48 + 2 * num_groups;
}

// Tokens [begin, end) of the call; scratch is aligned to 64 bytes.
using GatingKernel = void (*)(const GatingCall& call, int64_t begin, int64_t end, void* scratch);

struct GatingKernels {
  GatingKernel forward, backward;
};

namespace generic {
extern const GatingKernels gating_kernels, gating_kernels_f64;
}
namespace avx2 {
extern const GatingKernels gating_kernels;
}
namespace avx512 {
extern const GatingKernels gating_kernels;
}

}  // namespace moert::cpu
