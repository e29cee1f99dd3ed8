"""Quantized checkpoints: packed in place, while loading, saved, loaded in another process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from families import families, tiny_inputs, tiny_model
from foreign_checkpoint import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st
from outside import MODELS, outside_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moert import quantize_
from moert.integrations.transformers import MoertConfig
from moert.integrations.transformers.quantized import PackedExperts

FORMATS = ["int8", "int4", "int4_asymmetric", "mxfp4", "ternary2", "ternary5"]
FORMATS += ["fp8", "bit_nested", "bit_nested_5_4", "sub1"]
# Plain, interleaved with biases and transposed, an unknown gate, without gate, with shared experts.
KINDS = ["Qwen3Moe", "GptOss", "Inkling2", "NemotronH", "DeepseekV3"]


def model_of(kind):
    return tiny_model(next(family for family in families() if family.id == kind))


def aligned_(model):
    """A file maps its tensors to any address, and some of torch's own operators add in another order there."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def logits(model):
    torch.manual_seed(0)  # DiffusionGemma begins with random tokens
    with torch.no_grad():
        return model(**tiny_inputs(model)).logits


RELOAD = """
import sys, torch
import moert.integrations.transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def reloaded_elsewhere(folder, ids, tmp_path):
    torch.save(ids, tmp_path / "ids.pt")
    command = [sys.executable, "-c", RELOAD, folder, tmp_path / "ids.pt", tmp_path / "logits.pt"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return torch.load(tmp_path / "logits.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_reloaded_bit_for_bit(kind, tmp_path):
    model_of(kind).save_pretrained(tmp_path / "float")  # a reloaded model may lay its weights otherwise
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32).eval()
    names = quantize_(model, "int4", group=64, skip=["*.layers.0"])
    assert names and all(".layers.1." in name for name in names)
    expected = logits(model)
    model.save_pretrained(tmp_path / "packed")
    again = aligned_(AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval())
    assert torch.equal(logits(again), expected)
    assert again.config.quantization_config.to_dict()["skip"] == ["*.layers.0"]
    assert sum(isinstance(module, PackedExperts) for module in again.modules()) == len(names)
    config = MoertConfig("int4", group=64, skip=["*.layers.0"])
    options = {"quantization_config": config, "dtype": torch.float32}
    loading = AutoModelForCausalLM.from_pretrained(tmp_path / "float", **options).eval()
    assert torch.equal(logits(aligned_(loading)), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_packed_while_it_loads_and_saved(format, tmp_path):
    model_of("Qwen3Moe").save_pretrained(tmp_path / "float")
    options = {"quantization_config": MoertConfig(format), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", **options).eval()
    expected = logits(aligned_(model))
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(logits(aligned_(again)), expected)


def test_tied_experts_are_packed_in_each_of_their_modules(tmp_path):
    """DiffusionGemma's encoder has the weights of its decoder."""
    model = model_of("DiffusionGemmaText")
    model.save_pretrained(tmp_path / "float")
    model = type(model).from_pretrained(tmp_path / "float", dtype=torch.float32).eval()
    assert len(quantize_(model, "int4")) == 4
    expected = logits(aligned_(model))
    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(logits(aligned_(again)), expected)
    options = {"quantization_config": MoertConfig("int4"), "dtype": torch.float32}
    loading = type(model).from_pretrained(tmp_path / "float", **options).eval()
    assert torch.equal(logits(aligned_(loading)), expected)
    encoder, decoder = "model.encoder.language_model.layers.0.experts", "model.decoder.layers.0.experts"
    message = f"skip must name all experts of common weights or none, got {decoder} without {encoder}"
    with pytest.raises(ValueError, match=message):
        quantize_(model_of("DiffusionGemmaText"), "int4", skip=["model.decoder"])


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_in_a_new_process(format, tmp_path):
    model_of("Qwen3Moe").save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16).eval()
    plain = logits(model).float()
    quantize_(model, format)
    model.save_pretrained(tmp_path / "packed")
    mine = reloaded_elsewhere(tmp_path / "packed", tiny_inputs(model)["input_ids"], tmp_path)
    assert torch.equal(mine, logits(model))
    error = (mine.float() - plain).norm() / plain.norm()
    assert error < {"int8": 0.05, "ternary2": 0.9, "ternary5": 0.9, "sub1": 1.5}.get(format, 0.4)


def test_generates_and_compiles():
    model = model_of("Qwen3Moe")
    quantize_(model, "int8")
    ids = tiny_inputs(model)["input_ids"]
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert tokens.shape == (2, 12) and torch.equal(tokens, model.generate(ids, max_new_tokens=5, do_sample=False))
    experts = next(module for module in model.modules() if isinstance(module, PackedExperts))
    x, chosen, weights = torch.randn(5, 32), torch.randint(0, 6, (5, 2)), torch.rand(5, 2)
    compiled = torch.compile(experts, fullgraph=True, dynamic=True)
    for T in (5, 3, 1):
        args = x[:T], chosen[:T], weights[:T]
        torch.testing.assert_close(compiled(*args), experts(*args), rtol=0, atol=0)


def test_memory_falls():
    model = model_of("Qwen3Moe")
    before = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    quantize_(model, "int4")
    after = sum(b.nbytes for name, b in model.named_buffers() if ".experts." in name)
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    assert after < before / 5  # rows of 24 and 32 columns: blocks and scales weigh more than in real sizes


MEASURED = """
import sys, torch
from moert import quantize_
from moert.cli.machine import peak_bytes, reset_peak, resident_bytes
from transformers import AutoModelForCausalLM
for name in ("first", "model"):  # libraries keep what they multiply in
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}", dtype=torch.bfloat16)
    reset_peak()
    before = resident_bytes()
    quantize_(model, "int4")
print(peak_bytes() - before, resident_bytes() - before)
"""


def measured(script, H, E, layers, tmp_path):
    """What the script prints of a model of these sizes: peak and rest in bytes."""
    sizes = {"hidden_size": H, "moe_intermediate_size": H, "num_experts_per_tok": 2, "vocab_size": 64, "head_dim": 8}
    for name, num_experts, num_layers in (("first", 2, 1), ("model", E, layers)):
        config = Qwen3MoeConfig(num_experts=num_experts, num_hidden_layers=num_layers, **sizes)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | settings)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


def test_memory_of_one_packed_layer_beside_the_model(tmp_path):
    """The float model is there when quantize_ begins; each layer's experts go as their packed ones come."""
    H, E, layers = 512, 16, 6
    layer, packed = 3 * E * H * H * 2, 3 * E * H * H * 4.5 / 8
    peak, left = measured(MEASURED, H, E, layers, tmp_path)
    assert peak < packed + 0.25 * layer  # an expert in float32, twice: 0.25
    assert left < 0.9 * layers * (packed - layer)


LOADED = """
import sys, torch
from moert.cli.machine import peak_bytes, reset_peak, resident_bytes
from moert.integrations.transformers import MoertConfig
from transformers import AutoModelForCausalLM
def own():  # the file's pages count as resident while it is mapped
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])
for name in ("first", "model"):
    reset_peak()
    before, config = own(), MoertConfig("int4")
    model = AutoModelForCausalLM.from_pretrained(
        f"{sys.argv[1]}/{name}", dtype=torch.bfloat16, quantization_config=config
    )
print(peak_bytes() - resident_bytes(), own() - before)
"""


def test_memory_of_one_layer_while_it_is_packed_as_it_loads(tmp_path):
    """The loader collects a layer's experts, which are packed and go; measured 1.31 layers above what is left."""
    H, E, layers = 512, 16, 6
    layer, packed = 3 * E * H * H * 2, 3 * E * H * H * 4.5 / 8
    above, left = measured(LOADED, H, E, layers, tmp_path)
    assert above < 1.4 * layer
    assert left < layers * 1.1 * packed + 0.5 * layer


def test_what_is_refused(tmp_path):
    model = model_of("Qwen3Moe")
    with pytest.raises(ValueError, match="format must be one of int8, .*, got int3"):
        quantize_(model, "int3")
    with pytest.raises(ValueError, match="that skip does not name, got 2 of them in Qwen3MoeForCausalLM"):
        quantize_(model, "int4", skip=["model"])
    with pytest.raises(ValueError, match="group must be one of 32, 64, 128 for int4, got 7"):
        MoertConfig("int4", group=7)
    with pytest.raises(TypeError, match="skip must be a sequence of names, got 'model'"):
        quantize_(model, "int4", skip="model")
    with pytest.raises(
        ValueError,
        match="precision must be one of auto, full, .*, fp8_group128, int8_weights, int8_group160, got int9",
    ):
        MoertConfig("int4", precision="int9")
    with pytest.raises(ValueError, match="precision must be one of auto, full, bfloat16 for sub1, got int8"):
        MoertConfig("sub1", precision="int8")
    mixed = {"a": [["int8", None, None], ["fp8", None, None]]}
    with pytest.raises(ValueError, match="precision must be one of auto, full, .* for fp8, got int8"):
        MoertConfig("int8", precision="int8", experts=mixed)
    with pytest.raises(
        ValueError, match="group must be None for fp8, whose scales belong to blocks of 128 x 128, got 32"
    ):
        MoertConfig("fp8", group=32)
    with pytest.raises(ValueError, match="levels must be 1 to 4 over a base of 5, got 5"):
        MoertConfig("bit_nested_5_5")
    with pytest.raises(
        ValueError, match="calibration must be None for Fp8.*, which is rounded to nearest, got batches"
    ):
        quantize_(model, "fp8", calibration=[tiny_inputs(model)])
    for experts, message in [
        ([1], "experts must have two formats with their sizes for experts"),
        ({"a": [["int8", None, None]]}, "experts must have two formats with their sizes for a"),
        ({"a": [["int8", None, 3], ["int8", None, None]]}, "for a: got 3 codewords of int8"),
        ({"a": [["sub1", None, None], ["int8", None, None]]}, "for a: got None codewords of sub1"),
        ({"a": [["int3", None, None], ["int8", None, None]]}, "for a: format must be one of .*, got int3"),
    ]:
        with pytest.raises(ValueError, match=message):
            MoertConfig("int8", experts=experts)
    with pytest.raises(TypeError, match="grup"):
        MoertConfig("int4", grup=64)
    quantize_(model, "int4")
    with pytest.raises(
        ValueError, match="model must have float experts, got packed ones in model.layers.0.mlp.experts"
    ):
        quantize_(model, "int4")


@pytest.mark.parametrize("family", MODELS)
def test_families_outside_the_interface_are_refused(family):
    with pytest.raises(ValueError, match="model must hold experts of moert or transformers .*, got none in"):
        quantize_(outside_model(family), "int4")
    assert len(MODELS) == 8  # as docs/quantized.md lists them


@pytest.mark.parametrize("fault", ["missing", "shape", "format", "values"])
def test_broken_checkpoints(fault, tmp_path):
    model = model_of("Qwen3Moe")
    quantize_(model, "int4")
    model.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.experts.w2_scales"
    tensors = load_file(file)
    if fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name][..., :0]
    elif fault == "values":
        tensors[name] = torch.full_like(tensors[name], 0x7C00)  # infinity
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["format"] = "mxfp4"
        (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="experts.w[12]_scales|mismatch|scales must be finite"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("format", ["ternary2", "ternary5"])
def test_bytes_that_are_no_codes(format, tmp_path):
    model = model_of("Qwen3Moe")
    quantize_(model, format)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.w1_codes"][1, 2, 0] = 60  # no four codes, and no five
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="codes must be those of Ternary.*, got byte 60"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def packed_checkpoint(folder, format):
    """Rows of 64 and of 128 columns: several groups."""
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3-128"]()).float()
    quantize_(model, format)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("format", "group", "message"),
    [
        ("int4", 64, "mismatch|must have shape"),
        ("int4", None, ""),  # its own default: no lie
        ("int4", 7, "group must be one of 32, 64, 128 for int4, got 7"),
        ("int4", "32", "group must be one of 32, 64, 128 for int4, got '32'"),
        ("int4", 32.0, "group must be one of 32, 64, 128 for int4, got 32.0"),
        ("bit_nested", 32.0, "group must be one of 32, 64, 128 for bit_nested, got 32.0"),
        ("int4", [32], "group must be one of 32, 64, 128 for int4, got"),
        ("int8", 32, "mismatch|must have shape"),
        ("mxfp4", 64, "group must be one of 32 for mxfp4, got 64"),
        ("ternary2", 32, "mismatch|must have shape"),
        ("fp8", 128, "group must be None for fp8"),
        ("bit_nested", 128, "mismatch|must have shape"),
        ("sub1", 32, "group must be None for sub1"),
    ],
)
def test_a_config_that_lies_about_the_group(format, group, message, tmp_path):
    config = json.loads((packed_checkpoint(tmp_path, format) / "config.json").read_text())
    config["quantization_config"]["group"] = group
    if "experts" in config["quantization_config"]:
        for weights in config["quantization_config"]["experts"].values():
            weights[1][1] = group
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not message:
        assert logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()).isfinite().all()
        return
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_flipped_bits(format, tmp_path):
    """Anywhere in the file, or in the experts: an error, or a model that runs, with finite weights where scales are
    float16 (those of fp8, mxfp4 and sub1 reach float32's end)."""
    file = packed_checkpoint(tmp_path, format) / "model.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    spans = [each["data_offsets"] for name, each in header.items() if ".experts.w" in name]

    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(st.booleans(), st.data())
    def flip(in_experts, data):
        begin, end = data.draw(st.sampled_from(spans)) if in_experts else (-start, len(whole) - start)
        octets = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            octets[start + data.draw(st.integers(begin, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.unlink()  # what was loaded before may still be mapped
        file.write_bytes(octets)
        try:
            model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        except (ValueError, TypeError, RuntimeError, OSError, SafetensorError) as error:
            assert str(error)
            return
        assert logits(model).shape == (2, 7, 96)
        if in_experts and format not in ("fp8", "mxfp4", "sub1"):
            packed = [
                w for module in model.modules() if isinstance(module, PackedExperts) for w in module.packed_pair()
            ]
            assert all(w.format.unpack(w).isfinite().all() for w in packed)

    flip()
