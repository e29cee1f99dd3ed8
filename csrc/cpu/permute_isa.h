// What permute asks of an instruction set.  A "value" is float, or double where the rows are float64.
#pragma once

#include "moert/dtype.h"

namespace moert::cpu {

// y [H] = start + sum over j of weights[j] * rows[slots[j]], in order; slots below 0 are left out.
struct SumOfRows {
  DType dtype;
  int64_t k, H;
  const void* rows;
  int64_t rows_stride;
  const int32_t* slots;  // [k]
  const void* weights;   // null or values [k]
  const void* start;     // null or [H]
  void* y;
};

// drow [H] = weight * dy.
struct RowGradient {
  DType dtype;
  int64_t H;
  const void *dy, *row;
  double weight;
  void* drow;
};

struct PermuteKernels {
  void (*sum_rows)(const SumOfRows&);
  // Returns <row, dy>, a sum of values.
  double (*row_gradient)(const RowGradient&);
};

namespace generic {
extern const PermuteKernels permute_kernels;
}
namespace avx2 {
extern const PermuteKernels permute_kernels;
}
namespace avx512 {
extern const PermuteKernels permute_kernels;
}

}  // namespace moert::cpu
