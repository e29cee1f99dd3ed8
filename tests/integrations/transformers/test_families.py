"""Every model family behind transformers' experts interface, eager against moert: module, model, bfloat16, generate."""

import re
from pathlib import Path

import compare
import pytest
import torch
import transformers
from compare import compare_experts, compare_generate, compare_model
from families import MARK, families, tiny_model

from moert.integrations.transformers import experts, gates
from moert.types import Activation

DOCS = Path(__file__).parents[3] / "docs" / "transformers.md"
TABLE: dict[str, list[str]] = {}


@pytest.mark.parametrize("family", families(), ids=lambda family: family.id)
def test_family(family):
    model = tiny_model(family)
    module = next(m for m in model.modules() if isinstance(m, family.experts))
    wrong = {
        "module, float32": compare_experts(module, torch.float32),
        "module, bfloat16": compare_experts(module, torch.bfloat16),
        "model, float32": compare_model(model, torch.float32),
        "model, bfloat16": compare_model(model, torch.bfloat16),
    }
    generates = model.can_generate()
    if generates:
        wrong["generate"] = compare_generate(model)
    told = {True: "as eager", False: "WRONG"}
    float32 = not (wrong["module, float32"] or wrong["model, float32"])
    bfloat16 = not (wrong["module, bfloat16"] or wrong["model, bfloat16"])
    same = told[not wrong["generate"]] if generates else "has none"
    TABLE[family.id] = [family.name, type(model).__name__, path(module), told[float32], told[bfloat16], same]
    assert not any(wrong.values()), {name: text for name, text in wrong.items() if text}


def path(module) -> str:
    """How the experts run, in words."""
    fused = gates.fused_activation(module)
    if fused is None or module.has_post_expert_norm:
        return "own gate" if fused is None else "own norm"
    flags = {"interleaved": fused[1], "transposed": module.is_transposed, "bias": module.has_bias}
    return ", ".join([fused[0].name, *(flag for flag, holds in flags.items() if holds)])


def test_every_use_of_the_interface_is_found():
    marked = 0
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        marked += len(re.findall(rf"^{MARK}", file.read_text(), flags=re.M))
    assert len(families()) == marked


def wrong_families(monkeypatch, fused_activation) -> set[str]:
    monkeypatch.setattr(experts, "fused_activation", fused_activation)
    wrong = set()
    for family in families():
        module = next(m for m in tiny_model(family).modules() if isinstance(m, family.experts))
        if compare_experts(module, torch.float32):
            wrong.add(family.id)
    return wrong


def test_a_gate_taken_for_plain_swiglu_fails(monkeypatch):
    wrong = wrong_families(monkeypatch, lambda self: (Activation("swiglu" if self.has_gate else "silu"), False))
    clamped = {"DeepseekV4", "Glm5NextText", "GptOss", "HYV4", "HYV4VL", "MiniMaxM3VL", "OpenAIPrivacyFilter"}
    others = {"DiffusionGemmaText", "Gemma4Text", "Inkling2", "Inkling2Loop", "NemotronH"}
    assert wrong == (clamped | others) & {family.id for family in families()}


def test_a_slightly_wrong_activation_fails_everywhere(monkeypatch):
    wrong = wrong_families(monkeypatch, lambda self: (Activation("reglu" if self.has_gate else "relu"), False))
    # A norm after the experts keeps muse_spark on its own gate whatever is planted.
    assert wrong == {family.id for family in families()} - {"MuseSpark"}


@pytest.mark.parametrize("name", ["dmodel.layers.0.mlp.gate.wg.weight", "dmodel.layers.0.mlp.experts.down_proj"])
def test_a_slightly_wrong_gradient_fails(name, monkeypatch):
    """HunYuan's gate has a gradient that is zero but for rounding: of it medians decide, which hide nothing."""
    run = compare.run_model

    def off(model, implementation, inputs, backward=True):
        results, ids = run(model, implementation, inputs, backward)
        if implementation == "moert":
            results[name] = results[name] + 1e-7 * max(
                x.abs().max() for key, x in results.items() if key.startswith("d")
            )
        return results, ids

    monkeypatch.setattr(compare, "run_model", off)
    (family,) = (family for family in families() if family.id == "HunYuanMoEV1")
    assert name in compare_model(tiny_model(family), torch.float32)


def test_table(capsys):
    """The table that docs/transformers.md shows is the one of this run (the documented versions of transformers)."""
    assert TABLE.keys() == {family.id for family in families()}, "test_family must run before, whole"
    head = ["family", "model", "experts run as", "forward, backward", "bfloat16", "generate"]
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *sorted(TABLE.values())]]
    with capsys.disabled():
        print("\n" + "\n".join(lines))  # the table of issue and documents: family x what was compared
    missing = set(lines) - set(DOCS.read_text().splitlines())
    assert not missing, "docs/transformers.md must have the lines\n" + "\n".join(sorted(missing))
