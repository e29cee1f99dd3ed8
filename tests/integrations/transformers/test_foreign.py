"""The quantizer of foreign checkpoints: what it asks of the loader, and what it refuses of it."""

import copy

import pytest
import torch
from foreign import gptq
from foreign_checkpoint import CONFIGS, SOURCES, write
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from moert.integrations.transformers import load_quantized
from moert.integrations.transformers.foreign import (
    ForeignConfig,
    ForeignQuantizer,
    ReadWeight,
    _makes_a_list,
    _matrices,
)


def quantizer(source="gptq"):
    return ForeignQuantizer(ForeignConfig(SOURCES[source][0], "int8", 128, "auto"), pre_quantized=True)


def test_names_that_the_loader_collects():
    assert quantizer().serialized_names == {"weight": ["weight", "qweight", "qzeros", "scales", "g_idx"]}
    assert quantizer("fp8").serialized_names == {"weight": ["weight", "weight_scale_inv"]}
    assert quantizer("mxfp4").serialized_names["down_proj"] == ["down_proj_blocks", "down_proj_scales"]


def test_a_list_of_experts_ends_with_its_reading():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"]())
    sources = ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"]
    operations = [MergeModulelist(0), Concatenate(1)]
    (mine, *_) = quantizer().update_weight_conversions(
        [WeightConverter(sources, "mlp.experts.gate_up_proj", operations)], model
    )
    turned = WeightConverter("a.weight", "b.weight", [Transpose(0, 1)])
    other, general = quantizer("fp8").update_weight_conversions([turned], model)
    assert [type(operation) for operation in mine.operations] == [ReadWeight] and mine.operations[0].last
    assert mine.source_patterns[:2] == [sources[0], sources[0].replace("weight", "qweight")]
    assert len(other.operations) == 2 and not other.operations[0].last
    assert general.operations[0].last and general.target_patterns == ["weight"]


def test_which_operations_make_a_list():
    assert _makes_a_list([MergeModulelist(0), Concatenate(1)]) and _makes_a_list([MergeModulelist(0)])
    for operations in (
        [],
        [Concatenate(1)],
        [MergeModulelist(0), Concatenate(2)],
        [MergeModulelist(0), Transpose(1, 2)],
    ):
        assert not _makes_a_list(operations)


def test_matrices_are_in_the_order_of_the_patterns():
    a, b, c, d = torch.arange(4.0).split(1)
    collected = {"x.*.up.scales": [d], "x.*.gate.scales": [b], "x.*.up.qweight": [c], "x.*.gate.qweight": [a]}
    patterns = ["x.*.gate.weight", "x.*.gate.qweight", "x.*.gate.scales", "x.*.up.qweight", "x.*.up.scales"]
    found = _matrices(collected, patterns, "")
    assert found == {"x.*.gate.": [{"qweight": a, "scales": b}], "x.*.up.": [{"qweight": c, "scales": d}]}
    with pytest.raises(ValueError, match=r"x.\*.up.\* must have all parts of every matrix, got 1 qweight, 2 scales"):
        _matrices(collected | {"x.*.up.scales": [d, d]}, patterns, "")


def test_operations_of_a_model_see_unpacked_weights():
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"]())
    name = "model.layers.0.self_attn.q_proj.weight"
    parts, expected = gptq(torch.randn(64, 64), 32)
    collected = {f"q_proj.{part}": [tensor] for part, tensor in parts.items()}
    read = copy.deepcopy(ReadWeight(owner := quantizer()))
    assert read.hf_quantizer is owner
    read.last = False
    out = read.convert(collected, list(collected), full_layer_name=name, model=model, missing_keys=set())
    assert list(out) == ["q_proj.weight"] and torch.equal(out["q_proj.weight"][0], expected)


def test_experts_that_the_class_rearranges_are_refused():
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"]())
    name = "model.layers.0.mlp.experts.down_proj"
    collected = {f"e.*.{part}": [tensor] for part, tensor in gptq(torch.randn(64, 32), 32)[0].items()}
    read, missing = ReadWeight(quantizer()), {name}
    read.last = False
    assert read.convert(collected, list(collected), full_layer_name=name, model=model, missing_keys=missing) == {}
    assert not missing and read.hf_quantizer.errors == [
        f"{name}: experts must be lists of matrices, got some that the model's class rearranges"
    ]
    collected = {"a.weight": [torch.ones(2, 2)], "b.qweight": [torch.ones(2, 2)]}
    read.convert(collected, list(collected), full_layer_name=name, model=model, missing_keys=missing)
    assert read.hf_quantizer.errors[1].endswith("experts must all be quantized in a layer or all float, got 1 float")


def test_a_model_without_quantized_experts_is_refused(tmp_path):
    foreign, _ = write(tmp_path, "qwen3", "gptq", plain=["experts"])
    with pytest.raises(ValueError, match="checkpoint must hold quantized experts, got none in Qwen3MoeForCausalLM"):
        load_quantized(foreign)
    foreign, _ = write(tmp_path, "qwen3", "gptq", plain=["down_proj"])
    with pytest.raises(
        ValueError, match="must hold both weights of model.layers.0.mlp.experts quantized, got down_proj"
    ):
        load_quantized(foreign)
