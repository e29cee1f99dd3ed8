"""Swapped blocks: what is not as its class makes it runs its own forward; compile, autocast, checkpointing."""

import pytest
import torch
import torch._dynamo.testing
from compare import run_model
from families import tiny_inputs
from outside import inputs_of, operators_of, outside_model
from torch import nn

from moert.integrations.transformers import swap_, unswap_
from moert.integrations.transformers.swap import blocks
from moert.testing import row_error

# Family: a part of its first block, and where its activation is.
PARTS = {
    "dbrx": ("mlp", None),
    "jetmoe": ("input_linear", "activation"),
    "llama4": ("experts", "experts.act_fn"),
    "longcat_flash": ("identity_expert", "act_fn"),
    "vitpose_backbone": ("1", None),
}
FUSED = {family: act for family, (_, act) in PARTS.items() if act}


def fused_block(model, family: str) -> nn.Module:
    name = {"jetmoe": "JetMoeMoE", "vitpose_backbone": "VitPoseNaiveMoe"}.get(family, "")
    return next(block for _, block in blocks(model) if name in type(block).__name__)


def same_as_eager(model, exact: bool = False) -> bool:
    """Every result and gradient within rounding (or bit for bit) of those of the blocks' own forwards."""
    torch.manual_seed(3)
    mine, _ = run_model(model, "moert", tiny_inputs(model))
    torch.manual_seed(3)
    eager, _ = run_model(model, "eager", tiny_inputs(model))
    if exact:
        return mine.keys() == eager.keys() and all(torch.equal(mine[name], eager[name]) for name in eager)
    size = max(x.abs().max() for name, x in eager.items() if name.startswith("d"))
    return mine.keys() == eager.keys() and all(
        torch.allclose(mine[name], eager[name], rtol=1e-3, atol=1e-4 * size) for name in eager
    )


@pytest.mark.parametrize("family", PARTS)
def test_a_hook_inside_a_block_is_called(family):
    model, calls = outside_model(family), []
    part = fused_block(model, family).get_submodule(PARTS[family][0])
    part.register_forward_hook(lambda m, args, out: calls.append(1) or out * 3)
    assert same_as_eager(model)
    assert calls, "a hook that is not called proves nothing"


@pytest.mark.parametrize("family", FUSED)
def test_an_unknown_activation_is_not_guessed(family):
    model = outside_model(family)
    parent, _, name = FUSED[family].rpartition(".")
    for block in {type(block): block for _, block in blocks(model)}.values():
        if hasattr(block, FUSED[family].split(".")[0]):
            setattr(block.get_submodule(parent), name, nn.Softplus())
    assert same_as_eager(model)
    swap_(model)
    before = operators_of(lambda: swap_(outside_model(family))(**tiny_inputs(model)))
    assert operators_of(lambda: model(**tiny_inputs(model)))["fused_experts"] == before["fused_experts"] - 1


def test_dbrx_jitter_is_the_routers():
    model = outside_model("dbrx").train()
    quiet, _ = run_model(model, "moert", tiny_inputs(model))
    for module in model.modules():
        if hasattr(module, "moe_jitter_eps"):
            module.moe_jitter_eps = 0.5
    noisy, _ = run_model(model, "moert", tiny_inputs(model))
    assert not torch.allclose(noisy["logits"], quiet["logits"], atol=1e-2), "the jitter must matter"
    assert same_as_eager(model)


def test_llama4_scores_that_round_to_one_or_zero():
    """In bfloat16 the scores of the chosen tie at 1 where logits are large, and may be 0 like those of the others."""
    model = outside_model("llama4").bfloat16()
    block = blocks(model)[0][1]
    with torch.no_grad():
        block.router.weight.mul_(500)
    x = torch.randn(2, 60, 32).bfloat16()
    want = block(x)[0]
    scores = block.router(x.flatten(0, 1))[0]
    assert (scores == 1).sum() > 4 and ((scores != 0).sum(1) < block.top_k).any(), "scores must round"
    swap_(model)
    assert row_error(block(x)[0].float(), want.float()) < 0.05


def test_longcat_identity_experts_and_sentinels():
    """Ids from num_routed_experts to total_experts give x; what is beyond is dropped."""
    block = blocks(swap_(outside_model("longcat_flash")))[0][1]
    E, total = block.num_routed_experts, block.total_experts
    x, weights = torch.randn(3, 32), torch.rand(3, 2)
    same = block(x, torch.tensor([[E, total - 1]] * 3), weights)
    assert torch.allclose(same, x * weights.sum(1, keepdim=True), atol=1e-6)
    ids = torch.tensor([[0, E], [1, 2], [E, E]])
    assert row_error(block(x, ids, weights), type(block).unswapped.forward(block, x, ids, weights)) < 1e-5


def test_jetmoe_linear_layers_of_experts_without_rows():
    block = next(b for _, b in blocks(outside_model("jetmoe")) if type(b).__name__ == "JetMoeParallelExperts")
    x, sizes = torch.randn(5, block.input_size), [0, 2, 0, 3, 0, 0]
    want = block(x, sizes)
    model = swap_(nn.ModuleList([block]))
    assert row_error(model[0](x, sizes), want) < 1e-5


@pytest.mark.parametrize("family", ["dbrx", "llama4", "longcat_flash", "step3p7"])
def test_compile(family):
    """fullgraph, and one graph for every number of tokens."""
    torch._dynamo.reset()
    block = blocks(swap_(outside_model(family)))[0][1]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for tokens in (5, 8, 13):
        x = torch.randn(2, tokens, 32) if family in ("dbrx", "llama4") else torch.randn(2 * tokens, 32)
        ids, weights = torch.rand(2 * tokens, 5).topk(2).indices, torch.rand(2 * tokens, 2)
        args = (x,) if family == "llama4" else (x, ids, weights)
        got, want = (call(*args) for call in (compiled, block))
        got, want = (y[0] if isinstance(y, tuple) else y for y in (got, want))
        assert row_error(got.flatten(0, -2), want.flatten(0, -2)) < 1e-5
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1], "a new number of tokens must not compile again"


@pytest.mark.parametrize("family", ["jetmoe", "llama4", "longcat_flash", "nllb_moe", "switch_transformers"])
def test_autocast(family):
    """Under autocast moert is at most twice as far from float32 as eager under autocast (where DBRX's own fails)."""
    model = outside_model(family)
    exact = model(**inputs_of(model)).logits
    off, dtypes = [], []
    for _, block in blocks(model):
        block.register_forward_hook(lambda m, args, y: dtypes.append((y[0] if isinstance(y, tuple) else y).dtype))
    for choose in (swap_, unswap_):
        with torch.autocast("cpu", torch.bfloat16):
            logits = choose(model)(**inputs_of(model)).logits
        off.append((logits.float() - exact).norm().item())
    assert off[0] <= 2 * off[1]
    assert family == "jetmoe" or dtypes[: len(dtypes) // 2] == dtypes[len(dtypes) // 2 :]


@pytest.mark.parametrize("family", ["dbrx", "llama4", "longcat_flash", "nllb_moe", "switch_transformers"])
def test_activation_checkpointing(family):
    """JetMoE does not support it."""
    no_dropout = {"moe_token_dropout": 0.0} if family == "nllb_moe" else {}
    model = swap_(outside_model(family, **no_dropout)).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        model(**inputs_of(model), use_cache=False).logits.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())
