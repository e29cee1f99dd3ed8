// The activations and their derivatives on one vector V of gates g and ups u.
#pragma once

#include "cpu/simd.h"
#include "moert/fused_experts.h"

namespace moert::cpu {
namespace {

template <typename V>
struct Slope {
  V value, slope;
};

// f(g) and f'(g) of the function under a gate, or of an activation without gate.
template <Act act, typename V>
MOERT_INLINE Slope<V> unary(const V& g) {
  using A = std::remove_cv_t<std::remove_reference_t<decltype(g[0])>>;
  const V zero{};
  if constexpr (act == Act::silu || act == Act::swiglu || act == Act::swiglu_clamped) {
    const V s = sigmoid(g);
    return {g * s, s * (1 + g * (1 - s))};
  } else if constexpr (act == Act::gelu || act == Act::geglu) {
    const V cdf = A(0.5) * (1 + erf(g * A(0.70710678118654752440)));
    return {g * cdf, cdf + g * exp(g * g * A(-0.5)) * A(0.39894228040143267794)};
  } else if constexpr (act == Act::gelu_tanh || act == Act::geglu_tanh) {
    // (1 + tanh(z)) / 2 is sigmoid(2 z), which does not cancel.
    const V s = sigmoid((g + g * g * g * A(0.044715)) * A(2 * 0.79788456080286535588));
    const V slope = (1 + g * g * A(3 * 0.044715)) * A(2 * 0.79788456080286535588);
    return {g * s, s + g * s * (1 - s) * slope};
  } else if constexpr (act == Act::relu || act == Act::reglu) {
    return {max(g, zero), select(g > zero, zero + 1, zero)};
  } else if constexpr (act == Act::relu2) {
    const V r = max(g, zero);
    return {r * r, r + r};
  } else {
    return {g, zero + 1};
  }
}

template <typename V>
struct Gradients {
  V act, dgate, dup;
};

template <Act act, typename V, typename A>
MOERT_INLINE V activate(const V& g, const V& u, A alpha, A limit) {
  if constexpr (act == Act::swiglu_clamped || act == Act::swiglu_oai) {
    const V gate = min(g, splat(limit)), up = max(min(u, splat(limit)), splat(-limit));
    if constexpr (act == Act::swiglu_oai) return gate * sigmoid(gate * alpha) * (up + 1);
    return unary<act>(gate).value * up;
  } else {
    return is_gated(act) ? unary<act>(g).value * u : unary<act>(g).value;
  }
}

// d is the gradient of the activation.
template <Act act, typename V, typename A>
MOERT_INLINE Gradients<V> activate_backward(const V& g, const V& u, const V& d, A alpha, A limit) {
  const V zero{};
  if constexpr (act == Act::swiglu_clamped || act == Act::swiglu_oai) {
    const V gate = min(g, splat(limit)), up = max(min(u, splat(limit)), splat(-limit));
    const auto through_gate = [&](const V& x) { return select(g <= limit, x, zero); };
    const auto through_up = [&](const V& x) { return select(u <= limit, select(u >= -limit, x, zero), zero); };
    if constexpr (act == Act::swiglu_oai) {
      const V s = sigmoid(gate * alpha), f = gate * s, slope = s * (1 + gate * alpha * (1 - s));
      return {f * (up + 1), through_gate(slope * (up + 1) * d), through_up(f * d)};
    } else {
      const Slope<V> f = unary<act>(gate);
      return {f.value * up, through_gate(f.slope * up * d), through_up(f.value * d)};
    }
  } else {
    const Slope<V> f = unary<act>(g);
    if constexpr (is_gated(act)) return {f.value * u, f.slope * u * d, f.value * d};
    return {f.value, f.slope * d, zero};
  }
}

// f(std::integral_constant<Act, act>) for the act at run time.
template <typename F>
MOERT_INLINE void with_act(Act act, const F& f) {
#define MOERT_CASE(name) \
  case Act::name:        \
    return f(std::integral_constant<Act, Act::name>{});
  switch (act) {
    MOERT_CASE(identity)
    MOERT_CASE(silu)
    MOERT_CASE(gelu)
    MOERT_CASE(gelu_tanh)
    MOERT_CASE(relu)
    MOERT_CASE(relu2)
    MOERT_CASE(swiglu)
    MOERT_CASE(geglu)
    MOERT_CASE(geglu_tanh)
    MOERT_CASE(reglu)
    MOERT_CASE(swiglu_clamped)
    MOERT_CASE(swiglu_oai)
  }
#undef MOERT_CASE
}

}  // namespace
}  // namespace moert::cpu
