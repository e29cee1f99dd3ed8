#include "moert/fused_experts.h"

#include "cpu/fused_experts_steps.h"

namespace moert::cpu {

namespace {

template <typename A>
void forward(const RoutedRows& tokens, const ExpertWeights& w, int64_t threads, void* y, void* h) {
  const Plan<A> plan(tokens, w.E, threads);
  const Memory<A> act = allocate<A>(plan.slots_used() * w.I), out = allocate<A>(plan.slots_used() * w.H);
  first_gemm<A>(tokens, w, plan, threads, act.get(), h);
  second_gemm<A>(w, plan, act.get(), threads, out.get());
  combine<A>(plan, out.get(), w.scale_on == ScaleOn::output, w.H, threads, y, tokens.x.dtype);
}

}  // namespace

void fused_experts(const RoutedRows& tokens, const ExpertWeights& experts, int64_t threads, void* y, void* h) {
  (tokens.x.dtype == DType::f64 ? forward<double> : forward<float>)(tokens, experts, threads, y, h);
}

}  // namespace moert::cpu
