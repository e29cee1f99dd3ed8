// The product of one tile.  Included by one translation unit per instruction set.
#pragma once

#include "cpu/gemm_dots.h"
#include "cpu/gemm_panels.h"

namespace moert::cpu {
namespace {

bool is_dots(const GemmTile& t) { return !t.a.k_rows && !t.b.k_rows && t.b.matrix.col_stride == 1 && t.M <= kDotRows; }

// What was stored past the caches is there before another thread is told.
void end_streams([[maybe_unused]] const GemmTile& t) {
#if defined(__x86_64__)
  if (t.finish && t.finish->stream) __builtin_ia32_sfence();
#endif
}

void gemm(const GemmTile& t) {
  if (is_dots(t))
    with_dtype(t.b.matrix.dtype, [&](auto x) { gemm_dots<Acc<decltype(x)>, decltype(x)>(t); });
  else if (t.b.matrix.dtype == DType::f64)
    gemm_panels<double>(t);
  else
    gemm_panels<float>(t);
  end_streams(t);
}

}  // namespace
}  // namespace moert::cpu
