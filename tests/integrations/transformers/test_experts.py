"""One class of each kind of gate and layout: sentinels, compile, autocast, checkpointing, registration."""

import copy

import pytest
import torch
import torch._dynamo.testing
from compare import routing, run_experts
from families import families, tiny_inputs, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

import moert
from moert.integrations.transformers import experts, gates
from moert.testing import row_error

# Plain, transposed, interleaved and biased, clamped, tanh GELU, ungated, unknown gate, norm after the experts.
KINDS = ["Qwen3Moe", "Aria", "GptOss", "OpenAIPrivacyFilter", "DeepseekV4", "MiniMaxM3VL", "Gemma4Text", "NemotronH"]
KINDS += ["Inkling2", "MuseSpark"]


@pytest.fixture(params=KINDS)
def family(request):
    return next(family for family in families() if family.id == request.param)


@pytest.fixture
def module(family):
    return next(m for m in tiny_model(family).modules() if isinstance(m, family.experts))


def inputs_of(module: nn.Module, tokens: int = 9, dtype=torch.float32):
    w1 = module.gate_up_proj if module.has_gate else module.up_proj
    x = torch.randn(tokens, w1.shape[1 if module.is_transposed else 2]).to(dtype)
    return x, *routing(module, tokens, 2, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
def test_ids_outside_are_dropped(module, dtype):
    """Equal to leaving the choice out, in output and every gradient; no flag of expert parallelism is needed."""
    x, ids, weights = inputs_of(module)
    E = module.down_proj.shape[0]
    dropped = ids.clone()
    dropped[0], dropped[1, 0], dropped[2, 1] = E, -1, 100
    gone = (dropped < 0) | (dropped >= E)
    mine = run_experts(module, experts.experts_forward, x, dropped.to(dtype), weights.masked_fill(gone, 0.5))
    want = run_experts(module, experts.experts_forward, x, ids, weights.masked_fill(gone, 0.0))
    assert (mine["dweights"][gone] == 0).all()
    want["dweights"][gone] = 0
    for name in mine:
        assert row_error(mine[name].reshape(len(mine[name]), -1), want[name].reshape(len(want[name]), -1)) < 1e-5, name


def widen(module: nn.Module, H: int, I: int) -> None:
    """Weights of other sizes: whole panels of every instruction set."""
    w1, rows = ("gate_up_proj", 2 * I) if module.has_gate else ("up_proj", I)
    E = module.down_proj.shape[0]
    for name, n, k in ((w1, rows, H), ("down_proj", H, I)):
        shape = (E, k, n) if module.is_transposed else (E, n, k)
        setattr(module, name, nn.Parameter(torch.randn(shape) / k**0.5))
        if module.has_bias:
            setattr(module, f"{name}_bias", nn.Parameter(torch.randn(E, n)))


def test_prepacked(module):
    """Laid out for the kernels where the gate is known; saved as it was."""
    module.requires_grad_(False)
    if experts.prepackable(module) is None:
        with pytest.raises(ValueError, match="module must hold experts that fused_experts runs"):
            moert.prepack_(module)
        return
    widen(module.requires_grad_(False), 96, 64)
    before, (x, ids, weights) = copy.deepcopy(module), inputs_of(module)
    with torch.no_grad():
        assert moert.prepack_(module) == [""]
        out, want = (experts.experts_forward(m, x, ids, weights) for m in (module, before))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.state_dict().items())


@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_routing_weights_of_another_dtype(module, dtype, weights_dtype):
    """A router may compute in a type of its own; the result has the dtype of the hidden states."""
    module = copy.deepcopy(module).to(dtype)
    x, ids, weights = inputs_of(module, dtype=dtype)
    weights = weights.half().to(weights_dtype)
    y = experts.experts_forward(module, x, ids, weights)
    assert y.dtype == dtype
    assert row_error(y, experts.experts_forward(module, x, ids, weights.float().to(dtype))) < 4 * torch.finfo(dtype).eps


def test_no_tokens(module):
    x, ids, weights = inputs_of(module, tokens=0)
    results = run_experts(module, experts.experts_forward, x, ids, weights)
    assert results["y"].shape == x.shape
    assert all((grad == 0).all() for grad in results.values())


def test_compile(module):
    """fullgraph, and one graph for every number of tokens."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(experts.experts_forward, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for tokens in (5, 8, 13):
        args = inputs_of(module, tokens)
        mine, want = run_experts(module, compiled, *args), run_experts(module, experts.experts_forward, *args)
        assert all(error(mine[name], want[name]) < 1e-5 for name in mine)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1], "a new number of tokens must not compile again"


def test_autocast(module):
    """Under autocast moert is at most twice as far from float32 as eager under autocast."""
    args = inputs_of(module, 12)
    eager = type(module).forward.__wrapped__
    exact = run_experts(module, eager, *args)

    def under_autocast(forward):
        def run(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return forward(*args)

        return run

    mine = run_experts(module, under_autocast(experts.experts_forward), *args)
    same = run_experts(module, under_autocast(eager), *args)
    assert all(mine[name].dtype == torch.float32 for name in exact)
    # Where eager's class adds a bias outside autocast's operators, its gradient is exact; so the worst result counts.
    mine_off, same_off = (max(error(x[name], exact[name]) for name in exact) for x in (mine, same))
    assert mine_off <= 2 * same_off


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return row_error(x.reshape(1, -1), exact.reshape(1, -1))


def test_activation_checkpointing(family):
    model = tiny_model(family)
    if not model.supports_gradient_checkpointing:
        pytest.fail(f"{family.id} must support gradient checkpointing to stand for its kind")
    model.train()
    model.set_experts_implementation("moert")
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**tiny_inputs(model), use_cache=False)[0].square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_from_pretrained(tmp_path):
    family = next(family for family in families() if family.id == "Qwen3Moe")
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moert")
    assert loaded.config._experts_implementation == "moert"

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += func is torch.ops.moert.fused_experts.default
            return func(*args, **(kwargs or {}))

    with Count() as count:
        logits = loaded(**tiny_inputs(model)).logits
    assert count.calls == 2
    model.set_experts_implementation("eager")
    assert row_error(logits, model(**tiny_inputs(model)).logits) < 1e-5


def test_float8_experts_are_refused():
    assert "moert" in ExpertsInterface._global_mapping and "moert" in FP8ExpertsInterface._global_mapping
    with pytest.raises(RuntimeError, match='experts_implementation must be .* float8 experts, got "moert"'):
        FP8ExpertsInterface._global_mapping["moert"](nn.Module(), torch.zeros(1, 1), None, None)


def test_a_gate_of_the_instance_and_hooks_are_respected(module):
    x, ids, weights = inputs_of(module)
    module = copy.deepcopy(module)
    if module.has_gate:
        module._apply_gate = lambda h: type(module)._apply_gate(module, h) * 3
    else:
        module.act_fn.register_forward_hook(lambda m, args, out: out * 3)
    assert gates.fused_activation(module) is None
    want = ExpertsInterface._global_mapping["grouped_mm"](module, x, ids, weights)
    assert row_error(experts.experts_forward(module, x, ids, weights), want) < 1e-5
