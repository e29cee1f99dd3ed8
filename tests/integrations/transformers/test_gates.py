"""What is recognised as a known gate or activation, and what is not."""

import torch
from transformers.activations import ACT2FN

from moert.integrations.transformers import gates
from moert.ops.fused_experts import apply_activation
from moert.types import Activation


def test_an_activation_is_recognised_only_if_it_computes_that():
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    recognised = set()
    for name in ACT2FN:
        act = ACT2FN[name] if name != "xielu" else None
        kind = act and gates.activation_name(act)
        if kind:
            recognised.add(kind)
            assert torch.allclose(act(x), apply_activation(x, Activation(kind)), rtol=1e-12, atol=1e-12), name
    assert recognised == {"silu", "gelu", "gelu_tanh", "relu", "relu2"}


def test_an_activation_that_is_a_gate_has_its_gated_form():
    x = torch.linspace(-6, 6, 96, dtype=torch.float64).view(-1, 4)
    for name, gated in {"silu": "swiglu", "gelu": "geglu", "gelu_new": "geglu_tanh", "relu": "reglu"}.items():
        gate, up = x.chunk(2, -1)
        assert gates.glu_name(ACT2FN[name]) == gated
        assert torch.allclose(ACT2FN[name](gate) * up, apply_activation(x, Activation(gated)), rtol=1e-12, atol=1e-12)
    assert gates.glu_name(ACT2FN["relu2"]) is None and gates.glu_name(torch.nn.Softplus()) is None


def test_a_module_with_hooks_or_a_forward_of_its_own_is_touched():
    act = torch.nn.SiLU()
    assert gates.untouched(act)
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(act, register)(lambda *_: None)
        assert not gates.untouched(act) and gates.glu_name(act) is None
        handle.remove()
        assert gates.untouched(act)
    act.forward = act.forward
    assert not gates.untouched(act)


def test_changed_gates_are_not_recognised():
    """What is near a known gate but not the same runs as it is."""
    F = torch.nn.functional

    def scaled(self, h):
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up * 2

    def swapped(self, h):
        up, gate = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def clamped_after(self, h):
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate).clamp(max=self.limit) * up.clamp(min=-self.limit, max=self.limit)

    def two_limits(self, h):
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=self.limit)) * up.clamp(min=-self.limit, max=self.other)

    def one_sided(self, h):
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=self.limit)) * up.clamp(max=self.limit)

    def no_offset(self, h):
        gate, up = h[..., ::2].clamp(max=self.limit), h[..., 1::2].clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(gate * self.alpha) * up

    def branching(self, h):
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up if h.sum() > 0 else up

    for gate in (scaled, swapped, clamped_after, two_limits, one_sided, no_offset, branching):
        assert gates.recognise(gate) is None, gate.__name__
