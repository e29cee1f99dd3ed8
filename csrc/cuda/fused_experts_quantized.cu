#include "moert/fused_experts_quantized.h"

#include <algorithm>

#include "cuda/fused_experts.h"
#include "cuda/launch.h"
#include "cuda/packed_product.cuh"
#include "cuda/packed_product_mma.h"

namespace moert::cuda {

namespace {

// How a matrix is multiplied, and the rows of x that this wants.
struct Way {
  bool on_tensor_cores;
  ColumnOrder order;
  DType rows;

  Way(const PackedMatrix& w, DType x)
      : on_tensor_cores(takes_tensor_cores(w, x)),
        order(on_tensor_cores ? tensor_core_order(w.packing.format) : ColumnOrder{width_of(w.packing.format)}),
        rows(on_tensor_cores || x == DType::f64 ? x : DType::f32) {}

  int64_t bytes(int64_t columns) const { return order.length(columns) * size_of(rows); }
};

// What lies between the kernels.  A is the type of sums, T that of x.
template <typename T>
struct Quantized {
  using A = Acc<T>;

  const RoutedRows& tokens;
  const QuantizedExperts& experts;
  const ExpertWeights& floats;
  Way way1, way2;
  Memory memory;
  SlotPlan<T> plan;
  char *x, *act;  // [T, H] and [T*k, I], each as the weights want it that it is multiplied with
  T* rows;        // [T*k, H]

  Quantized(const RoutedRows& tokens, const QuantizedExperts& experts, void* workspace)
      : tokens(tokens),
        experts(experts),
        floats(experts.floats),
        way1(experts.w1, tokens.x.dtype),
        way2(experts.w2, tokens.x.dtype),
        memory(workspace),
        plan(tokens, floats.E, floats.scale_on == ScaleOn::input, memory),
        x(memory.take<char>(tokens.T * way1.bytes(floats.H))),
        act(memory.take<char>(tokens.T * tokens.k * way2.bytes(floats.I))),
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
    p.x = x, p.x_stride = way1.order.length(floats.H);
    p.bias = floats.gate_bias.data, p.up_bias = floats.up_bias.data;
    p.bias_expert = floats.gate_bias.expert_stride, p.bias_step = floats.bias1_stride;
    p.scale = floats.scale_on == ScaleOn::input ? plan.scale : nullptr;
    p.activates = true, p.form = activation_form<A>(floats.activation);
    p.y = act, p.act = way2.rows, p.order = way2.order, p.y_stride = way2.order.length(floats.I);
    p.written = way2.order.written(floats.I);
    return p;
  }

  PackedProduct<A> second() const {
    PackedProduct<A> p = product("codes2", experts.w2, floats.H);
    p.x = act, p.x_stride = way2.order.length(floats.I);
    p.bias = floats.down_bias.data, p.bias_expert = floats.down_bias.expert_stride;
    p.bias_step = 1;
    p.y = rows, p.y_stride = floats.H;
    return p;
  }

  void multiply(const Way& way, PackedProduct<A> p, void* stream) const {
    if (p.S == 0 || p.N == 0) return;
    if constexpr (kPackedOnTensorCores && sizeof(T) == 2)
      if (way.on_tensor_cores) return multiply_on_tensor_cores<T>(p, stream);
    p.tile_rows(kMostRows<A>);
    if (p.w.matrix.packing.format == Format::sub1) p.w.dictionary = sub1_on_device();
    with_codes(p.w.matrix.packing.format, [&](auto codes) {
      using Codes = decltype(codes);
      const int64_t outputs = kPackedWarps * (p.gated() ? Codes::kRows / 2 : Codes::kRows);
      launch(&packed_product<A, Codes>, {p.tiles * ceil_div(p.written, outputs)}, kPackedThreads, stream, p);
    });
  }

  void run(void* stream, void* y) const {
    plan.run(tokens, floats.E, stream);
    const int64_t length = way1.order.length(floats.H);
    launch(&order_columns<A>, {ceil_div(tokens.T * length, kPackedThreads)}, kPackedThreads, stream, tokens.x.data,
           tokens.x.dtype, tokens.x.stride, tokens.T, floats.H, way1.order, length, way1.rows, x);
    multiply(way1, first(), stream);
    multiply(way2, second(), stream);
    unpermute_rows(rows, floats.H, tokens.x.dtype, plan.slots,
                   floats.scale_on == ScaleOn::output ? tokens.weights : nullptr, nullptr, 0, tokens.T, tokens.k,
                   tokens.T * tokens.k, floats.H, stream, y);
  }
};

}  // namespace

int64_t fused_experts_quantized_workspace(const RoutedRows& tokens, const QuantizedExperts& experts) {
  int64_t bytes = 0;
  with_dtype(tokens.x.dtype,
             [&](auto type) { bytes = Quantized<decltype(type)>(tokens, experts, nullptr).memory.used(); });
  return bytes;
}

void fused_experts_quantized(const RoutedRows& tokens, const QuantizedExperts& experts, void* workspace, void* stream,
                             void* y) {
  check_alone(tokens);
  if (tokens.T == 0) return;
  with_dtype(tokens.x.dtype, [&](auto type) { Quantized<decltype(type)>(tokens, experts, workspace).run(stream, y); });
}

}  // namespace moert::cuda
