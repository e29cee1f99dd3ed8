// Gradients through packed weights, as on a CPU: a few experts at a time become numbers in the dtype of x and go
// through fused_experts_backward, which also computes their pre-activations again.  Sums over the parts are in the type
// of sums, in the order of the experts.
#include <algorithm>

#include "cuda/fused_experts.h"
#include "cuda/launch.h"
#include "cuda/packed_dequantize.cuh"

namespace moert::cuda {

namespace {

// Weights in memory at a time, if one expert does not have more.  In emulation little, so that tests have many parts.
#if defined(__CUDACC__)
constexpr int64_t kPartBytes = 256 << 20;
#else
constexpr int64_t kPartBytes = 32 << 10;
#endif

template <typename T>
struct PackedBackward {
  using A = Acc<T>;
  static constexpr DType kType = DTypeOf<T>::value;

  const Rows& dy;
  const RoutedRows& tokens;
  const QuantizedExperts& experts;
  const ExpertGradients& out;  // dx and dweights
  const int64_t T_, H, I, E, width, choices, part;
  Memory memory;
  int32_t *used, *ids;  // [E], [T, k]
  T *w1, *w2;           // [part, width, H], [part, H, I]
  T* dx;                // [T, H] of a part
  A *dweights, *sums;   // [T, k] of a part; [T, H] of those so far
  void* workspace;      // of fused_experts_backward

  PackedBackward(const Rows& dy, const RoutedRows& tokens, const QuantizedExperts& experts, const ExpertGradients& out,
                 void* workspace_)
      : dy(dy),
        tokens(tokens),
        experts(experts),
        out(out),
        T_(tokens.T),
        H(experts.floats.H),
        I(experts.floats.I),
        E(experts.floats.E),
        width(experts.w1.packing.rows),
        choices(tokens.T * tokens.k),
        part(part_size()),
        memory(workspace_),
        used(memory.take<int32_t>(E)),
        ids(memory.take<int32_t>(choices)),
        w1(memory.take<T>(part * width * H)),
        w2(memory.take<T>(part * H * I)),
        dx(out.dx && part < E ? memory.take<T>(T_ * H) : static_cast<T*>(out.dx)),
        dweights(out.dweights && part < E ? memory.take<A>(choices) : static_cast<A*>(out.dweights)),
        sums(out.dx && part < E ? memory.take<A>(T_ * H) : nullptr),
        workspace(memory.take<char>(
            fused_experts_backward_workspace(part_tokens(), part_weights(0, part), false, part_gradients()))) {}

  // Experts in a part.
  int64_t part_size() const {
    const int64_t bytes = std::max<int64_t>(1, (width + I) * H * int64_t(sizeof(T)));
    return std::clamp<int64_t>(kPartBytes / bytes, 1, std::max<int64_t>(E, 1));
  }

  RoutedRows part_tokens() const {
    RoutedRows rows{tokens.T, tokens.k, tokens.x, ids, tokens.weights};
    rows.batch_invariant = tokens.batch_invariant;
    return rows;
  }

  // Where the memory is only counted they stand for what is asked for.
  ExpertGradients part_gradients() const {
    ExpertGradients gradients;
    gradients.dx = dx ? dx : static_cast<T*>(out.dx);
    gradients.dweights = dweights ? dweights : static_cast<A*>(out.dweights);
    return gradients;
  }

  ExpertWeights part_weights(int64_t first, int64_t n) const {
    ExpertWeights weights = experts.floats;
    const auto skip = [&](ExpertVector& v) {
      if (v.data) v.data = static_cast<const T*>(v.data) + first * v.expert_stride;
    };
    weights.E = n;
    weights.gate = {w1, kType, width * H, H, 1};
    weights.up = {w1 + I * H, kType, width * H, H, 1};
    weights.down = {w2, kType, H * I, I, 1};
    skip(weights.gate_bias), skip(weights.up_bias), skip(weights.down_bias);
    return weights;
  }

  void unpack(const char* name, const PackedMatrix& matrix, int64_t first, int64_t n, T* to, void* stream) const {
    const Packing& p = matrix.packing;
    if (p.rows == 0 || p.columns == 0) return;
    PackedWeights w = weights_of(name, matrix);
    if (p.format == Format::sub1) w.dictionary = sub1_on_device();
    with_codes(p.format, [&](auto codes) {
      launch(&unpack_weights<decltype(codes)>, {ceil_div(n * p.rows, kUnpackWarps)}, kUnpackThreads, stream,
             Unpacking{w, used, first, n, kType, to});
    });
  }

  template <typename U>
  void add(const U* from, int64_t n, int64_t first, Acc<U>* to, U* rounded, void* stream) const {
    const bool ends = first + part >= E;
    launch(&add_part<U>, {ceil_div(n, kUnpackThreads)}, kUnpackThreads, stream, from, n, first == 0, to,
           ends ? rounded : nullptr);
  }

  void run(void* stream) const {
    const int64_t blocks = ceil_div(choices, kUnpackThreads);
    launch(&clear_used, {ceil_div(E, kUnpackThreads)}, kUnpackThreads, stream, E, used);
    launch(&mark_used, {blocks}, kUnpackThreads, stream, tokens.ids, choices, int32_t(E), used);
    for (int64_t first = 0; first == 0 || first < E; first += part) {  // without experts dx is zeros
      const int64_t n = std::min(part, E - first);
      launch(&choose_part, {blocks}, kUnpackThreads, stream, tokens.ids, choices, int32_t(first), int32_t(n), ids);
      unpack("codes1", experts.w1, first, n, w1, stream);
      unpack("codes2", experts.w2, first, n, w2, stream);
      fused_experts_backward(dy, part_tokens(), part_weights(first, n), nullptr, workspace, stream, part_gradients());
      if (part >= E) return;
      if (out.dx) add(dx, T_ * H, first, sums, static_cast<T*>(out.dx), stream);
      if (out.dweights) add(dweights, choices, first, static_cast<A*>(out.dweights), static_cast<A*>(nullptr), stream);
    }
  }
};

}  // namespace

int64_t fused_experts_quantized_backward_workspace(const RoutedRows& tokens, const QuantizedExperts& experts,
                                                   const ExpertGradients& gradients) {
  int64_t bytes = 0;
  const Rows dy{};
  with_dtype(tokens.x.dtype, [&](auto type) {
    bytes = PackedBackward<decltype(type)>(dy, tokens, experts, gradients, nullptr).memory.used();
  });
  return bytes;
}

void fused_experts_quantized_backward(const Rows& dy, const RoutedRows& tokens, const QuantizedExperts& experts,
                                      void* workspace, void* stream, const ExpertGradients& gradients) {
  check_alone(tokens);
  if (tokens.T == 0) return;
  with_dtype(tokens.x.dtype,
             [&](auto type) { PackedBackward<decltype(type)>(dy, tokens, experts, gradients, workspace).run(stream); });
}

}  // namespace moert::cuda
