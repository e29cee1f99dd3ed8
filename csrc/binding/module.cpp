// Every operator schema of moert, and the one choice that is no argument.  Floating outputs come first, integer outputs
// last (opcheck needs it).
#include <torch/csrc/stable/library.h>

#include <utility>

#include "binding/batch_invariant.h"

// For moert.batch_invariant, which finds it by name.  Returns what it was.
extern "C" __attribute__((visibility("default"))) bool moert_set_batch_invariant(bool enabled) {
  return std::exchange(moert::batch_invariant, enabled);
}

STABLE_TORCH_LIBRARY(moert, m) {
  m.def(
      "topk_gating(Tensor logits, int k, str score, Tensor? bias, bool renormalize, float scale, int num_groups, "
      "int topk_groups, str group_score) -> (Tensor weights, Tensor ids)");
  m.def(
      "topk_gating_backward(Tensor dweights, Tensor logits, Tensor ids, str score, bool renormalize, float scale) "
      "-> Tensor dlogits");

  m.def(
      "expert_choice(Tensor scores, Tensor segments, Tensor capacity, int max_choices, SymInt? max_slots=None) "
      "-> (Tensor weights, Tensor ids, Tensor offsets, Tensor tokens, Tensor slots)");

  m.def(
      "permute_plan(Tensor ids, int num_experts, SymInt? capacity=None) -> (Tensor offsets, Tensor tokens, Tensor "
      "slots)");
  m.def("permute(Tensor x, Tensor tokens, Tensor slots) -> Tensor rows");
  m.def("unpermute(Tensor rows, Tensor tokens, Tensor slots, Tensor? weights, Tensor? residual=None) -> Tensor y");
  m.def(
      "unpermute_backward(Tensor dy, Tensor rows, Tensor tokens, Tensor slots, Tensor weights) "
      "-> (Tensor drows, Tensor dweights)");

  m.def(
      "dispatch_plan(Tensor ids, Tensor expert_to_rank, int num_ranks, Tensor? x=None, Tensor? weights=None) "
      "-> (Tensor offsets, Tensor tokens, Tensor slots)");
  m.def(
      "dispatch_pack(Tensor x, Tensor weights, Tensor ids, Tensor expert_to_rank, Tensor local_ids, Tensor offsets, "
      "Tensor tokens, str payload=\"none\") -> Tensor records");
  m.def(
      "dispatch_pack_(Tensor(a!) records, Tensor x, Tensor weights, Tensor ids, Tensor expert_to_rank, Tensor "
      "local_ids, Tensor offsets, Tensor tokens, int first, str payload) -> ()");
  m.def("dispatch_unpack_(Tensor(a!) rows, Tensor records, str payload) -> ()");
  m.def("dispatch_combine(Tensor rows, Tensor own, int first, Tensor slots, Tensor? residual=None) -> Tensor y");

  m.def(
      "grouped_gemm(Tensor x, Tensor w, Tensor offsets, Tensor? bias, Tensor? tokens, Tensor? scale, "
      "str scale_on, bool transposed, bool tf32=False) -> Tensor y");
  m.def(
      "grouped_gemm_wgrad(Tensor dy, Tensor x, Tensor offsets, Tensor? tokens, bool transposed, bool tf32=False) "
      "-> Tensor dw");

  m.def(
      "fused_experts(Tensor x, Tensor ids, Tensor weights, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2, "
      "str activation, float alpha, float limit, bool transposed, bool interleaved, str scale_on, bool save, "
      "Tensor? offsets=None, Tensor? tokens=None, Tensor? slots=None, Tensor? onto_rows=None, Tensor? onto_scale=None, "
      "Tensor? mix=None, Tensor? constants=None, Tensor? w1_main_grad=None, Tensor? w2_main_grad=None, "
      "Tensor? b1_main_grad=None, Tensor? b2_main_grad=None, bool tf32=False) -> (Tensor y, Tensor h)");
  m.def(
      "fused_experts_backward(Tensor dy, Tensor x, Tensor ids, Tensor weights, Tensor w1, Tensor w2, Tensor? b1, "
      "Tensor? b2, Tensor h, str activation, float alpha, float limit, bool transposed, bool interleaved, "
      "str scale_on, int needs, Tensor? offsets=None, Tensor? tokens=None, Tensor? slots=None, bool tf32=False) "
      "-> (Tensor dx, Tensor dweights, Tensor dw1, Tensor dw2, Tensor db1, Tensor db2)");
  m.def(
      "fused_experts_backward_(Tensor dy, Tensor x, Tensor ids, Tensor weights, Tensor w1, Tensor w2, Tensor? b1, "
      "Tensor? b2, Tensor h, Tensor(a!)? w1_main_grad, Tensor(b!)? w2_main_grad, Tensor(c!)? b1_main_grad, "
      "Tensor(d!)? b2_main_grad, str activation, float alpha, float limit, bool transposed, bool interleaved, "
      "str scale_on, int needs, Tensor? offsets=None, Tensor? tokens=None, Tensor? slots=None, bool tf32=False) "
      "-> (Tensor dx, Tensor dweights, Tensor dw1, Tensor dw2, Tensor db1, Tensor db2)");

  m.def(
      "fused_experts_quantized(Tensor x, Tensor ids, Tensor weights, Tensor codes1, Tensor scales1, Tensor? zeros1, "
      "Tensor codes2, Tensor scales2, Tensor? zeros2, Tensor? b1, Tensor? b2, str format1, int group1, str format2, "
      "int group2, str activation, float alpha, float limit, str precision, str scale_on) -> Tensor y");
  m.def(
      "fused_experts_quantized_backward(Tensor dy, Tensor x, Tensor ids, Tensor weights, Tensor codes1, Tensor "
      "scales1, "
      "Tensor? zeros1, Tensor codes2, Tensor scales2, Tensor? zeros2, Tensor? b1, Tensor? b2, str format1, int group1, "
      "str format2, int group2, str activation, float alpha, float limit, str scale_on, int needs) "
      "-> (Tensor dx, Tensor dweights)");

  m.def(
      "union_experts(Tensor x, Tensor gains, Tensor ids, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2, "
      "str activation, float alpha, float limit, bool transposed, bool interleaved) -> Tensor y");
}
