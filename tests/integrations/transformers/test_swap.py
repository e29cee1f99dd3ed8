"""swap_ over every family whose MoE blocks lie outside the experts interface, eager against moert, and its contract."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from compare import compare_generate, compare_model, run_model
from families import families, tiny_inputs, tiny_model
from outside import MODELS, inputs_of, operators_of, outside_model
from torch import nn

from moert.integrations.transformers import swap_, unswap_
from moert.integrations.transformers.swap import SWAPS, blocks
from moert.testing import row_error

DOCS = Path(__file__).parents[3] / "docs" / "transformers.md"
# No one operator does it all: gate and up weights that lie apart, a clamp behind the activation, a single GEMM.
IN_STEPS = {"dbrx", "step3p7", "vitpose_backbone"}


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


def test_family(family):
    model = outside_model(family)
    wrong = {"float32": compare_model(model, torch.float32), "bfloat16": compare_model(model, torch.bfloat16)}
    generates = hasattr(model, "can_generate") and model.can_generate()
    if generates:
        wrong["generate"] = compare_generate(model)
    assert not any(wrong.values()), {name: text for name, text in wrong.items() if text}
    name, _, how = MODELS[family]
    row = [family, name, how, "as eager", "as eager", "as eager" if generates else "has none"]
    assert f"| {' | '.join(row)} |" in DOCS.read_text().splitlines(), "docs/transformers.md must have the row"


def test_every_block_runs_on_moert(family):
    """Each block runs its operators, once."""
    model = swap_(outside_model(family))
    ran = operators_of(lambda: model(**inputs_of(model)))
    layers = len(blocks(model))
    if family == "jetmoe":  # a fused block holds two swapped linear layers that it does not call
        assert ran == {"fused_experts": 2, "grouped_gemm": 4}
    elif family in IN_STEPS:
        assert set(ran) == {"grouped_gemm", "permute_plan", "unpermute"} and ran["unpermute"] == layers
    else:
        assert ran == {"fused_experts": layers}


def test_families_outside_the_interface_are_all_served_or_named():
    """Every modeling file with experts of its own is in SWAPS, but for what the documents leave alone."""
    root, found = Path(transformers.__file__).parent / "models", set()
    for path in root.glob("*/modeling_*.py"):
        text = path.read_text()
        if re.search(r"^class \w*(Experts|MoE|Moe)\(", text, re.M) and "@use_experts_implementation" not in text:
            found.add(path.parent.name)
    assert found == set(MODELS) | {"doge"}
    assert {name.split(".")[2] for name in SWAPS} == set(MODELS)
    assert "doge" in DOCS.read_text()


def test_a_checkpoint_saved_after_swap_is_an_ordinary_one(family, tmp_path):
    model = outside_model(family)
    inputs = inputs_of(model)
    want, before = model(**inputs)[0], {name: x.clone() for name, x in model.state_dict().items()}
    after = swap_(model).state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], x) for name, x in before.items())
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path).eval()
    assert not any(type(module).__module__.startswith("moert") for module in stock.modules())
    got = stock(**inputs)[0]
    got, want = (torch.stack(x) if isinstance(x, tuple) else x for x in (got, want))
    assert row_error(got.flatten(0, -2), want.flatten(0, -2)) < 1e-5
    # And the other way round: a swapped model loads an ordinary state_dict.
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not any(model.load_state_dict(before))
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())


def test_a_second_call_and_the_way_back(family):
    model = outside_model(family)
    classes = {name: type(module) for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    assert swap_(model) is model
    once = {name: type(module) for name, module in model.named_modules()}
    assert classes != once
    swap_(model)
    assert once == {name: type(module) for name, module in model.named_modules()}
    assert unswap_(model) is model
    assert classes == {name: type(module) for name, module in model.named_modules()}
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_copies_stay_swapped(family):
    model = swap_(outside_model(family))
    copied = copy.deepcopy(model)
    assert [type(module) for _, module in blocks(copied)] == [type(module) for _, module in blocks(model)]
    mine, again = (run_model(m, "moert", tiny_inputs(m))[0] for m in (model, copied))
    assert all(torch.equal(mine[name], again[name]) for name in mine)


def test_frozen_parameters_get_no_gradient(family):
    model = swap_(outside_model(family))
    frozen = [name for i, name in enumerate(dict(model.named_parameters())) if i % 2]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    results, _ = run_model(model, "moert", tiny_inputs(model))
    half = {name for name in results if name.startswith("d")}
    for name in frozen:
        model.get_parameter(name).requires_grad_()
    whole, _ = run_model(model, "moert", tiny_inputs(model))
    assert half and not half & {f"d{name}" for name in frozen}
    assert all(torch.allclose(results[name], whole[name], rtol=1e-4, atol=1e-6) for name in half)


def test_hooks_of_a_block_are_called(family):
    model, seen = outside_model(family), []
    name, block = blocks(model)[0]
    block.register_forward_hook(lambda *_: seen.append(name))
    swap_(model)
    model(**inputs_of(model))
    assert seen


def test_nothing_to_swap():
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got str"):
        swap_("model")
    with pytest.raises(
        ValueError, match=r"model must have a block of DbrxExperts, .*, got Sequential with modules of $"
    ):
        swap_(nn.Sequential(nn.Linear(2, 2)))
    inside = tiny_model(next(family for family in families() if family.id == "Qwen3Moe"))
    text = r'got Qwen3MoeForCausalLM with .*Qwen3MoeExperts.* \(model.set_experts_implementation\("moert"\) serves it\)'
    with pytest.raises(ValueError, match=text):
        swap_(inside)


def test_a_subclass_is_not_taken_for_its_base():
    model = outside_model("dbrx")
    for _, block in blocks(model):
        block.__class__ = type("Changed", (type(block),), {"forward": lambda self, x, *_: x * 0})
    with pytest.raises(ValueError, match="got DbrxForCausalLM with modules of Changed, "):
        swap_(model)


def test_a_forward_of_the_instance_is_refused():
    model = outside_model("llama4")
    name, block = blocks(model)[-1]
    block.forward = block.forward
    with pytest.raises(ValueError, match=rf"{re.escape(name)} must run the forward of its class, got one of its own"):
        swap_(model)
    assert not any(type(module).__module__.startswith("moert") for module in model.modules()), "nothing was changed"
    del block.forward
    swap_(model)
    block.forward = block.forward
    swap_(model)  # hooks that came later hold the forward that it has now
