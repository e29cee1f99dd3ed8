// What permute asks of an instruction set.  A "value" is float, or double where the rows are float64.
#pragma once

#include "moert/dtype.h"

namespace moert::cpu {

// Where the rows of slots lie, a stride apart: those in [first, last) in a place of their own, those before and after
// them one after the other.
struct RowPlaces {
  const void* rows;
  int64_t rows_stride;
  const void* own;
  int64_t own_stride;
  int32_t first, last;
};

// y [H] = start + sum over j of weights[j] * rows[slots[j]], in order; slots below 0 are left out.
struct SumOfRows {
  DType dtype;
  int64_t k, H;
  RowPlaces places;
  const int32_t* slots;  // [k]
  const void* weights;   // null or values [k]
  const void* start;     // null or [H]
  void* y;
  const int32_t* next_slots;  // null or [k]: of the sum that follows, whose rows are fetched meanwhile
};

// drow [H] = weight * dy.
struct RowGradient {
  DType dtype;
  int64_t H;
  const void *dy, *row;
  double weight;
  void* drow;
  bool stream;  // drow is written past the caches
};

struct PermuteKernels {
  // `bytes` from one place to another past the caches, which would read `to` before it is written.
  void (*stream_row)(const void* from, void* to, int64_t bytes);
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
