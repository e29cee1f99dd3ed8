#include "moert/permute.h"

#include <algorithm>

#include "cuda/combine.h"
#include "cuda/launch.h"
#include "cuda/permute.cuh"
#include "cuda/permute_plan.cuh"

namespace moert::cuda {

namespace {

constexpr int64_t kOneBlock = 4096;  // choices that one block sorts before three kernels have started
constexpr int64_t kMostBlocks = 1024;
constexpr int64_t kCounters = 12288;  // int32 in 48 KiB of shared memory

// Blocks and the choices of each.
struct Runs {
  int64_t run, blocks;

  explicit Runs(int64_t choices)
      : run(choices <= kOneBlock ? kOneBlock : std::max<int64_t>(kOneBlock, ceil_div(choices, kMostBlocks))),
        blocks(std::max<int64_t>(1, ceil_div(choices, run))) {}
};

// Warps of a block that has so many counters an expert and warp, and `rows` rows of them more.
int64_t plan_warps(int64_t E, int64_t rows) {
  return std::clamp<int64_t>(kCounters / std::max<int64_t>(1, E) - rows, 1, 32);
}

bool fits_one_block(int64_t choices, int64_t E) { return choices <= kOneBlock && 2 * E <= kCounters; }

}  // namespace

int64_t permute_plan_workspace(int64_t T, int64_t k, int64_t E) {
  return fits_one_block(T * k, E) ? 0 : (Runs(T * k).blocks + 1) * E * 4;
}

void permute_plan(const int32_t* ids, int64_t T, int64_t k, int64_t E, int64_t capacity, void* workspace, void* stream,
                  int32_t* offsets, int32_t* tokens, int32_t* slots) {
  MOERT_CHECK(E <= kMostPlanExperts, "num_experts must be at most ", kMostPlanExperts, " on a GPU, got ", E);
  const Runs runs(T * k);
  const PlanCall call{ids,     T * k,  k,    int(E), capacity, runs.run, static_cast<int32_t*>(workspace),
                      offsets, tokens, slots};
  if (fits_one_block(T * k, E)) {
    const int64_t warps = plan_warps(E, 1);
    launch(&plan_in_one_block, {1, 1, (warps + 1) * E * 4}, int(warps) * kWarp, stream, call);
    return;
  }
  const int64_t warps = plan_warps(E, 0);
  const Grid grid{runs.blocks, 1, warps * E * 4};
  launch(&plan_count, grid, int(warps) * kWarp, stream, call);
  launch(&plan_scan, {1}, 1024, stream, call, int(runs.blocks));
  launch(&plan_place, grid, int(warps) * kWarp, stream, call);
}

void permute_rows(const void* x, int64_t x_stride, DType dtype, const int32_t* tokens, int64_t T, int64_t S, int64_t H,
                  void* stream, void* rows) {
  const int64_t size = size_of(dtype);
  const auto copy = [&](auto unit, int64_t units, int64_t stride) {
    using Unit = decltype(unit);
    launch(&permute_kernel<Unit>, {ceil_div(S, kRowWarps), ceil_div(units, kCopies * kWarp)}, kRowWarps * kWarp, stream,
           static_cast<const Unit*>(x), stride, tokens, T, S, units, static_cast<Unit*>(rows));
  };
  if (is_aligned(x, x_stride * size) && is_aligned(rows, H * size))
    copy(Chunk{}, H * size / int64_t(sizeof(Chunk)), x_stride * size / int64_t(sizeof(Chunk)));
  else if (size == 2)
    copy(uint16_t{}, H, x_stride);
  else if (size == 4)
    copy(uint32_t{}, H, x_stride);
  else
    copy(uint64_t{}, H, x_stride);
}

void combine_rows(const SlotRows& rows, const int32_t* slots, const void* weights, const Onto& onto, int64_t T,
                  int64_t k, void* stream, void* y) {
  with_dtype(rows.dtype, [&](auto type) {
    using X = decltype(type);
    const int64_t size = sizeof(X), H = rows.H;
    const UnpermuteCall<X> call{static_cast<const X*>(rows.rows),
                                static_cast<const X*>(rows.own),
                                rows.stride,
                                rows.own_stride,
                                rows.first,
                                rows.O,
                                slots,
                                static_cast<const Acc<X>*>(weights),
                                OntoOf<X>(onto),
                                T,
                                k,
                                rows.S,
                                H,
                                static_cast<X*>(y)};
    const bool aligned = is_aligned(rows.rows, rows.stride * size) && is_aligned(rows.own, rows.own_stride * size) &&
                         is_aligned(onto.rows.data, onto.rows.data ? onto.rows.stride * size : 0) &&
                         is_aligned(onto.constants, 0) && is_aligned(y, H * size);
    launch(aligned ? &unpermute_kernel<X, true> : &unpermute_kernel<X, false>,
           {ceil_div(T * pieces_of<X>(H), kRowWarps)}, kRowWarps * kWarp, stream, call);
  });
}

void unpermute_rows(const void* rows, int64_t rows_stride, DType dtype, const int32_t* slots, const void* weights,
                    const void* residual, int64_t residual_stride, int64_t T, int64_t k, int64_t S, int64_t H,
                    void* stream, void* y) {
  combine_rows({rows, rows_stride, dtype, S, H}, slots, weights, {{residual, dtype, residual_stride}}, T, k, stream, y);
}

void unpermute_rows_backward(const void* dy, int64_t dy_stride, const void* rows, int64_t rows_stride, DType dtype,
                             const int32_t* tokens, const int32_t* slots, const void* weights, int64_t T, int64_t k,
                             int64_t S, int64_t H, void* stream, void* drows, void* dweights) {
  with_dtype(dtype, [&](auto type) {
    using X = decltype(type);
    const int64_t size = sizeof(X);
    const UnpermuteBackwardCall<X> call{static_cast<const X*>(dy),
                                        static_cast<const X*>(rows),
                                        dy_stride,
                                        rows_stride,
                                        tokens,
                                        slots,
                                        static_cast<const Acc<X>*>(weights),
                                        T,
                                        k,
                                        S,
                                        H,
                                        static_cast<X*>(drows),
                                        static_cast<Acc<X>*>(dweights)};
    const bool aligned =
        is_aligned(dy, dy_stride * size) && is_aligned(rows, rows_stride * size) && is_aligned(drows, H * size);
    launch(aligned ? &unpermute_backward_kernel<X, true> : &unpermute_backward_kernel<X, false>,
           {S + ceil_div(T * k, kBackwardThreads)}, kBackwardThreads, stream, call);
  });
}

void narrow_ids(const void* ids, int64_t bytes, bool is_signed, int64_t row_stride, int64_t column_stride, int64_t T,
                int64_t k, int64_t E, void* stream, int32_t* out) {
  const auto run = [&](auto id) {
    using Id = decltype(id);
    launch(&narrow_ids_kernel<Id>, {ceil_div(T * k, 256)}, 256, stream, static_cast<const Id*>(ids), row_stride,
           column_stride, T, k, E, out);
  };
  if (bytes == 1) return is_signed ? run(int8_t{}) : run(uint8_t{});
  if (bytes == 2) return is_signed ? run(int16_t{}) : run(uint16_t{});
  if (bytes == 4) return is_signed ? run(int32_t{}) : run(uint32_t{});
  is_signed ? run(int64_t{}) : run(uint64_t{});
}

}  // namespace moert::cuda
