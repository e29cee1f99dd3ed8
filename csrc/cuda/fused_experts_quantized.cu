#include "moert/fused_experts_quantized.h"

#include <algorithm>
#include <array>
#include <mutex>

#include "cuda/fused_experts.h"
#include "cuda/launch.h"
#include "cuda/packed_product.cuh"

namespace moert::cuda {

namespace {

// The dictionary of sub1 in the memory of the current device, brought there once.
const Sub1Entry* sub1_on_device() {
#if defined(__CUDACC__)
  constexpr int kMostDevices = 64;
  static std::array<Sub1Entry*, kMostDevices> tables{};
  static std::mutex mutex;
  int device = 0;
  MOERT_CUDA_CHECK(cudaGetDevice(&device));
  MOERT_CHECK(device < kMostDevices, "x must be on one of the first ", kMostDevices, " GPUs, got number ", device);
  const std::lock_guard lock(mutex);
  Sub1Entry*& table = tables[size_t(device)];
  if (!table) {
    const auto& entries = cpu::sub1_dictionary().entries;
    Sub1Entry* made = nullptr;
    const size_t bytes = entries.size() * sizeof(Sub1Entry);
    MOERT_CUDA_CHECK(cudaMalloc(&made, bytes));
    // cudaMemcpy may return before the bytes are there; the kernels of any stream may follow.
    cudaError_t status = cudaMemcpy(made, entries.data(), bytes, cudaMemcpyHostToDevice);
    if (status == cudaSuccess) status = cudaStreamSynchronize(cudaStreamLegacy);
    if (status != cudaSuccess) cudaFree(made);
    MOERT_CUDA_CHECK(status);
    table = made;
  }
  return table;
#else
  return cpu::sub1_dictionary().entries.data();
#endif
}

int width_of(Format format) {
  return with_codes(format, [](auto codes) { return decltype(codes)::kColumns; });
}

// The dictionary is left out.
PackedWeights weights_of(const char* name, const PackedMatrix& matrix) {
  const Packing& p = matrix.packing;
  PackedWeights w{matrix, 0, 0, 0, 31, false, nullptr};  // 2^31: a whole row
  if (p.format == Format::sub1) return w;
  MOERT_CHECK(p.rows * groups(p) <= INT32_MAX && p.columns <= INT32_MAX / 2, name,
              " must have fewer than 2^31 scales an expert and 2^30 columns on a GPU, got ", p.rows, " rows of ",
              groups(p), " and ", p.columns);
  w.row_bytes = row_bytes(p), w.groups = int32_t(groups(p));
  w.chunks = int32_t(ceil_div(p.columns, width_of(p.format)));
  if (p.group) w.group_shift = __builtin_ctzll(uint64_t(p.group));
  w.aligned = is_aligned(matrix.codes, matrix.codes_stride);
  return w;
}

// What lies between the kernels.  A is the type of sums, T that of x.
template <typename T>
struct Quantized {
  using A = Acc<T>;

  const RoutedRows& tokens;
  const QuantizedExperts& experts;
  const ExpertWeights& floats;
  ColumnOrder order1, order2;
  Memory memory;
  SlotPlan<T> plan;
  A *x, *act;  // [T, H] and [T*k, I], each in the order of the weights that it is multiplied with
  T* rows;     // [T*k, H]

  Quantized(const RoutedRows& tokens, const QuantizedExperts& experts, void* workspace)
      : tokens(tokens),
        experts(experts),
        floats(experts.floats),
        order1{width_of(experts.w1.packing.format)},
        order2{width_of(experts.w2.packing.format)},
        memory(workspace),
        plan(tokens, floats.E, floats.scale_on == ScaleOn::input, memory),
        x(memory.take<A>(tokens.T * order1.length(floats.H))),
        act(memory.take<A>(tokens.T * tokens.k * order2.length(floats.I))),
        rows(memory.take<T>(tokens.T * tokens.k * floats.H)) {}

  PackedProduct<A> product(const char* name, const PackedMatrix& w, int64_t N) const {
    PackedProduct<A> p{};
    p.S = int32_t(tokens.T * tokens.k), p.E = int32_t(floats.E), p.N = p.written = N;
    p.offsets = plan.offsets;
    p.w = weights_of(name, w);
    p.dtype = tokens.x.dtype;
    const int64_t tiles = num_row_tiles(p.S, p.E, kMostRows<A>);
    p.by_slot = p.S <= tiles, p.tiles = std::min<int64_t>(p.S, tiles);
    return p;
  }

  PackedProduct<A> first() const {
    PackedProduct<A> p = product("codes1", experts.w1, floats.I);
    p.index = plan.tokens;
    p.x = x, p.x_stride = order1.length(floats.H);
    p.bias = floats.gate_bias.data, p.up_bias = floats.up_bias.data;
    p.bias_expert = floats.gate_bias.expert_stride, p.bias_step = floats.bias1_stride;
    p.scale = floats.scale_on == ScaleOn::input ? plan.scale : nullptr;
    p.activates = true, p.form = activation_form<A>(floats.activation);
    p.y = act, p.order = order2, p.y_stride = order2.length(floats.I);
    if (order2.width) p.written = ceil_div(floats.I, order2.width) * order2.width;
    return p;
  }

  PackedProduct<A> second() const {
    PackedProduct<A> p = product("codes2", experts.w2, floats.H);
    p.x = act, p.x_stride = order2.length(floats.I);
    p.bias = floats.down_bias.data, p.bias_expert = floats.down_bias.expert_stride;
    p.bias_step = 1;
    p.y = rows, p.y_stride = floats.H;
    return p;
  }

  void multiply(PackedProduct<A> p, void* stream) const {
    if (p.S == 0 || p.N == 0) return;
    if (p.w.matrix.packing.format == Format::sub1) p.w.dictionary = sub1_on_device();
    with_codes(p.w.matrix.packing.format, [&](auto codes) {
      using Codes = decltype(codes);
      const int64_t outputs = kPackedWarps * (p.gated() ? Codes::kRows / 2 : Codes::kRows);
      launch(&packed_product<A, Codes>, {p.tiles * ceil_div(p.written, outputs)}, kPackedThreads, stream, p);
    });
  }

  void run(void* stream, void* y) const {
    plan.run(tokens, floats.E, stream);
    const int64_t length = order1.length(floats.H);
    launch(&order_columns<A>, {ceil_div(tokens.T * length, kPackedThreads)}, kPackedThreads, stream, tokens.x.data,
           tokens.x.dtype, tokens.x.stride, tokens.T, floats.H, order1, length, x);
    multiply(first(), stream);
    multiply(second(), stream);
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
