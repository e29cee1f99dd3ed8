// The product of one tile.  Included by one translation unit per instruction set.
#pragma once

#include "cpu/gemm_dots.h"
#include "cpu/gemm_panels.h"

namespace moert::cpu {
namespace {

// With more rows packing panels costs less than to read all rows of x from the L2 cache for every block of weight rows,
// which are half as many without AVX-512: on a Zen 3 less at 48, more at 32.
#if defined(__AVX512F__)
constexpr int64_t kMostDotRows = kDotRows;
#else
constexpr int64_t kMostDotRows = 40;
#endif
static_assert(kMostDotRows <= kDotRows);

bool is_dots(const GemmTile& t) {
  const bool along_k = !t.a.k_rows && !t.b.k_rows && !t.b.panels && t.b.matrix.col_stride == 1;
  return along_k && (t.M <= kMostDotRows || t.batch_invariant);
}

// gemm_dots in equal parts of at most kMostDotRows rows.
template <typename E, typename T>
void gemm_dots_in_parts(const GemmTile& t) {
  const int64_t parts = t.M > kMostDotRows ? (t.M + kMostDotRows - 1) / kMostDotRows : 1;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t m = t.M * i / parts;
    GemmTile part = t;
    TileMatrix& a = part.a.matrix;
    part.M = t.M * (i + 1) / parts - m;
    if (a.index)
      a.index += m;
    else
      a.data = static_cast<const char*>(a.data) + m * a.row_stride * size_of(a.dtype);
    part.c = static_cast<Acc<T>*>(t.c) + m * kTileColumns;
    if (t.c2) part.c2 = static_cast<Acc<T>*>(t.c2) + m * kTileColumns;
    gemm_dots<E, T>(part);
  }
}

void gemm(const GemmTile& t) {
  if (is_dots(t))
    with_dtype(t.b.matrix.dtype, [&](auto x) { gemm_dots_in_parts<Acc<decltype(x)>, decltype(x)>(t); });
  else if (t.b.matrix.dtype == DType::f64)
    gemm_panels<double>(t);
  else
    gemm_panels<float>(t);
}

}  // namespace
}  // namespace moert::cpu
