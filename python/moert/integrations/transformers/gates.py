"""Recognises what an experts class of transformers computes between its two GEMMs.

A gate is traced and compared, operation by operation, with the gates the fused kernel has; a gate that differs in
anything is not recognised and runs as it is.  Names of models, classes and configurations are never looked at.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node, symbolic_trace
from torch.nn.modules.module import _has_any_global_hook
from transformers import activations

from moert.types import Activation


@dataclass(frozen=True)
class Gate:
    """A recognised `_apply_gate`: what it does around `act_fn` ("glu") or in all, and where it keeps its numbers."""

    name: str
    uses_act_fn: bool
    interleaved: bool
    alpha: str | None = None
    limit: str | None = None


def fused_activation(experts: nn.Module) -> tuple[Activation, bool] | None:
    """The (activation, interleaved) that fused_experts takes for these experts; None where they must run unfused."""
    if not experts.has_gate:
        name = activation_name(experts.act_fn)
        return None if name is None else (Activation(name), False)
    gate = None if "_apply_gate" in experts.__dict__ else recognise(type(experts)._apply_gate)
    if gate is None:
        return None
    act = activation_name(experts.act_fn) if gate.uses_act_fn else "silu"
    if gate.name == "glu":
        return None if act not in _GLU else (Activation(_GLU[act]), gate.interleaved)
    alpha = 1.702 if gate.alpha is None else getattr(experts, gate.alpha)
    limit = getattr(experts, gate.limit)
    if act != "silu" or not (isinstance(alpha, float | int) and isinstance(limit, float | int) and limit >= 0):
        return None
    return Activation(gate.name, alpha=float(alpha), limit=float(limit)), gate.interleaved


def activation_name(act: Callable) -> str | None:
    """The ungated Activation that a function or module computes, or None.

    A module with hooks, or with a forward of its own put on the instance, is not what its class says.
    """
    if not isinstance(act, nn.Module):
        return _FUNCTIONS.get(act) if not isinstance(act, functools.partial) else _partial_name(act)
    if not untouched(act):
        return None
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return _MODULES.get(type(act))


def glu_name(act: Callable) -> str | None:
    """The gated Activation that computes act(gate) * up, or None."""
    return _GLU.get(activation_name(act))


def untouched(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and not _has_any_global_hook() and "forward" not in module.__dict__


def _partial_name(act: functools.partial) -> str | None:
    if act.func is F.gelu and not act.args and act.keywords == {"approximate": "tanh"}:
        return "gelu_tanh"
    return None


_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"}
_MODULES = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.Identity: "identity",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.ReLUSquaredActivation: "relu2",
}
_GLU = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


@torch.compiler.assume_constant_result
def recognise(apply_gate: Callable) -> Gate | None:
    """The known gate that an `_apply_gate(self, gate_up)` computes, or None."""
    return _recognise(apply_gate)


@functools.lru_cache(maxsize=1024)
def _recognise(apply_gate: Callable) -> Gate | None:
    try:
        text, names = _normal_form(apply_gate)
    except Exception:  # whatever cannot be traced is not a known gate
        return None
    for gate, (known_text, known_names) in _known_gates():
        pairs = set(zip(known_names, names, strict=False))
        if text == known_text and len(pairs) == len(set(known_names)):
            return Gate(gate.name, gate.uses_act_fn, gate.interleaved, **dict(pairs))
    return None


@functools.cache
def _known_gates() -> list[tuple[Gate, tuple[str, list[str]]]]:
    """Our spelling of every gate the fused kernel has, in both layouts of gate and up."""

    def glu(self, gate, up, act):
        return act(gate) * up

    def swiglu_clamped(self, gate, up, act):
        return act(gate.clamp(max=self.limit)) * up.clamp(min=-self.limit, max=self.limit)

    def swiglu_oai(self, gate, up, act):
        gate = gate.clamp(max=self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up.clamp(min=-self.limit, max=self.limit) + 1)

    spellings = [(glu, True), (swiglu_clamped, True), (swiglu_clamped, False), (swiglu_oai, False)]
    known = []
    for fn, uses_act_fn in spellings:
        for interleaved in (False, True):
            gate = Gate(fn.__name__, uses_act_fn, interleaved)
            known.append((gate, _normal_form(functools.partial(_spell, fn, uses_act_fn, interleaved))))
    return known


def _spell(fn: Callable, uses_act_fn: bool, interleaved: bool, experts, h):
    gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, dim=-1)
    return fn(experts, gate, up, experts.act_fn if uses_act_fn else F.silu)


def _normal_form(apply_gate: Callable) -> tuple[str, list[str]]:
    """What an `_apply_gate` computes as text, with "@" for each attribute of self it reads, and the names in order."""

    graph = symbolic_trace(lambda experts, h: apply_gate(experts, h)).graph
    experts, h = (node for node in graph.nodes if node.op == "placeholder")
    (result,) = next(node for node in graph.nodes if node.op == "output").args
    return _form(result, experts, h)


def _form(value, experts: Node, h: Node) -> tuple[str, list[str]]:
    if value is None or isinstance(value, int | float):
        return (repr(value if value is None else float(value)), [])
    if value is h:
        return "h", []
    name = value.target if isinstance(value.target, str) else _OPERATIONS.get(value.target)
    args, kwargs = list(value.args), dict(value.kwargs)
    if name == "getattr" and args[0] is experts:
        return "@", [args[1]]
    if name == "getitem":
        return _form_of_half(args[0], args[1], h), []
    if value.op == "call_method" and args[0] is experts and name == "act_fn":
        return _join("act_fn", args[1:], kwargs, experts, h)
    # The kernel computes in float32 and rounds once, so where a gate widens and narrows is not part of its form.
    if name == "float" and len(args) == 1 and not kwargs:
        return _form(args[0], experts, h)
    if name == "to" and len(args) == 2 and not kwargs and _is_dtype_of_tensor(args[1], experts):
        return _form(args[0], experts, h)
    if name == "clamp":
        low, high = (args[1:] + [None, None])[:2]
        args, kwargs = [args[0], kwargs.pop("min", low), kwargs.pop("max", high)], kwargs
    if name == "silu" and kwargs == {"inplace": False}:
        kwargs = {}
    if name not in _ARGUMENTS or len(args) != _ARGUMENTS[name]:
        raise ValueError(f"gate must consist of known operations, got {value.format_node()}")
    return _join(name, args, kwargs, experts, h)


def _join(name: str, args: list, kwargs: dict, experts: Node, h: Node) -> tuple[str, list[str]]:
    if kwargs:
        raise ValueError(f"{name} must have no further options, got {kwargs}")
    parts = [_form(arg, experts, h) for arg in args]
    if name in ("mul", "add"):
        parts.sort(key=operator.itemgetter(0))
    return f"{name}({', '.join(text for text, _ in parts)})", [name for _, names in parts for name in names]


def _form_of_half(of: Node, index, h: Node) -> str:
    """The gate or the up half of h, with the layout in which it was cut out."""
    if of is h and index == (..., slice(None, None, 2)):
        return "even_gate"
    if of is h and index == (..., slice(1, None, 2)):
        return "odd_up"
    cut = (of.target, of.args[1:], of.kwargs)
    if of.args[:1] == (h,) and cut in [("chunk", (2,), {"dim": -1}), ("chunk", (2, -1), {})] and index in (0, 1):
        return ("gate", "up")[index]
    raise ValueError(f"gate must cut h into known halves, got {of.format_node()}[{index}]")


def _is_dtype_of_tensor(value, experts: Node) -> bool:
    return (
        isinstance(value, Node)
        and value.target is getattr
        and value.args[0] is not experts
        and value.args[1] == "dtype"
    )


_ARGUMENTS = {"clamp": 3, "mul": 2, "add": 2, "neg": 1, "sigmoid": 1, "silu": 1, "getattr": 2}
_OPERATIONS = {
    getattr: "getattr",
    operator.getitem: "getitem",
    operator.mul: "mul",
    operator.add: "add",
    operator.neg: "neg",
    torch.mul: "mul",
    torch.add: "add",
    torch.neg: "neg",
    torch.clamp: "clamp",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.silu: "silu",
}
