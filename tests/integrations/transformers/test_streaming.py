"""Packed layers made from a checkpoint's tensors: the names and the bits of save_pretrained after quantize_."""

import pytest
import torch
from families import families, tiny_model
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from moert import quantize_
from moert.integrations.transformers import MoertConfig
from moert.integrations.transformers.streaming import layers

# Two modules made of tensors that no mapping gives to them alone: refused, see test_what_is_refused.
SHARED = ("DiffusionGemmaText", "Ernie4_5_VLMoeMoe")
STREAMED = [family for family in families() if family.id not in SHARED]


def skeleton(model):
    with torch.device("meta"):
        return type(model)(model.config)


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", STREAMED, ids=[family.id for family in STREAMED])
def test_every_family_bit_for_bit(family, tmp_path):
    model = tiny_model(family).to(torch.bfloat16)
    tensors = saved(model, tmp_path / "float")
    loaded = type(model).from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
    quantize_(loaded, "int4", 32)
    expected = saved(loaded, tmp_path / "packed")
    for layer in layers(skeleton(model), MoertConfig("int4", 32), tensors):
        packed = layer.pack(torch.bfloat16, tensors.__getitem__)
        described = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.empty().items()}
        assert described == {name: (tensor.shape, tensor.dtype) for name, tensor in packed.items()}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in layer.sources} | packed
    assert tensors.keys() == expected.keys()
    assert not [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])]


def mixtral(tmp_path, dtype=torch.float32):
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, **sizes, **heads)).to(dtype)
    return model, saved(model, tmp_path)


def test_experts_are_read_one_at_a_time(tmp_path):
    model, tensors = mixtral(tmp_path)
    (layer,) = layers(skeleton(model), MoertConfig("int8", skip=["model.layers.0"]), tensors)
    read = []
    layer.pack(torch.float32, lambda name: read.append(name) or tensors[name])
    experts = [name.split("experts.")[1].removesuffix(".weight") for name in read]
    assert experts == [f"{i}.{w}" for i in range(4) for w in ("w1", "w3")] + [f"{i}.w2" for i in range(4)]
    assert sorted(read) == sorted(layer.sources)


def test_rounded_to_the_dtype_of_the_model_first(tmp_path):
    model, tensors = mixtral(tmp_path)
    options = MoertConfig("int8")
    in_bfloat16 = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    rounded = layers(skeleton(model), options, tensors)[0].pack(torch.bfloat16, tensors.__getitem__)
    expected = layers(skeleton(model), options, tensors)[0].pack(torch.bfloat16, in_bfloat16.__getitem__)
    full = layers(skeleton(model), options, tensors)[0].pack(torch.float32, tensors.__getitem__)
    assert all(torch.equal(rounded[name], expected[name]) for name in rounded)
    assert not all(torch.equal(rounded[name], full[name]) for name in rounded)


def test_what_is_refused(tmp_path):
    model, tensors = mixtral(tmp_path)
    options = MoertConfig("int8")

    def pack(tensors):
        return [layer.pack(torch.float32, tensors.__getitem__) for layer in layers(skeleton(model), options, tensors)]

    last = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    without = {name: tensor for name, tensor in tensors.items() if name != last}
    with pytest.raises(ValueError, match=r"1.mlp.experts.down_proj must have 4 tensors like .*w2.weight, got 3"):
        pack(without)
    without = {name: tensor for name, tensor in tensors.items() if "1.block_sparse_moe.experts" not in name}
    with pytest.raises(ValueError, match=r"checkpoint must hold tensors for model.layers.1.mlp.experts.gate_up_proj"):
        pack(without)
    with pytest.raises(ValueError, match=r"expert 3 of .*down_proj must have shape \[32, 24\] by the config, got"):
        pack(tensors | {last: torch.zeros(32, 32)})
    with pytest.raises(ValueError, match=f"{last} must be float32, bfloat16 or float16, got torch.float8_e4m3fn"):
        pack(tensors | {last: tensors[last].to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match="experts of transformers' interface that skip does not name, got 2 of them"):
        layers(skeleton(model), MoertConfig("int8", skip=["model"]), tensors)
    for name in SHARED:
        odd = tiny_model(next(family for family in families() if family.id == name))
        with pytest.raises(ValueError, match=r"checkpoint must hold tensors for .*experts.gate_up_proj, got none"):
            layers(skeleton(odd), options, saved(odd, tmp_path / name))


def test_whole_weights_of_another_shape(tmp_path):
    model = tiny_model(next(family for family in families() if family.id == "GptOss"))
    tensors = saved(model, tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    (layer, _) = layers(skeleton(model), MoertConfig("int8"), tensors)
    with pytest.raises(ValueError, match=rf"{name} must have shape \[6, 24, 32\] by the config, got \[6, 32, 24\]"):
        layer.pack(torch.float32, (tensors | {name: tensors[name].mT}).__getitem__)
