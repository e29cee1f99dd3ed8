#include "moert/fused_experts.h"

#include <cstring>

#include "cpu/fused_experts_steps.h"

namespace moert::cpu {

namespace {

template <typename A>
void forward(const RoutedRows& tokens, const ExpertWeights& w, int64_t threads, void* y, void* h) {
  const Plan<A> plan(tokens, w.E, threads);
  const DType between = between_gemms(tokens.x.dtype);
  const Memory<char> act = allocate<char>(plan.slots_used() * w.I * size_of(between));
  const FirstGemm<A> first(tokens, w, plan, threads, act.get(), h);
  const CombinedRows<A> second(plan, w.H, threads);
  const Rows rows{act.get(), between, w.I};
  if (h) {
    const int64_t row = (is_gated(w.activation.act) ? 2 : 1) * w.I * size_of(tokens.x.dtype);
    const int64_t rows = plan.S, used = plan.slots_used();
    advise_huge_pages(h, size_t(rows * row));
    std::memset(static_cast<char*>(h) + used * row, 0, (rows - used) * row);
  }
  parallel_region(threads, [&](Team& team) {
    first.run(team);
    second.run(
        team, w.scale_on == ScaleOn::output, y, tokens.x.dtype,
        [&](const TileTask& task, const TileMemory<A>& memory) {
          const TileOperand down = operand_of(w.down, task.expert, task.n, 0, true);
          GemmTile tile{task.M, task.N, w.I, operand_of(rows, task.row, 0), down, memory.c0, memory.scratch};
          tile.batch_invariant = tokens.batch_invariant;
          tile.same_a = second.numbers + task.row;
          gemm_kernels().gemm(tile);
          return vector_of(w.down_bias, 1, task, memory.row0);
        },
        tokens.onto);
  });
}

}  // namespace

void fused_experts(const RoutedRows& tokens, const ExpertWeights& experts, int64_t threads, void* y, void* h) {
  (tokens.x.dtype == DType::f64 ? forward<double> : forward<float>)(tokens, experts, threads, y, h);
}

}  // namespace moert::cpu
