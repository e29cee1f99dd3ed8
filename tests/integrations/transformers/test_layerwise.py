"""A checkpoint calibrated layer by layer: the bits of quantize_ with the same batches on the loaded model."""

import copy

import pytest
import torch
from families import families, tiny_inputs, tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import Gemma4TextConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM
from transformers.models.mixtral import modeling_mixtral

from moert import quantize_
from moert.integrations.transformers import MoertConfig
from moert.integrations.transformers.layerwise import Layerwise, Weights
from moert.integrations.transformers.streaming import layers
from moert.quant import GPTQ

SETTINGS = GPTQ(min_rows=1)
STREAMED = [family for family in families() if family.id != "DiffusionGemmaText"]  # see test_what_is_refused
SIZES = {"hidden_size": 32, "intermediate_size": 24, "vocab_size": 64, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
GEMMA = {"num_experts": 6, "top_k_experts": 2, "enable_moe_block": True, "moe_intermediate_size": 24}
GEMMA |= {"global_head_dim": 8, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}


def aligned_(model):
    """torch's own operators may add in another order at other addresses."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def batches_of(model):
    return [tiny_inputs(model, seed) | {"use_cache": False} for seed in (1, 2, 3)]


def prepared(model, folder, options, batches, dtype=torch.float32):
    """The checkpoint of the model, about to be calibrated layer by layer; its layers and tensors."""
    model.save_pretrained(folder)
    tensors, config = load_file(folder / "model.safetensors"), model.config
    with torch.device("meta"):
        plan = type(model)(copy.deepcopy(config))
        run = type(model)._from_config(copy.deepcopy(config), dtype=dtype)
    packed = layers(plan, options, tensors)
    read = lambda name: tensors[name].clone()  # noqa: E731
    return Layerwise(run, list(tensors), read, dtype, packed, batches, SETTINGS), packed, tensors


def expected_of(model, folder, options, batches, dtype=torch.float32):
    loaded = aligned_(type(model).from_pretrained(folder, dtype=dtype).eval())
    packing = {"skip": options.skip, "calibration": batches, "method": SETTINGS}
    quantize_(loaded, options.format, options.group, **packing)
    loaded.save_pretrained(folder / "packed")
    return load_file(folder / "packed" / "model.safetensors")


def pack_all(work, packed):
    made = {}
    for layer in packed:
        counts = []
        tensors, report = work.pack(layer, counts.append)
        assert report.name == layer.name and sum(counts) == len(report.rows) == layer.num_experts
        made |= tensors
    return made


def assert_same(made, expected):
    assert made and not [name for name, tensor in made.items() if not torch.equal(tensor, expected[name])]


@pytest.mark.parametrize("family", STREAMED, ids=[family.id for family in STREAMED])
def test_every_family_bit_for_bit(family, tmp_path):
    model = tiny_model(family).to(torch.bfloat16)
    options, batches = MoertConfig("int4", 32), batches_of(model)
    work, packed, _ = prepared(model, tmp_path, options, batches, torch.bfloat16)
    assert_same(pack_all(work, packed), expected_of(model, tmp_path, options, batches, torch.bfloat16))


def four_layers(kind):
    """Deep enough that a layer has several before it; Gemma's last two read keys of the first two."""
    torch.manual_seed(0)
    if kind == "gemma4":
        types = ["sliding_attention", "full_attention"] * 2
        config = Gemma4TextConfig(**SIZES, **GEMMA, num_kv_shared_layers=2, layer_types=types)
        model = Gemma4ForCausalLM(config)
    else:
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    for p in model.parameters():
        p.data.normal_(std=p.shape[-1] ** -0.5)
    return model.eval()


@pytest.mark.parametrize("format", ["sub1", "ternary2"])
@pytest.mark.parametrize("kind", ["mixtral", "gemma4"])
def test_four_layers_of_which_one_stays_float(kind, format, tmp_path):
    model = four_layers(kind)
    options, batches = MoertConfig(format, skip=["model.layers.1"]), batches_of(model)
    work, packed, _ = prepared(model, tmp_path, options, batches)
    made = pack_all(work, packed)
    assert len(packed) == 3
    assert_same(made, expected_of(model, tmp_path, options, batches))


def test_layers_that_were_packed_before(tmp_path):
    model = four_layers("mixtral")
    options, batches = MoertConfig("sub1"), batches_of(model)
    work, packed, _ = prepared(model, tmp_path, options, batches)
    made = pack_all(work, packed)
    again, packed, _ = prepared(model, tmp_path, options, batches)
    for layer in packed[:2]:
        again.take(layer, lambda: made)
    assert_same(pack_all(again, packed[2:]), made)
    idle, packed, _ = prepared(model, tmp_path, options, batches)
    idle.take(packed[0], lambda: pytest.fail("nothing comes after it"))


def test_one_layer_is_in_memory(tmp_path):
    model = four_layers("mixtral")
    work, packed, _ = prepared(model, tmp_path, MoertConfig("int8"), batches_of(model))
    for i, layer in enumerate(packed):
        work.pack(layer, lambda count: None)
        there = {name for name, tensor in work.model.state_dict().items() if not tensor.is_meta}
        outside = {"model.embed_tokens.weight", "model.norm.weight"}
        assert there - outside == {name for name in work.model.state_dict() if f".layers.{i}." in name}
        assert outside < there


def test_weights_are_those_of_from_pretrained(tmp_path):
    model = tiny_model(next(family for family in families() if family.id == "DeepseekV3")).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16)
    Weights(empty, list(tensors), tensors.__getitem__, torch.bfloat16).load_(dict(empty.named_modules()))
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for mine, theirs in zip(
        [*empty.named_parameters(), *empty.named_buffers()],
        [*loaded.named_parameters(), *loaded.named_buffers()],
        strict=True,
    ):
        assert mine[0] == theirs[0] and mine[1].dtype == theirs[1].dtype and torch.equal(mine[1], theirs[1])


def test_what_is_refused(tmp_path, monkeypatch):
    odd = tiny_model(next(family for family in families() if family.id == "DiffusionGemmaText"))
    message = "experts must be in one list of layers to be calibrated as they stream, got model.decoder.layers, model.e"
    with pytest.raises(ValueError, match=message):
        prepared(odd, tmp_path / "odd", MoertConfig("int8"), batches_of(odd))
    model = four_layers("mixtral")
    batches = batches_of(model)

    def first(change):
        work, packed, tensors = prepared(model, tmp_path / "in", MoertConfig("int8"), batches)
        change(work, tensors)
        work.pack(packed[0], lambda count: None)

    def shorter(work, tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][1:]

    with pytest.raises(ValueError, match=r"model.norm.weight must have shape \[32\] by the config, got \[31\]"):
        first(shorter)
    with pytest.raises(ValueError, match="checkpoint must hold tensors for model.layers.0.mlp.gate.weight, got none"):
        first(lambda work, tensors: [work.weights._made_by.pop("model.layers.0.mlp.gate.weight")])

    def again(work, tensors):
        work.model.model.layers.append(work.model.model.layers[3])

    with pytest.raises(ValueError, match="call each layer once, in order, .* got MixtralForCausalLM"):
        first(again)

    def with_skips(work, tensors):
        """A model that hands a layer the sum of what all before it returned."""
        stack, plain = work.model.model.layers, nn.Module.__call__
        total = {}

        def call(layer, hidden_states, *args, **kwargs):
            total["x"] = hidden_states if layer is stack[0] else total["x"] + hidden_states
            return plain(layer, total["x"], *args, **kwargs)

        monkeypatch.setattr(modeling_mixtral.MixtralDecoderLayer, "__call__", call)

    with pytest.raises(ValueError, match="layers must depend on the one before .* got MixtralForCausalLM"):
        first(with_skips)
