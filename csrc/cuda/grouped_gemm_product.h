// Grouped products as the kernels take them: sizes, typed pointers, strides in elements.
#pragma once

#include "cuda/epilogue.h"
#include "moert/grouped_gemm.h"

namespace moert::cuda {

// Rows of a matrix; row r is the stored row index[r] where there is an index, and null where that is none.
template <typename T>
struct RowsOf {
  const T* data;
  int64_t stride;
  const int32_t* index;
  int64_t count;

  explicit RowsOf(const Rows& rows)
      : data(static_cast<const T*>(rows.data)), stride(rows.stride), index(rows.index), count(rows.count) {}

  MOERT_HOST_DEVICE const T* row(int64_t r) const {
    const int64_t stored = index ? index[r] : r;
    return uint64_t(stored) < uint64_t(count) ? data + stored * stride : nullptr;
  }
};

template <typename T>
struct MatrixOf {
  T* data;
  int64_t expert, row, column;  // strides

  explicit MatrixOf(const ExpertMatrix& m)
      : data(static_cast<T*>(const_cast<void*>(m.data))),
        expert(m.expert_stride),
        row(m.row_stride),
        column(m.col_stride) {}

  MOERT_HOST_DEVICE int64_t offset(int64_t e, int64_t r, int64_t c) const { return e * expert + r * row + c * column; }
  MOERT_HOST_DEVICE T* at(int64_t e, int64_t r, int64_t c) const { return data + offset(e, r, c); }
};

// y[s] = epilogue of x[s] . w[expert of s]^T.  Where the epilogue takes it, w is the gate half and up the other.
template <typename T, class To = Epilogue<T>>
struct Product {
  int32_t S, E;
  int64_t N, K;
  const int32_t* offsets;  // [E+1]
  RowsOf<T> x;             // [S, K]
  MatrixOf<const T> w;     // [E, N, K]
  MatrixOf<const T> up;    // [E, N, K]
  To epilogue;
  void* workspace = nullptr;  // of grouped_gemm_workspace bytes, or null
  bool batch_invariant = false;
};

// dw[e] = sum over the slots s of e of dy[s]^T x[s].
template <typename T>
struct Gradient {
  int32_t S, E;
  int64_t N, K;
  const int32_t* offsets;  // [E+1]
  RowsOf<T> dy;            // [S, N]
  RowsOf<T> x;             // [S, K]
  MatrixOf<T> dw;          // [E, N, K]
  // Instead of dw's data, with its strides: the sums are added to it, and an expert without slots keeps its bits.
  Acc<T>* onto = nullptr;

  // n neighbours of a row, which dw must be aligned to.
  template <int n>
  MOERT_HOST_DEVICE void store(int64_t e, int64_t row, int64_t column, const Acc<T> (&sums)[n]) const {
    const int64_t at = dw.offset(e, row, column);
    if (onto) {
      Neighbours<Acc<T>, n> out = take<n>(onto + at);
      for (int i = 0; i < n; ++i) out.values[i] += sums[i];
      return put(onto + at, out);
    }
    Neighbours<T, n> out;
    for (int i = 0; i < n; ++i) out.values[i] = narrow<T>(sums[i]);
    put(dw.data + at, out);
  }
};

template <typename T>
Product<T> product_of(const GroupedGemm& p, void* y, int64_t y_stride) {
  Epilogue<T> to{static_cast<T*>(y), y_stride, p.N};
  to.bias = static_cast<const T*>(p.bias.data);
  to.bias_expert = p.bias.expert_stride;
  to.scale = static_cast<const Acc<T>*>(p.scale);
  to.scale_input = p.scale_on == ScaleOn::input;
  const MatrixOf<const T> w(p.w);
  return {int32_t(p.S), int32_t(p.E), p.N, p.K, p.offsets, RowsOf<T>(p.x), w, w, to, p.workspace, p.batch_invariant};
}

template <typename T>
Gradient<T> gradient_of(const GroupedGemmWgrad& p, const ExpertMatrix& dw) {
  Gradient<T> gradient{int32_t(p.S),   int32_t(p.E),   p.N, p.K, p.offsets, RowsOf<T>(p.dy),
                       RowsOf<T>(p.x), MatrixOf<T>(dw)};
  if (p.accumulate) gradient.onto = static_cast<Acc<T>*>(const_cast<void*>(dw.data));
  return gradient;
}

// On the tensor cores where they take it, else on plain arithmetic units.
template <typename T, class To>
void multiply(const Product<T, To>& product, bool tf32, void* stream);
template <typename T>
void multiply(const Gradient<T>& product, bool tf32, void* stream);

// A tile of the kernels over tensor cores.
constexpr int kMmaTile = 128;

// Columns of tiles that run together: 1024 columns of an expert's weights stay in the L2 cache.
constexpr int kBand = 8;

}  // namespace moert::cuda
