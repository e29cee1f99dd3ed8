#include "moert/grouped_gemm.h"

#include <cstring>

#include "cpu/weight_gradient.h"

namespace moert::cpu {

namespace {

template <typename A>
void grouped_gemm_of(const GroupedGemm& p, int64_t threads, void* y, int64_t y_stride) {
  const GemmKernels& kernels = gemm_kernels();
  const auto tasks = tile_tasks(p.offsets, p.E, 0, p.N, kTileColumns, threads);
  const int64_t numbers = new_numbers(p.S);
  parallel_for(int64_t(tasks.size()), threads, [&](int64_t i) {
    const TileTask& task = tasks[i];
    const TileMemory<A> memory = tile_memory<A>();
    const TileOperand w = operand_of(p.w, task.expert, task.n, 0, true);
    GemmTile tile{task.M, task.N, p.K, operand_of(p.x, task.row, 0), w, memory.c0, memory.scratch};
    tile.batch_invariant = p.batch_invariant;
    tile.same_a = numbers + task.row;
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
  const WeightGradient<A> gradient(p, dw);
  parallel_region(threads, [&](Team& team) { gradient.run(team); });
}

}  // namespace

void grouped_gemm(const GroupedGemm& product, int64_t threads, void* y, int64_t y_stride) {
  (product.x.dtype == DType::f64 ? grouped_gemm_of<double> : grouped_gemm_of<float>)(product, threads, y, y_stride);
}

void grouped_gemm_wgrad(const GroupedGemmWgrad& product, int64_t threads, const ExpertMatrix& dw) {
  (dw.dtype == DType::f64 ? wgrad_of<double> : wgrad_of<float>)(product, threads, dw);
}

}  // namespace moert::cpu
