// Gradients through packed weights: a few experts at a time are dequantized and go through fused_experts_backward,
// which also computes their pre-activations again.  Sums over the parts are in the type of sums, in the order of the
// experts.
#include "cpu/packed_experts.h"
#include "cpu/parallel.h"
#include "moert/fused_experts_quantized.h"

namespace moert::cpu {

namespace {

// Dequantized weights in memory at a time, if one expert does not have more: 128 MB of float32.
constexpr int64_t kPartValues = 32 << 20;
constexpr int64_t kRowsPerTask = 16;

template <typename A>
struct PackedBackward {
  const Rows& dy;
  const RoutedRows& tokens;
  const QuantizedExperts& w;
  int64_t threads, T, k, H, I;
  DType dtype = DTypeOf<A>::value;
  Memory<A> x, dy_values, dx, part_dx, part_dweights, w1, w2;
  Memory<int32_t> ids;

  PackedBackward(const Rows& dy, const RoutedRows& tokens, const QuantizedExperts& w, int64_t threads)
      : dy(dy),
        tokens(tokens),
        w(w),
        threads(threads),
        T(tokens.T),
        k(tokens.k),
        H(w.floats.H),
        I(w.floats.I),
        x(allocate<A>(T * H)),
        dy_values(allocate<A>(T * H)),
        dx(allocate<A>(T * H)),
        part_dx(allocate<A>(T * H)),
        part_dweights(allocate<A>(T * k)),
        w1(allocate<A>(part_size() * w.w1.packing.rows * H)),
        w2(allocate<A>(part_size() * H * I)),
        ids(allocate<int32_t>(T * k)) {}

  // Experts in a part.
  int64_t part_size() const {
    const int64_t values = std::max<int64_t>(1, (w.w1.packing.rows + I) * H);
    return std::clamp<int64_t>(kPartValues / values, 1, w.floats.E);
  }

  // f(t) for every token.
  template <typename F>
  void for_tokens(const F& f) const {
    parallel_for((T + kRowsPerTask - 1) / kRowsPerTask, threads, [&](int64_t task) {
      for (int64_t t = task * kRowsPerTask; t < std::min(T, (task + 1) * kRowsPerTask); ++t) f(t);
    });
  }

  void widen(const Rows& from, A* to) const {
    for_tokens([&](int64_t t) {
      const char* row = at(from.data, from.dtype, t * from.stride);
      gemm_kernels().widen({row, from.dtype, 0, 1, nullptr}, 1, H, to + t * H, 0);
    });
  }

  // The choices of experts [first, first + n) as those of experts [0, n); true where there is one.
  bool choose(int64_t first, int64_t n) const {
    bool any = false;
    for (int64_t i = 0; i < T * k; ++i) {
      const int64_t e = tokens.ids[i] - first;
      ids[i] = 0 <= e && e < n ? int32_t(e) : -1;
      any |= ids[i] >= 0;
    }
    return any;
  }

  void dequantize(const PackedMatrix& matrix, int64_t first, int64_t n, A* out) const {
    const int64_t rows = matrix.packing.rows, K = matrix.packing.columns;
    const int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;  // of an expert
    parallel_for(n * tasks, threads, [&](int64_t task) {
      const int64_t e = task / tasks, row = task % tasks * kRowsPerTask, N = std::min(kRowsPerTask, rows - row);
      A* values = out + (e * rows + row) * K;
      float* floats =
          sizeof(A) == 8 ? reinterpret_cast<float*>(thread_scratch(N * K * 4)) : reinterpret_cast<float*>(values);
      packed_gemm_kernels().dequantize(rows_of(matrix, first + e, row), N, floats, K);
      if constexpr (sizeof(A) == 8) std::copy(floats, floats + N * K, values);
    });
  }

  ExpertWeights part_weights(int64_t first, int64_t n) const {
    ExpertWeights part = w.floats;
    const int64_t width = w.w1.packing.rows;
    const auto skip = [&](ExpertVector& v) {
      if (v.data) v.data = at(v.data, v.dtype, first * v.expert_stride);
    };
    part.E = n;
    part.gate = {w1.get(), dtype, width * H, H, 1};
    part.up = {w1.get() + I * H, dtype, width * H, H, 1};
    part.down = {w2.get(), dtype, H * I, I, 1};
    skip(part.gate_bias), skip(part.up_bias), skip(part.down_bias);
    return part;
  }

  void run(void* dx_out, void* dweights) {
    widen(tokens.x, x.get());
    widen(dy, dy_values.get());
    A* weights = static_cast<A*>(dweights);
    std::fill_n(dx.get(), T * H, A(0));
    if (weights) std::fill_n(weights, T * k, A(0));
    const RoutedRows part_tokens{T, k, {x.get(), dtype, H}, ids.get(), tokens.weights};
    ExpertGradients gradients;
    if (dx_out) gradients.dx = part_dx.get();
    if (weights) gradients.dweights = part_dweights.get();
    for (int64_t first = 0; first < w.floats.E; first += part_size()) {
      const int64_t n = std::min(part_size(), w.floats.E - first);
      if (!choose(first, n)) continue;
      dequantize(w.w1, first, n, w1.get());
      dequantize(w.w2, first, n, w2.get());
      fused_experts_backward({dy_values.get(), dtype, H}, part_tokens, part_weights(first, n), nullptr, threads,
                             gradients);
      for (int64_t i = 0; weights && i < T * k; ++i) weights[i] += ids[i] >= 0 ? part_dweights[i] : 0;
      if (!dx_out) continue;
      for_tokens([&](int64_t t) {
        for (int64_t i = t * H; i < (t + 1) * H; ++i) dx[i] += part_dx[i];
      });
    }
    if (!dx_out) return;
    for_tokens([&](int64_t t) {
      const int32_t row = int32_t(t);
      void* out = const_cast<char*>(at(dx_out, tokens.x.dtype, t * H));
      gemm_kernels().combine({1, H, dx.get(), H, &row, nullptr, out, tokens.x.dtype});
    });
  }
};

}  // namespace

void fused_experts_quantized_backward(const Rows& dy, const RoutedRows& tokens, const QuantizedExperts& experts,
                                      int64_t threads, void* dx, void* dweights) {
  if (tokens.x.dtype == DType::f64)
    PackedBackward<double>(dy, tokens, experts, threads).run(dx, dweights);
  else
    PackedBackward<float>(dy, tokens, experts, threads).run(dx, dweights);
}

}  // namespace moert::cpu
