// What dispatch asks of an instruction set.
#pragma once

#include "moert/dispatch.h"

namespace moert::cpu {

struct DispatchKernels {
  // row [H], not of float64 -> its bytes, zeros and scale, scale_place(H) + 4 bytes.
  void (*round_row)(const void* row, DType dtype, int64_t H, Payload payload, void* rounded);
  void (*widen_row)(const void* rounded, int64_t H, Payload payload, DType dtype, void* row);
};

namespace generic {
extern const DispatchKernels dispatch_kernels;
}
namespace avx2 {
extern const DispatchKernels dispatch_kernels;
}
namespace avx512 {
extern const DispatchKernels dispatch_kernels;
}

}  // namespace moert::cpu
