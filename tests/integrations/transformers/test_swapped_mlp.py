"""Switch Transformers and NLLB-MoE swapped: capacities, jitter, dropout, adapters, experts that nobody chose."""

import copy

import peft
import pytest
import torch
import torch._dynamo.testing
from compare import run_model
from families import tiny_inputs
from outside import inputs_of, operators_of, outside_model
from test_swapped import same_as_eager
from torch import nn

from moert.integrations.transformers import swap_, unswap_
from moert.integrations.transformers.swap import blocks
from moert.testing import row_error

FAMILIES = ["switch_transformers", "nllb_moe"]


def test_capacity_drops_what_eager_drops():
    """With room for one token per expert and sequence most tokens get nothing, the same ones as in eager."""
    model = outside_model("switch_transformers", expert_capacity=1)
    block, seen = blocks(model)[0][1], []
    block.register_forward_hook(lambda m, args, y: seen.append((args[1], y)))
    assert same_as_eager(model)
    swap_(model)
    run_model(model, "moert", tiny_inputs(model))
    selected, y = seen[-1]
    dropped = selected.sum((1, 2)) == 0
    assert dropped.sum() >= 2 and (y[dropped] == 0).all() and (y[~dropped] != 0).any(1).all()


def test_nllb_computes_two_choices_of_a_token_at_most():
    """Eager runs expert 0 for all experts that a token did not choose; with weight 0 they are sentinels here."""
    model = swap_(outside_model("nllb_moe"))
    seen = []
    blocks(model)[0][1].register_forward_pre_hook(lambda m, args: seen.append(args[2]))
    assert same_as_eager(model)
    assert ((seen[0] != 0).sum(1) <= 2).all() and (seen[0] != 0).any()


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_nllb_capacities(fraction):
    model = outside_model("nllb_moe", moe_eval_capacity_token_fraction=fraction, expert_capacity=2)
    assert same_as_eager(model)


def test_switch_jitter_and_dropout_draw_what_eager_draws():
    model = outside_model("switch_transformers", dropout_rate=0.3, router_jitter_noise=0.2).train()
    inputs = tiny_inputs(model)
    results, states = [], []
    for implementation in ("moert", "eager"):
        results.append(run_model(model, implementation, inputs)[0])
        states.append(torch.get_rng_state())
    mine, eager = results
    assert torch.equal(*states)
    assert mine.keys() == eager.keys()
    assert all(torch.allclose(mine[name], eager[name], rtol=1e-3, atol=1e-4) for name in eager)
    quiet = run_model(model.eval(), "moert", inputs)[0]
    assert not torch.allclose(quiet["logits"], mine["logits"], atol=1e-2), "dropout must matter"
    assert "grouped_gemm" in operators_of(lambda: swap_(model.train())(**inputs_of(model)))


@pytest.mark.parametrize("dropout", [{"activation_dropout": 0.3}, {"moe_token_dropout": 0.3}], ids=str)
def test_nllb_with_dropout_runs_its_own_forward_in_training(dropout):
    model = outside_model("nllb_moe", **({"moe_token_dropout": 0.0} | dropout))
    assert same_as_eager(model)
    assert same_as_eager(model.train(), exact=True)
    assert not operators_of(lambda: swap_(model)(**inputs_of(model)))
    assert operators_of(lambda: model.eval()(**inputs_of(model))).keys() == {"fused_experts"}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_nobody_chose_get_no_gradient(family):
    """None, not zero: an optimizer with weight decay or momentum treats the two differently."""
    model = outside_model(family)
    without = []
    for choose in (swap_, unswap_):
        choose(model).zero_grad(set_to_none=True)
        model(input_ids=torch.tensor([[5, 5]]), labels=torch.tensor([[5, 5]])).loss.backward()
        without.append({name for name, p in model.named_parameters() if p.grad is None})
    assert without[0] == without[1] and any("expert" in name for name in without[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_training_steps_equal_eagers(family):
    """AdamW with clipping; gradients are set to zero in place between the steps."""
    models = [copy.deepcopy(outside_model(family)) for _ in range(2)]
    swap_(models[0])
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        inputs = tiny_inputs(model)
        for _ in range(3):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    for (name, mine), eager in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        # Adam's first steps have the size of the rate wherever a gradient is more than rounding.
        assert (mine - eager).norm() <= 1e-2 * eager.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_the_linear_layers(family):
    """PEFT puts a layer of its own in the place of each: the block runs its own forward."""
    model = swap_(outside_model(family))
    names = list(type(blocks(model)[0][1]).linears)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    inputs = inputs_of(model.base_model.model)
    got = model(**inputs).logits
    unswap_(model)
    assert torch.equal(got, model(**inputs).logits)
    with model.disable_adapter():
        assert not torch.allclose(got, model(**inputs).logits, atol=1e-2)
    merged = swap_(model.merge_and_unload())
    assert operators_of(lambda: merged(**inputs))
    assert row_error(merged(**inputs).logits.flatten(0, 1), got.flatten(0, 1)) < 1e-4


@pytest.mark.parametrize("activation", ["gelu_new", "silu", "relu2"])
def test_other_activations_are_fused(activation):
    model = outside_model("switch_transformers", dense_act_fn=activation)
    assert same_as_eager(model)
    assert operators_of(lambda: swap_(model)(**inputs_of(model))).keys() == {"fused_experts"}


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_that_differ_or_are_unknown_are_not_guessed(family):
    for acts in ([nn.Softplus()], [nn.ReLU(), nn.Softplus()], [nn.ReLU(), nn.SiLU()]):
        model = outside_model(family)
        for _, block in blocks(model):
            for e in range(6):
                block[f"expert_{e}"].act = acts[e % len(acts)]
        assert same_as_eager(model, exact=len(acts) == 1)


def test_compile():
    """fullgraph; the weights are copied then, and experts that nobody chose get zeros."""
    torch._dynamo.reset()
    block = blocks(swap_(outside_model("switch_transformers")))[0][1]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for tokens in (5, 8, 13):
        x, weights = torch.randn(tokens, 32, requires_grad=True), torch.rand(tokens, 1)
        selected = nn.functional.one_hot(torch.randint(6, (tokens, 1)), 6)
        selected[0] = 0
        grads = []
        for call in (compiled, block):
            block.zero_grad()
            y = call(x, selected, weights)
            y.square().sum().backward()
            grads.append([y.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in block.parameters())])
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1], "a new number of tokens must not compile again"
