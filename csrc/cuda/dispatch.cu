#include "cuda/dispatch.cuh"

#include "cuda/combine.h"
#include "cuda/launch.h"
#include "cuda/memory.h"
#include "moert/permute.h"

namespace moert::cuda {

namespace {

// f(T{}) for the element type of rows that are rounded.
template <typename F>
void with_rounded(DType dtype, const F& f) {
  if (dtype == DType::f32) return f(float{});
  dtype == DType::bf16 ? f(bf16{}) : f(f16{});
}

struct Workspace {
  int32_t* ranks;  // [T, k]
  void* plan;
  int64_t bytes;

  Workspace(void* data, int64_t T, int64_t k, int64_t R) {
    Memory memory(data);
    ranks = memory.take<int32_t>(T * k);
    plan = memory.take<char>(permute_plan_workspace(T, k, R));
    bytes = memory.used();
  }
};

}  // namespace

int64_t dispatch_plan_workspace(int64_t T, int64_t k, int64_t R) { return Workspace(nullptr, T, k, R).bytes; }

void dispatch_plan(const int32_t* ids, int64_t T, int64_t k, const int32_t* expert_to_rank, int64_t E, int64_t R,
                   void* workspace, void* stream, int32_t* offsets, int32_t* tokens, int32_t* slots) {
  const Workspace work(workspace, T, k, R);
  launch(&choice_ranks_kernel, {ceil_div(T * k, 256)}, 256, stream, ids, T * k, k, expert_to_rank, E, R, work.ranks);
  permute_plan(work.ranks, T, k, R, -1, work.plan, stream, offsets, tokens, slots);
}

void dispatch_pack(const Packing& p, void* stream, void* records) {
  const int64_t size = size_of(p.dtype), blocks = ceil_div(p.last - p.first, kRecordWarps);
  const RecordLayout layout = record_layout(p.H, size, p.k, p.weight_size, p.payload);
  auto* to = static_cast<unsigned char*>(records);
  if (p.payload != Payload::none)
    return with_rounded(p.dtype, [&](auto type) {
      launch(&pack_rounded_kernel<decltype(type)>, {blocks}, kRecordWarps * kWarp, stream, p, layout, to);
    });
  const auto pack = [&](auto unit, int64_t units, int64_t stride) {
    launch(&pack_kernel<decltype(unit)>, {blocks}, kRecordWarps * kWarp, stream, p, layout, stride, units, to);
  };
  const int64_t chunk = sizeof(Chunk);
  if (is_aligned(p.x, p.x_stride * size) && is_aligned(records, p.H * size))
    pack(Chunk{}, p.H * size / chunk, p.x_stride * size / chunk);
  else if (size == 2)
    pack(uint16_t{}, p.H, p.x_stride);
  else if (size == 4)
    pack(uint32_t{}, p.H, p.x_stride);
  else
    pack(uint64_t{}, p.H, p.x_stride);
}

void dispatch_unpack(const Unpacking& u, void* stream, void* rows) {
  with_rounded(u.dtype, [&](auto type) {
    using T = decltype(type);
    launch(&unpack_kernel<T>, {ceil_div(u.M, kRecordWarps)}, kRecordWarps * kWarp, stream, u, static_cast<T*>(rows));
  });
}

void dispatch_combine(const Returned& r, void* stream, void* y) {
  combine_rows({r.rows, r.rows_stride, r.dtype, r.S, r.H, r.own, r.own_stride, r.first, r.O}, r.slots, nullptr,
               {{r.residual, r.dtype, r.residual_stride}}, r.T, r.k, stream, y);
}

}  // namespace moert::cuda
