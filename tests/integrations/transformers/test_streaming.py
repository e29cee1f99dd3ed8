"""Packed layers made from a checkpoint's tensors: the names and the bits of save_pretrained after quantize_."""

import subprocess
import sys

import pytest
import torch
from families import families, tiny_inputs, tiny_model
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from moert import quantize_
from moert.cli.conversion import Conversion
from moert.integrations.transformers import MoertConfig
from moert.integrations.transformers.quantizer import MoertQuantizer
from moert.integrations.transformers.streaming import check_shapes, layers


def skeleton(model):
    with torch.device("meta"):
        return type(model)(model.config)


def skeleton_of_packed(model):
    empty = skeleton(model)
    MoertQuantizer(MoertConfig("int4", 32), pre_quantized=True).preprocess_model(empty)
    return empty


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", families(), ids=lambda family: family.id)
def test_every_family_bit_for_bit(family, tmp_path):
    model = tiny_model(family).to(torch.bfloat16)
    tensors = saved(model, tmp_path / "float")
    loaded = type(model).from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
    quantize_(loaded, "int4", 32)
    expected = saved(loaded, tmp_path / "packed")
    check_shapes(skeleton(model), {name: tensor.shape for name, tensor in tensors.items()})
    check_shapes(skeleton_of_packed(model), {name: tensor.shape for name, tensor in expected.items()})
    made, used = {}, set()
    for layer in layers(skeleton(model), MoertConfig("int4", 32), tensors):
        packed = layer.pack(torch.bfloat16, tensors.__getitem__)
        described = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.empty().items()}
        assert described == {name: (tensor.shape, tensor.dtype) for name, tensor in packed.items()}
        made, used = made | packed, used | set(layer.sources)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in used} | made
    assert tensors.keys() == expected.keys()
    assert not [name for name, tensor in tensors.items() if not torch.equal(tensor, expected[name])]


RELOAD = """
import sys, torch, transformers, moert.integrations.transformers
folder, name = sys.argv[1:]
model = getattr(transformers, name).from_pretrained(folder + "/out").eval()
for tensor in [*model.parameters(), *model.buffers()]:  # a file maps tensors to addresses of any alignment
    tensor.data = tensor.data.clone()
torch.manual_seed(0)  # DiffusionGemma begins with random tokens
with torch.no_grad():
    torch.save(model(**torch.load(folder + "/inputs")).logits, folder + "/logits")
"""


@pytest.mark.parametrize("kind", ["DiffusionGemmaText", "Ernie4_5_VLMoeMoe"])
def test_two_modules_of_common_tensors_elsewhere(kind, tmp_path):
    """DiffusionGemma's encoder has the weights of its decoder; Ernie's text and picture experts are one list."""
    model = tiny_model(next(family for family in families() if family.id == kind)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    work, told = Conversion(tmp_path / "in", tmp_path / "out", MoertConfig("int4", 32)), []
    work.run(lambda title, nbytes: told.append(nbytes))
    assert sum(told) == work.work
    torch.save(tiny_inputs(model), tmp_path / "inputs")
    command = [sys.executable, "-c", RELOAD, tmp_path, type(model).__name__]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    loaded = type(model).from_pretrained(tmp_path / "in", dtype=torch.bfloat16).eval()
    assert len(quantize_(loaded, "int4", 32)) == 4
    for tensor in [*loaded.parameters(), *loaded.buffers()]:
        tensor.data = tensor.data.clone()
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), loaded(**tiny_inputs(model)).logits)


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


def test_whole_weights_of_another_shape(tmp_path):
    model = tiny_model(next(family for family in families() if family.id == "GptOss"))
    tensors = saved(model, tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    (layer, _) = layers(skeleton(model), MoertConfig("int8"), tensors)
    with pytest.raises(ValueError, match=rf"{name} must have shape \[6, 24, 32\] by the config, got \[6, 32, 24\]"):
        layer.pack(torch.float32, (tensors | {name: tensors[name].mT}).__getitem__)


def test_shapes(tmp_path):
    model, tensors = mixtral(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(skeleton(model), shapes)
    w2 = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    wider = shapes | {w2.format(i): (32, 48) for i in range(4)}
    with pytest.raises(ValueError, match=r"down_proj must have shape \[4, 32, 24\] by the config, got \[4, 32, 48\]"):
        check_shapes(skeleton(model), wider)
    without = {name: shape for name, shape in shapes.items() if "norm" in name}
    with pytest.raises(ValueError, match="checkpoint must hold every weight, got none for lm_head.weight and"):
        check_shapes(skeleton(model), without)
    del shapes[w2.format(3)]
    with pytest.raises(ValueError, match=r"down_proj must have shape \[4, .* by the config, got \[3, "):
        check_shapes(skeleton(model), shapes)
