#include "moert/fused_experts_quantized.h"

#include "cpu/fused_experts_steps.h"
#include "cpu/packed_experts.h"
#include "moert/isa.h"

namespace moert::cpu {

namespace {

// x [n] to the nearest e4m3 of its group of 128, as floats.
void round_to_e4m3(float* x, int64_t n) {
  for (int64_t first = 0; first < n; first += kFp8Block) {
    const int64_t end = std::min(n, first + kFp8Block);
    uint32_t most = 0;
    for (int64_t i = first; i < end; ++i) most = std::max(most, float_to_bits(x[i]) & 0x7fffffffu);
    const float scale = row_scale(most, kLargestE4m3);
    for (int64_t i = first; i < end; ++i) x[i] = (scale > 0 ? e4m3_to_float(to_e4m3(x[i] / scale)) : 0) * scale;
  }
}

// Each tile of weights becomes floats, which the kernels of fused_experts multiply by rows as they are or, `rounds`,
// rounded to e4m3.
template <typename A>
void full(const RoutedRows& tokens, const QuantizedExperts& w, int64_t threads, void* y, bool rounds = false) {
  const ExpertWeights& floats = w.floats;
  const Plan<A> plan(tokens, floats.E, threads);
  RoutedRows routed = tokens;
  const Memory<float> x = allocate<float>(rounds ? tokens.T * floats.H : 0);
  if (rounds) routed.x = {x.get(), DType::f32, floats.H};
  const DType between = between_gemms(routed.x.dtype);
  const Memory<char> act = allocate<char>(plan.slots_used() * floats.I * size_of(between));
  const FirstGemm<A> first(routed, floats, plan, threads, act.get(), nullptr);
  const CombinedRows<A> second(plan, floats.H, threads);
  const Rows rows{act.get(), between, floats.I};
  const auto round_x = [&](int64_t t) {
    const TileMatrix from{at(tokens.x.data, tokens.x.dtype, t * tokens.x.stride), tokens.x.dtype, 0, 1, nullptr};
    gemm_kernels().widen(from, 1, floats.H, x.get() + t * floats.H, 0);
    round_to_e4m3(x.get() + t * floats.H, floats.H);
  };
  const auto round_act = [&](int64_t s) {
    round_to_e4m3(reinterpret_cast<float*>(act.get()) + s * floats.I, floats.I);
  };
  parallel_region(threads, [&](Team& team) {
    if (rounds) team.for_each(tokens.T, round_x);
    first.run(team, [&](const TileTask& task, const TileMemory<A>& memory) {
      const TileOperand x = operand_of(first.x, task.row, 0);
      full_product<A>(w.w1, task, 0, x, tokens.batch_invariant, memory.c0, memory.scratch);
      if (first.gated) full_product<A>(w.w1, task, floats.I, x, tokens.batch_invariant, memory.c1, memory.scratch);
    });
    if (rounds) team.for_each(plan.slots_used(), round_act);
    second.run(team, floats.scale_on == ScaleOn::output, y, tokens.x.dtype,
               [&](const TileTask& task, const TileMemory<A>& memory) {
                 const TileOperand x = operand_of(rows, task.row, 0);
                 full_product<A>(w.w2, task, 0, x, tokens.batch_invariant, memory.c0, memory.scratch);
                 return vector_of(floats.down_bias, 1, task, memory.row0);
               });
  });
}

// Row t of x [T, H] to the nearest bfloat16.
void round_row(const Rows& x, int64_t t, int64_t H, bf16* to) {
  float* values = reinterpret_cast<float*>(thread_scratch(H * int64_t(sizeof(float))));
  gemm_kernels().widen({at(x.data, x.dtype, t * x.stride), x.dtype, 0, 1, nullptr}, 1, H, values, 0);
  gemm_kernels().store({1, H, values, nullptr, nullptr, ScaleOn::output, to, DType::bf16, H, 1});
}

// Rows of x and of the activations are rounded to bfloat16, and so is each tile of weights.
void bfloat16(const RoutedRows& tokens, const QuantizedExperts& w, int64_t threads, void* y) {
  const ExpertWeights& floats = w.floats;
  const Plan<float> plan(tokens, floats.E, threads);
  const bool narrow = tokens.x.dtype != DType::bf16;
  const Memory<bf16> x = allocate<bf16>(narrow ? tokens.T * floats.H : 0),
                     act = allocate<bf16>(plan.slots_used() * floats.I);
  RoutedRows routed = tokens;
  if (narrow) routed.x = {x.get(), DType::bf16, floats.H};
  FirstGemm<float> first(routed, floats, plan, threads, act.get(), nullptr);
  first.between = DType::bf16;
  const CombinedRows<float> second(plan, floats.H, threads);
  const Rows rows{act.get(), DType::bf16, floats.I};
  parallel_region(threads, [&](Team& team) {
    if (narrow) team.for_each(tokens.T, [&](int64_t t) { round_row(tokens.x, t, floats.H, x.get() + t * floats.H); });
    first.run(team, [&](const TileTask& task, const TileMemory<float>& memory) {
      float* up = first.gated ? memory.c1 : nullptr;
      bf16_product(w.w1, task, floats.I, operand_of(first.x, task.row, 0), first.numbers + task.row,
                   tokens.batch_invariant, memory.c0, up, memory.scratch);
    });
    second.run(team, floats.scale_on == ScaleOn::output, y, tokens.x.dtype,
               [&](const TileTask& task, const TileMemory<float>& memory) {
                 bf16_product(w.w2, task, 0, operand_of(rows, task.row, 0), second.numbers + task.row,
                              tokens.batch_invariant, memory.c0, nullptr, memory.scratch);
                 return vector_of(floats.down_bias, 1, task, memory.row0);
               });
  });
}

// Rows of activations as int8 in the order of the format that they are multiplied with.
struct Int8Activations {
  const Packing& packing;
  Precision precision;
  bool batch_invariant;
  int64_t row_bytes;
  Memory<char> data;

  Int8Activations(const PackedMatrix& w, Precision precision, bool batch_invariant, int64_t rows)
      : packing(w.packing),
        precision(precision),
        batch_invariant(batch_invariant),
        row_bytes(packed_gemm_kernels().quantized_row_bytes(w.packing, precision)),
        data(allocate<char>(rows * row_bytes)) {}

  void quantize(Team& team, const Rows& x, int64_t rows) const {
    team.for_each(rows, [&](int64_t r) {
      float* values = reinterpret_cast<float*>(thread_scratch(packing.columns * 4));
      const char* row = at(x.data, x.dtype, r * x.stride);
      gemm_kernels().widen({row, x.dtype, 0, 1, nullptr}, 1, packing.columns, values, 0);
      packed_gemm_kernels().quantize_row(values, packing, precision, data.get() + r * row_bytes);
    });
  }

  // number: PackedTile::same_a of the rows.
  void multiply(const TileTask& task, const PackedMatrix& w, int64_t row, const QuantizedRows& rows, int64_t number,
                float* c) const {
    char* scratch = thread_scratch(packed_scratch(packing, precision));
    packed_gemm_kernels().gemm(
        {task.M, task.N, rows, rows_of(w, task.expert, row), precision, c, scratch, batch_invariant, number});
  }
};

void int8(const RoutedRows& tokens, const QuantizedExperts& w, Precision precision, int64_t threads, void* y) {
  const ExpertWeights& floats = w.floats;
  const Plan<float> plan(tokens, floats.E, threads);
  const int64_t slots = plan.slots_used();
  const Memory<float> act = allocate<float>(slots * floats.I);
  FirstGemm<float> first(tokens, floats, plan, threads, act.get(), nullptr);
  first.between = DType::f32;  // it becomes int8 at once
  const CombinedRows<float> second(plan, floats.H, threads);
  const Int8Activations x(w.w1, precision, tokens.batch_invariant, tokens.T),
      h(w.w2, precision, tokens.batch_invariant, slots);
  parallel_region(threads, [&](Team& team) {
    x.quantize(team, tokens.x, tokens.T);
    first.run(team, [&](const TileTask& task, const TileMemory<float>& memory) {
      const QuantizedRows rows{x.data.get(), x.row_bytes, plan.tokens + task.row};
      x.multiply(task, w.w1, task.n, rows, first.numbers + task.row, memory.c0);
      if (first.gated) x.multiply(task, w.w1, floats.I + task.n, rows, first.numbers + task.row, memory.c1);
    });
    h.quantize(team, {act.get(), DType::f32, floats.I}, slots);
    second.run(team, floats.scale_on == ScaleOn::output, y, tokens.x.dtype,
               [&](const TileTask& task, const TileMemory<float>& memory) {
                 const QuantizedRows rows{h.data.get() + task.row * h.row_bytes, h.row_bytes};
                 h.multiply(task, w.w2, task.n, rows, second.numbers + task.row, memory.c0);
                 return vector_of(floats.down_bias, 1, task, memory.row0);
               });
  });
}

}  // namespace

// Measured (docs/quantized.md).  Products of int8 with ternary weights are the fastest.
int64_t bf16_rows(Precision by_format, bool ternary) {
  if (isa() < Isa::amx) return 0;
  return by_format == Precision::full ? 8 : ternary ? 40 : 16;
}

Precision auto_precision(Precision by_format, bool ternary, int64_t rows, int64_t E, bool batch_invariant) {
  const int64_t least = bf16_rows(by_format, ternary);
  return least && rows >= least * E && !batch_invariant ? Precision::bfloat16 : by_format;
}

void fused_experts_quantized(const RoutedRows& tokens, const QuantizedExperts& experts, Precision precision,
                             int64_t threads, void* y) {
  if (is_int8(precision))
    int8(tokens, experts, precision, threads, y);
  else if (precision == Precision::bfloat16)
    bfloat16(tokens, experts, threads, y);
  else if (tokens.x.dtype == DType::f64)
    full<double>(tokens, experts, threads, y);
  else
    full<float>(tokens, experts, threads, y, precision == Precision::fp8_group128);
}

}  // namespace moert::cpu
