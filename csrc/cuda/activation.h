// The activations and their derivatives on scalars, in one form: y = g f(g) (u + up_add), g and u clamped first.
//
// With the choice in data, one kernel serves every activation; cpu/activation.h has the formulas one by one.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "moert/fused_experts.h"

namespace moert::cuda {

enum class Factor : int32_t {
  one,
  sigmoid,  // of linear g + cubic g^3
  normal,   // the normal distribution's cumulative function
  step,     // 1 where g > 0
  ramp      // max(g, 0)
};

// A is the type of values: float or double.
template <typename A>
struct ActivationForm {
  Factor factor = Factor::one;
  bool gated = false;
  A linear = 1, cubic = 0;
  A most = A(INFINITY);  // of g, and of u on either side
  A up_add = 0;
};

template <typename A>
inline ActivationForm<A> activation_form(const Activation& activation) {
  ActivationForm<A> form;
  form.gated = is_gated(activation.act);
  switch (activation.act) {
    case Act::identity:
      break;
    case Act::silu:
    case Act::swiglu:
      form.factor = Factor::sigmoid;
      break;
    case Act::swiglu_clamped:
      form.factor = Factor::sigmoid;
      form.most = A(activation.limit);
      break;
    case Act::swiglu_oai:
      form.factor = Factor::sigmoid;
      form.linear = A(activation.alpha);
      form.most = A(activation.limit);
      form.up_add = 1;
      break;
    case Act::gelu:
    case Act::geglu:
      form.factor = Factor::normal;
      break;
    case Act::gelu_tanh:
    case Act::geglu_tanh:  // (1 + tanh(z)) / 2 is sigmoid(2 z)
      form.factor = Factor::sigmoid;
      form.linear = A(2 * 0.79788456080286535588);
      form.cubic = A(2 * 0.79788456080286535588 * 0.044715);
      break;
    case Act::relu:
    case Act::reglu:
      form.factor = Factor::step;
      break;
    case Act::relu2:
      form.factor = Factor::ramp;
      break;
  }
  return form;
}

MOERT_HOST_DEVICE static inline float exp_of(float x) { return expf(x); }
MOERT_HOST_DEVICE static inline double exp_of(double x) { return exp(x); }
// 1 - erf is kept by erfc where erf would round to -1.
MOERT_HOST_DEVICE static inline float erfc_of(float x) { return erfcf(x); }
MOERT_HOST_DEVICE static inline double erfc_of(double x) { return erfc(x); }

// Comparisons, not fmin: a NaN must stay one.
template <typename A>
MOERT_HOST_DEVICE inline A at_most(A x, A most) {
  return x > most ? most : x;
}

template <typename A>
MOERT_HOST_DEVICE inline A between(A x, A most) {
  return x > most ? most : x < -most ? -most : x;
}

// What g is times in the sigmoid.  Without the cubic nothing is squared: 0 * inf is a NaN.
template <typename A>
MOERT_HOST_DEVICE inline A steepness(const ActivationForm<A>& form, A g, A times) {
  return form.cubic == 0 ? form.linear : form.linear + times * form.cubic * g * g;
}

// f(g)
template <typename A>
MOERT_HOST_DEVICE inline A factor_of(const ActivationForm<A>& form, A g) {
  switch (form.factor) {
    case Factor::sigmoid:
      return 1 / (1 + exp_of(-g * steepness(form, g, A(1))));
    case Factor::normal:
      return A(0.5) * erfc_of(g * A(-0.70710678118654752440));
    case Factor::step:
      return g > 0 ? A(1) : A(0);
    case Factor::ramp:
      return g > 0 ? g : A(0);
    default:
      return 1;
  }
}

// (g f(g))'
template <typename A>
MOERT_HOST_DEVICE inline A slope_of(const ActivationForm<A>& form, A g, A f) {
  switch (form.factor) {
    case Factor::sigmoid:
      return f + g * f * (1 - f) * steepness(form, g, A(3));
    case Factor::normal:
      return f + g * exp_of(g * g * A(-0.5)) * A(0.39894228040143267794);
    case Factor::ramp:
      return f + f;
    default:
      return f;
  }
}

// u is not looked at where the activation is not gated.
template <typename A>
MOERT_HOST_DEVICE inline A activate(const ActivationForm<A>& form, A g, A u) {
  g = at_most(g, form.most);
  const A value = form.factor == Factor::step ? (g < 0 ? A(0) : g) : g * factor_of(form, g);
  return form.gated ? value * (between(u, form.most) + form.up_add) : value;
}

template <typename A>
struct ActivationGradients {
  A act, dgate, dup;
};

// d is the gradient of the activation.
template <typename A>
MOERT_HOST_DEVICE inline ActivationGradients<A> activate_backward(const ActivationForm<A>& form, A g, A u, A d) {
  const A gate = at_most(g, form.most), f = factor_of(form, gate), slope = slope_of(form, gate, f);
  const A value = form.factor == Factor::step ? (gate < 0 ? A(0) : gate) : gate * f;
  if (!form.gated) return {value, slope * d, A(0)};
  const A up = between(u, form.most) + form.up_add;
  return {value * up, g <= form.most ? slope * up * d : A(0), u <= form.most && u >= -form.most ? value * d : A(0)};
}

}  // namespace moert::cuda
