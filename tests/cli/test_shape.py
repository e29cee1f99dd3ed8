import io
import json

import pytest
import torch
from rich.console import Console

from moert.cli import shape
from moert.cli.checkpoint import load_model
from moert.cli.errors import CommandError
from moert.cli.provider import Load

TINY = {"hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 48, "num_experts": 4,
        "num_experts_per_tok": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(shape.SHAPES, "tiny", ("Qwen3MoeConfig", TINY))
    monkeypatch.setattr(shape, "PREFILL_TOKENS", 32)
    return "tiny"


def test_every_provider_is_timed_by_layer(tiny, tmp_path):
    console = Console(file=io.StringIO(), width=140)
    report = shape.time_shape(tiny, 2, Load(tmp_path, "float32", 1, packings=("int4",)), 3, tmp_path, console)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert set(report["providers"]) == {"eager", "grouped_mm", "moert", "moert int4"}
    weights = {name: row["weight_bytes"] for name, row in report["providers"].items()}
    assert weights["moert int4"] < weights["moert"] == weights["eager"]
    for row in report["providers"].values():
        assert row["prefill_tokens"] == 32 and row["decode_tokens"] == 3
        assert 2 * row["milliseconds_per_layer"]["decode"] == pytest.approx(row["milliseconds_per_token"]["p50"])
    assert "Milliseconds a layer: eager prefill" in console.file.getvalue().replace("\n", " ")


@pytest.mark.parametrize("name", shape.SHAPES)
def test_shapes_are_models_of_transformers(name, tmp_path):
    """As a model without memory: the layers that the table promises, experts included."""
    shape.save_shape(name, 3, tmp_path)
    with torch.device("meta"):
        model = load_model(tmp_path, "moert", "bfloat16", random=True)
    experts = [m for m in model.modules() if hasattr(m, "is_concatenated")]
    sizes = shape.SHAPES[name][1]
    count = sizes.get("num_experts", sizes.get("num_local_experts"))
    assert [len(m.down_proj) for m in experts] == [count] * 3
    assert {m.down_proj.dtype for m in experts} == {torch.bfloat16}


def test_random_weights_are_the_same_every_time(tiny, tmp_path):
    shape.save_shape(tiny, 1, tmp_path)
    first, second = (load_model(tmp_path, experts, "float32", random=True) for experts in ("eager", "moert"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(p.isfinite().all() for p in first.parameters())


def test_unknown_shape(tmp_path):
    with pytest.raises(CommandError, match="shape must be one of qwen3-30b-a3b, .*, got nope"):
        shape.save_shape("nope", 2, tmp_path)
