// The whole expert FFN: gather, GEMM, activation, GEMM, weighted combine.
#pragma once

#include <cstdint>

#include "moert/grouped_gemm.h"

namespace moert {

// Gated ones act on a gate and an up half; the formulas are in cpu/activation.h.
enum class Act : int32_t {
  identity,
  silu,
  gelu,
  gelu_tanh,
  relu,
  relu2,
  swiglu,
  geglu,
  geglu_tanh,
  reglu,
  swiglu_clamped,
  swiglu_oai
};

constexpr bool is_gated(Act act) { return act >= Act::swiglu; }

struct Activation {
  Act act = Act::swiglu;
  double alpha = 1.702, limit = 7;
};

// The experts' weights.  w1 is given as its gate and its up half (only `gate` where the activation is not gated), so
// that any layout is two strided matrices.
struct ExpertWeights {
  int64_t E, H, I;
  ExpertMatrix gate, up;            // [E, I, H]
  ExpertMatrix down;                // [E, H, I]
  ExpertVector gate_bias, up_bias;  // [E, I]
  int64_t bias1_stride = 1;         // between elements of gate_bias and up_bias
  ExpertVector down_bias;           // [E, H]
  Activation activation;
  ScaleOn scale_on = ScaleOn::output;
};

// What is added to the sum over a token's choices, before it is rounded: scale[t] * rows[t] + sum over c of mix[t, c] *
// constants[c].
struct Onto {
  Rows rows{};                      // [T, H], or no data: nothing
  const void* scale = nullptr;      // [T], null: all one
  int64_t C = 0;                    // constants
  const void* mix = nullptr;        // [T, C]
  const void* constants = nullptr;  // [C, H], dense; scale and mix are float32 (float64 where x is), the rest is like x
};

// The routed tokens.
struct RoutedRows {
  int64_t T, k;
  Rows x;               // [T, H]
  const int32_t* ids;   // [T, k]; outside [0, E): dropped
  const void* weights;  // [T, k], float32 (float64 where x is)
  // The bits of a row of y do not depend on the other rows.
  bool batch_invariant = false;
  // What permute_plan makes of the ids, but for the number S of slots, which may be any that is enough; null: it is
  // made here, of T*k slots.
  const int32_t *offsets = nullptr, *tokens = nullptr, *slots = nullptr;
  int64_t S = 0;
  Onto onto{};        // for the forward
  bool tf32 = false;  // a GPU may round float32 factors to tf32
  // The second product of a GPU's forward adds its rows to their tokens' sums, in no order, rather than to have them
  // gathered.  Not where a backward follows, which has the bits of the forward, nor where bits may not depend on
  // others.
  bool fused_combine = false;
};

// Gradients of y; a null pointer is not computed.  All dense, in the dtype of what they are the gradient of.
struct ExpertGradients {
  void* dx = nullptr;                    // [T, H]
  void* dweights = nullptr;              // [T, k], float32 (float64 where x is)
  ExpertMatrix dgate{}, dup{}, ddown{};  // like gate, up, down
  ExpertVector dgate_bias, dup_bias, ddown_bias;
  // Of w1 (gate and up), w2 and the biases of either: the gradient, in the type of sums, is added to what is there, and
  // an expert without rows keeps its bits.
  struct {
    bool w1 = false, w2 = false, b1 = false, b2 = false;
  } accumulate{};
};

namespace cpu {

// Weights [E, N, K] in panels, [E, N / columns, K / depth, columns, depth], are multiplied where they lie, without
// being laid out first; of w1 the gate half comes first.  The sizes depend on the instruction set in use.
struct Panel {
  int64_t columns, depth;
};
Panel panel_of(DType dtype);

// y [T, H] (dense, dtype of x): y[t] = sum over j of weights[t, j] * FFN_ids[t, j](x[t]), in choice order, + onto[t].
// h: null, or the pre-activations [T*k, 2I] in slot order, gate then up, in x's dtype, zero for unused slots; [S, 2I]
// with a plan.  Throws, before it writes, where the plan is not that of the ids.
void fused_experts(const RoutedRows& tokens, const ExpertWeights& experts, int64_t threads, void* y, void* h);

// dy [T, H]; h as fused_experts wrote it, or null: then it is computed again.
void fused_experts_backward(const Rows& dy, const RoutedRows& tokens, const ExpertWeights& experts, const void* h,
                            int64_t threads, const ExpertGradients& gradients);

}  // namespace cpu

// The same on the current device, ordered by `stream` (a cudaStream_t); every pointer is the device's.  Not for weights
// in panels.  `workspace` is as many bytes of the device as the function before says, aligned to 256.  A plan is taken
// as it is: of another one than that of the ids nothing outside the given memory is read or written.
namespace cuda {

// saves: whether h is wanted.
int64_t fused_experts_workspace(const RoutedRows& tokens, const ExpertWeights& experts, bool saves);

void fused_experts(const RoutedRows& tokens, const ExpertWeights& experts, void* workspace, void* stream, void* y,
                   void* h);

int64_t fused_experts_backward_workspace(const RoutedRows& tokens, const ExpertWeights& experts, bool saved,
                                         const ExpertGradients& gradients);

// The gate and up rows of w1, and of its gradient, must lie one after the other or in turns.
void fused_experts_backward(const Rows& dy, const RoutedRows& tokens, const ExpertWeights& experts, const void* h,
                            void* workspace, void* stream, const ExpertGradients& gradients);

}  // namespace cuda
}  // namespace moert
