"""GGUF files of whole models, written by the gguf package, against the float model of the dequantised weights."""

import warnings

import numpy as np
import pytest
import torch
from gguf_writer import NAMES, formats, logits, written
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from moert.integrations.transformers import InexactWarning, load_gguf
from moert.quant import Int4, Int8, Mxfp4, Ternary2
from moert.testing import row_error


@pytest.mark.parametrize(
    "arch,kinds,expected",
    [
        ("qwen3moe", ("Q8_0", "Q8_0", "Q8_0", "Q8_0"), (Int8(32), Int8(32))),
        ("qwen3moe", ("Q4_0", "Q4_0", "MXFP4", "Q5_0"), (Int4(32), Mxfp4())),
        ("llama", ("Q4_0", "Q4_0", "Q4_0", "Q8_0"), (Int4(32), Int4(32))),
        ("olmoe", ("Q8_0", "Q8_0", "Q8_0", "Q4_0"), (Int8(32), Int8(32))),
        ("gpt-oss", ("MXFP4", "MXFP4", "MXFP4", "Q8_0"), (Mxfp4(), Mxfp4())),
        ("gpt-oss", ("Q8_0", "Q8_0", "Q4_0", "BF16"), (Int8(32), Int4(32))),
        ("wide", ("TQ1_0", "TQ1_0", "TQ2_0", "Q4_K"), (Ternary2(128), Ternary2(128))),
        ("wide", ("TQ2_0", "TQ1_0", "Q8_0", "Q6_K"), (Ternary2(128), Int8(32))),
    ],
)
def test_exact(arch, kinds, expected, tmp_path):
    reference = written(tmp_path / "m.gguf", arch, kinds)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactWarning)
        model = load_gguf(tmp_path / "m.gguf", precision="full")
    assert formats(model) == [expected] * 2
    assert row_error(logits(model), logits(reference)) < 5e-6
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert formats(again) == [expected] * 2 and row_error(logits(again), logits(model)) < 1e-6
    assert hasattr(again.config.quantization_config, "experts") == (expected[0] != expected[1])


@pytest.mark.parametrize(
    "kinds,why,expected",
    [
        (
            ("Q5_0", "Q5_0", "Q8_0", "Q8_0"),
            "2 converted to .*: no format has the numbers of Q5_0",
            (Int8(128), Int8(32)),
        ),
        (
            ("Q8_0", "Q4_0", "Q4_0", "F32"),
            "2 converted to .*: gate and up are of different types",
            (Int8(128), Int4(32)),
        ),
    ],
)
def test_converted_and_said(kinds, why, expected, tmp_path):
    reference = written(tmp_path / "m.gguf", "qwen3moe", kinds)
    with pytest.warns(InexactWarning, match=why):
        model = load_gguf(tmp_path / "m.gguf", precision="full", dtype=torch.float32)
    assert formats(model) == [expected] * 2
    assert 0 < row_error(logits(model), logits(reference)) < 0.05


@pytest.mark.parametrize(
    "kinds", [("Q4_K", "Q4_K", "Q6_K", "Q4_K"), ("Q5_K", "Q5_K", "Q5_K", "Q5_K"), ("Q6_K", "Q4_K", "TQ2_0", "Q6_K")]
)
def test_k_quants_are_converted_and_said(kinds, tmp_path):
    reference = written(tmp_path / "m.gguf", "wide", kinds)
    with pytest.warns(InexactWarning, match=f"converted to .*: no format has the numbers of {kinds[0]}"):
        model = load_gguf(tmp_path / "m.gguf", precision="full")
    assert formats(model) == [(Int8(128), Ternary2(128) if kinds[2] == "TQ2_0" else Int8(128))] * 2
    assert 0 < row_error(logits(model), logits(reference)) < 0.05


def test_errors(tmp_path):
    path, kinds = tmp_path / "m.gguf", ("Q8_0",) * 4
    for change, skip, message in [
        (
            {"expert_count": 0},
            (),
            "must be one of .*, gpt-oss, deepseek2 with experts, got qwen3moe of 0 experts",
        ),
        ({"block_count": 0}, (), "qwen3moe.block_count must be a positive integer, got 0"),
        ({"expert_count": 5}, (), r"mlp.gate.weight must have shape \[5, 64\] by the config, got \[4, 64\]"),
        ({}, ("token_embd.weight",), "must hold token_embd.weight, got none"),
        ({}, ("blk.1.ffn_up_exps.weight",), "must hold .*gate_up_proj once, whole or in its halves, got 1"),
        ({}, ("blk.1.attn_q.weight",), "checkpoint must hold every weight, got no model.layers.1.self_attn.q_proj"),
    ]:
        written(path, "qwen3moe", kinds, skip, **change)
        with pytest.raises(ValueError, match=message):
            load_gguf(path)


def test_a_tensor_that_the_model_has_not(tmp_path, monkeypatch):
    """Norms of the heads' queries belong to Qwen3-MoE, not to Mixtral."""
    monkeypatch.setitem(NAMES, "input_layernorm", "attn_q_norm")
    written(tmp_path / "m.gguf", "llama", ("Q8_0",) * 4)
    with pytest.raises(ValueError, match="must hold tensors of MixtralForCausalLM alone, got .*q_norm"):
        load_gguf(tmp_path / "m.gguf")


def test_biases_of_gpt_oss(tmp_path):
    path, kinds = tmp_path / "m.gguf", ("MXFP4",) * 3 + ("Q8_0",)
    for name in ("ffn_up_exps", "ffn_gate_exps", "ffn_down_exps", "attn_k"):
        written(path, "gpt-oss", kinds, (f"blk.1.{name}.bias",))
        with pytest.raises(ValueError, match="got no model.layers.1|must hold .* once, whole or in its halves"):
            load_gguf(path)


def test_rotary_factors(tmp_path):
    """llama.cpp divides the frequencies by them, whatever the metadata say of scaling."""
    path, kinds = tmp_path / "m.gguf", ("Q8_0",) * 4
    reference = written(path, "llama", kinds, extra={"rope_freqs.weight": np.ones(8, np.float32)})
    assert row_error(logits(load_gguf(path, precision="full")), logits(reference)) < 5e-6
    written(path, "llama", kinds, extra={"rope_freqs.weight": np.array([1] * 7 + [8], np.float32)})
    with pytest.raises(ValueError, match="rope_freqs.weight must be 1 everywhere, .*, got 8.0"):
        load_gguf(path)


def test_sizes_are_checked_before_the_loader_sees_them(tmp_path, monkeypatch):
    """It allocates what does not fit, or is missing, at the size that the metadata say."""
    monkeypatch.setattr(Qwen3MoeForCausalLM, "from_pretrained", lambda *args, **options: pytest.fail("allocates"))
    for change, skip in [
        ({"expert_feed_forward_length": 2**20}, ()),
        ({"embedding_length": 2**20}, ()),
        ({}, ("blk.1.attn_q.weight",)),
    ]:
        written(tmp_path / "m.gguf", "qwen3moe", ("Q8_0",) * 4, skip, **change)
        with pytest.raises(ValueError, match="by the config, got|must hold every weight, got no"):
            load_gguf(tmp_path / "m.gguf")
