#include "moert/fused_experts_quantized.h"

#include <algorithm>

#include "cuda/code_rows.cuh"
#include "cuda/fused_experts.h"
#include "cuda/launch.h"
#include "cuda/packed_product.cuh"
#include "cuda/packed_product_mma.h"

namespace moert::cuda {

namespace {

// How a matrix is multiplied, and the rows of x that this wants.
struct Way {
  Precision precision;
  bool coded, on_tensor_cores;  // coded: rows of codes are multiplied, not what they stand for
  ColumnOrder order;
  DType rows;

  Way(const PackedMatrix& w, Precision precision, DType x)
      : precision(precision),
        coded(takes_tensor_cores_as_codes(w, precision)),
        on_tensor_cores(coded || (precision == Precision::full && takes_tensor_cores(w, x))),
        order(coded             ? code_order(w.packing.format)
              : on_tensor_cores ? tensor_core_order(w.packing.format)
                                : ColumnOrder{width_of(w.packing.format)}),
        rows(on_tensor_cores || x == DType::f64 ? x : DType::f32) {}

  int64_t stride(int64_t columns) const {
    const int64_t length = order.length(columns);
    return coded ? length / order.step * CodeStep{order.step}.bytes() : length;
  }
  int64_t bytes(int64_t columns) const { return stride(columns) * (coded ? 1 : size_of(rows)); }
};

// What lies between the kernels.  A is the type of sums, T that of x.
template <typename T>
struct Quantized {
  using A = Acc<T>;

  const RoutedRows& tokens;
  const QuantizedExperts& experts;
  const ExpertWeights& floats;
  const bool rounds;  // rows to codes
  Way way1, way2;
  Memory memory;
  SlotPlan<T> plan;
  char *x, *act;   // [T, H] and [T*k, I], each as the weights want it that it is multiplied with
  float* between;  // [T*k, I], what becomes codes
  T* rows;         // [T*k, H]

  Quantized(const RoutedRows& tokens, const QuantizedExperts& experts, Precision precision, void* workspace)
      : tokens(tokens),
        experts(experts),
        floats(experts.floats),
        rounds(precision != Precision::full),
        way1(experts.w1, precision, tokens.x.dtype),
        way2(experts.w2, precision, tokens.x.dtype),
        memory(workspace),
        plan(tokens, floats.E, floats.scale_on == ScaleOn::input, memory),
        x(memory.take<char>(tokens.T * way1.bytes(floats.H))),
        act(memory.take<char>(tokens.T * tokens.k * way2.bytes(floats.I))),
        between(rounds ? memory.take<float>(tokens.T * tokens.k * floats.I) : nullptr),
        rows(memory.take<T>(tokens.T * tokens.k * floats.H)) {}

  PackedProduct<A> product(const char* name, const PackedMatrix& w, int64_t N) const {
    PackedProduct<A> p{};
    p.S = int32_t(tokens.T * tokens.k), p.E = int32_t(floats.E), p.N = p.written = N;
    p.offsets = plan.offsets;
    p.w = weights_of(name, w);
    p.dtype = tokens.x.dtype;
    return p;
  }

  PackedProduct<A> first() const {
    PackedProduct<A> p = product("codes1", experts.w1, floats.I);
    p.index = plan.tokens;
    p.x = x, p.x_stride = way1.stride(floats.H);
    p.bias = floats.gate_bias.data, p.up_bias = floats.up_bias.data;
    p.bias_expert = floats.gate_bias.expert_stride, p.bias_step = floats.bias1_stride;
    p.scale = floats.scale_on == ScaleOn::input ? plan.scale : nullptr;
    p.activates = true, p.form = activation_form<A>(floats.activation);
    if (rounds) {
      p.y = between, p.act = DType::f32, p.y_stride = floats.I;
    } else {
      p.y = act, p.act = way2.rows, p.order = way2.order, p.y_stride = way2.order.length(floats.I);
      p.written = way2.order.written(floats.I);
    }
    return p;
  }

  PackedProduct<A> second() const {
    PackedProduct<A> p = product("codes2", experts.w2, floats.H);
    p.x = act, p.x_stride = way2.stride(floats.I);
    p.bias = floats.down_bias.data, p.bias_expert = floats.down_bias.expert_stride;
    p.bias_step = 1;
    p.y = rows, p.y_stride = floats.H;
    return p;
  }

  void multiply(const Way& way, PackedProduct<A> p, void* stream) const {
    if (p.S == 0 || p.N == 0) return;
    if (p.w.matrix.packing.format == Format::sub1) p.w.dictionary = sub1_on_device();
    if constexpr (kPackedOnTensorCores && sizeof(T) <= 4)
      if (way.coded) return multiply_codes(p, way.precision, stream);
    if constexpr (kPackedOnTensorCores && sizeof(T) == 2)
      if (way.on_tensor_cores) return multiply_on_tensor_cores<T>(p, stream);
    p.tile_rows(kMostRows<A>);
    with_codes(p.w.matrix.packing.format, [&](auto codes) {
      using Codes = decltype(codes);
      const int64_t outputs = kPackedWarps * (p.gated() ? Codes::kRows / 2 : Codes::kRows);
      launch(&packed_product<A, Codes>, {p.tiles * ceil_div(p.written, outputs)}, kPackedThreads, stream, p);
    });
  }

  // The first `count` of so many rows of x, all without one, as `way` wants them.
  void round(const Way& way, const Rows& from, int64_t columns, int64_t most, const int32_t* count, void* to,
             void* stream) const {
    const bool e4m3 = way.precision == Precision::fp8_group128;
    const RowRounding p{from.data,   from.dtype,
                        from.stride, columns,
                        count,       e4m3 ? kFp8Block : way.precision == Precision::int8 ? 0 : kSpanColumns,
                        way.order,   way.order.length(columns),
                        to};
    const auto kernel = way.coded ? e4m3 ? &round_rows<E4m3Code, true> : &round_rows<Int8Code, true>
                        : e4m3    ? &round_rows<E4m3Code, false>
                                  : &round_rows<Int8Code, false>;
    launch(kernel, {most}, kRoundThreads, stream, p);
  }

  void run(void* stream, void* y) const {
    plan.run(tokens, floats.E, stream);
    const int64_t length = way1.order.length(floats.H);
    if (rounds)
      round(way1, tokens.x, floats.H, tokens.T, nullptr, x, stream);
    else
      launch(&order_columns<A>, {ceil_div(tokens.T * length, kPackedThreads)}, kPackedThreads, stream, tokens.x.data,
             tokens.x.dtype, tokens.x.stride, tokens.T, floats.H, way1.order, length, way1.rows, x);
    multiply(way1, first(), stream);
    if (rounds)
      round(way2, {between, DType::f32, floats.I}, floats.I, tokens.T * tokens.k, plan.offsets + floats.E, act, stream);
    multiply(way2, second(), stream);
    unpermute_rows(rows, floats.H, tokens.x.dtype, plan.slots,
                   floats.scale_on == ScaleOn::output ? tokens.weights : nullptr, nullptr, 0, tokens.T, tokens.k,
                   tokens.T * tokens.k, floats.H, stream, y);
  }
};

}  // namespace

int64_t fused_experts_quantized_workspace(const RoutedRows& tokens, const QuantizedExperts& experts,
                                          Precision precision) {
  int64_t bytes = 0;
  with_dtype(tokens.x.dtype,
             [&](auto type) { bytes = Quantized<decltype(type)>(tokens, experts, precision, nullptr).memory.used(); });
  return bytes;
}

void fused_experts_quantized(const RoutedRows& tokens, const QuantizedExperts& experts, Precision precision,
                             void* workspace, void* stream, void* y) {
  check_alone(tokens);
  MOERT_CHECK(!is_on_cpu_alone(precision), "precision must not be ", name(precision), " on a GPU, got it");
  MOERT_CHECK(precision == Precision::full || tokens.x.dtype != DType::f64,
              "x must have dtype float32, bfloat16 or float16 for ", name(precision), " rows, got float64");
  if (tokens.T == 0) return;
  with_dtype(tokens.x.dtype,
             [&](auto type) { Quantized<decltype(type)>(tokens, experts, precision, workspace).run(stream, y); });
}

}  // namespace moert::cuda
