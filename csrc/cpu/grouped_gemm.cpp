#include "moert/grouped_gemm.h"

#include <cstring>

#include "cpu/parallel.h"
#include "cpu/tile_tasks.h"

namespace moert::cpu {

namespace {

template <typename A>
void grouped_gemm_of(const GroupedGemm& p, int64_t threads, void* y, int64_t y_stride) {
  const GemmKernels& kernels = gemm_kernels();
  const auto tasks = tile_tasks(p.offsets, p.E, p.N, kTileColumns);
  parallel_for(int64_t(tasks.size()), threads, [&](int64_t i) {
    const TileTask& task = tasks[i];
    const TileMemory<A> memory = tile_memory<A>();
    GemmTile tile{task.M, task.N, p.K, tile_of(p.x, task.row, 0), {}, false, false, false, memory.c0, memory.scratch};
    set_b(tile, p.w, task.expert, task.n, 0, true);
    kernels.gemm(tile);

    const A* bias = nullptr;
    if (p.bias.data) {
      const int64_t skip = task.expert * p.bias.expert_stride + task.n;
      kernels.widen({at(p.bias.data, p.bias.dtype, skip), p.bias.dtype, 0, 1, nullptr}, 1, task.N, memory.row0, 0);
      bias = memory.row0;
    }
    const A* scale = p.scale ? static_cast<const A*>(p.scale) + task.row : nullptr;
    void* out = const_cast<char*>(at(y, p.x.dtype, task.row * y_stride + task.n));
    kernels.store({task.M, task.N, memory.c0, bias, scale, p.scale_on, out, p.x.dtype, y_stride, 1});
  });
  for (int64_t s = p.offsets[p.E]; s < p.S; ++s)
    std::memset(const_cast<char*>(at(y, p.x.dtype, s * y_stride)), 0, p.N * size_of(p.x.dtype));
}

template <typename A>
void wgrad_of(const GroupedGemmWgrad& p, int64_t threads, const ExpertMatrix& dw) {
  const GemmKernels& kernels = gemm_kernels();
  // The side of dw whose elements lie side by side becomes the columns of the tiles.
  const bool swap = dw.col_stride > dw.row_stride;
  const Rows &left = swap ? p.x : p.dy, &right = swap ? p.dy : p.x;
  const int64_t M = swap ? p.K : p.N, N = swap ? p.N : p.K;
  const int64_t row_stride = swap ? dw.col_stride : dw.row_stride, col_stride = swap ? dw.row_stride : dw.col_stride;
  const int64_t tiles_m = (M + kTileRows - 1) / kTileRows, tiles_n = (N + kTileColumns - 1) / kTileColumns;
  parallel_for(p.E * tiles_m * tiles_n, threads, [&](int64_t i) {
    const int64_t e = i / (tiles_m * tiles_n);
    const int64_t m = i / tiles_n % tiles_m * kTileRows, n = i % tiles_n * kTileColumns;
    const int64_t begin = p.offsets[e], rows = p.offsets[e + 1] - begin;
    const TileMemory<A> memory = tile_memory<A>();
    const GemmTile tile{std::min(kTileRows, M - m),
                        std::min(kTileColumns, N - n),
                        rows,
                        tile_of(left, begin, m),
                        tile_of(right, begin, n),
                        true,
                        true,
                        false,
                        memory.c0,
                        memory.scratch};
    kernels.gemm(tile);
    void* out = const_cast<char*>(at(dw.data, dw.dtype, e * dw.expert_stride + m * row_stride + n * col_stride));
    kernels.store(
        {tile.M, tile.N, memory.c0, nullptr, nullptr, ScaleOn::output, out, dw.dtype, row_stride, col_stride});
  });
}

}  // namespace

void grouped_gemm(const GroupedGemm& product, int64_t threads, void* y, int64_t y_stride) {
  (product.x.dtype == DType::f64 ? grouped_gemm_of<double> : grouped_gemm_of<float>)(product, threads, y, y_stride);
}

void grouped_gemm_wgrad(const GroupedGemmWgrad& product, int64_t threads, const ExpertMatrix& dw) {
  (dw.dtype == DType::f64 ? wgrad_of<double> : wgrad_of<float>)(product, threads, dw);
}

}  // namespace moert::cpu
