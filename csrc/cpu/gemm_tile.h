// The product of one tile.  Included by one translation unit per instruction set.
#pragma once

#include "cpu/gemm_dots.h"
#include "cpu/gemm_panels.h"

namespace moert::cpu {
namespace {

void gemm(const GemmTile& t) {
  const bool along_k = !t.a.k_rows && !t.b.k_rows && t.b.matrix.col_stride == 1;
  if (along_k && t.M <= kDotRows)
    with_dtype(t.b.matrix.dtype, [&](auto x) { gemm_dots<decltype(x)>(t); });
  else if (t.b.matrix.dtype == DType::f64)
    gemm_panels<double>(t);
  else
    gemm_panels<float>(t);
#if defined(__x86_64__)
  if (t.finish && t.finish->stream) __builtin_ia32_sfence();  // before another thread is told
#endif
}

}  // namespace
}  // namespace moert::cpu
