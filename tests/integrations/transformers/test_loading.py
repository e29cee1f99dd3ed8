"""Checkpoints of other libraries against the float model that they stand for."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from foreign_checkpoint import SOURCES, write
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moert.integrations.transformers import InexactWarning, load_quantized
from moert.integrations.transformers.quantized import PackedExperts
from moert.quant import Fp8, Int4, Int4Asymmetric, Int8, Mxfp4
from moert.testing import row_error

FORMATS = {"gptq": Int4(), "gptq_v2": Int4Asymmetric(), "awq": Int4Asymmetric(), "mxfp4": Mxfp4()}
IDS = torch.arange(14).view(2, 7) * 5 % 96


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.flatten(0, 1)


def float_logits(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def formats(model):
    packed = [module for module in model.modules() if isinstance(module, PackedExperts)]
    return [(module.w1_format, module.w2_format) for module in packed]


@pytest.mark.parametrize(
    "family,source",
    [("qwen3", source) for source in FORMATS if source != "mxfp4"] + [("mixtral", "gptq"), ("gpt-oss", "mxfp4")],
)
def test_exact(family, source, tmp_path):
    foreign, floats = write(tmp_path, family, source)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactWarning)
        model = load_quantized(foreign, precision="full", dtype=torch.float32)
    assert formats(model) == [(FORMATS[source], FORMATS[source])] * 2
    assert row_error(logits(model), float_logits(floats)) < 5e-6


@pytest.mark.parametrize("bits,format", [(4, "pack-quantized"), (8, "int-quantized")])
def test_compressed_tensors(bits, format, tmp_path):
    layout, strategy = {4: (Int4(), "group"), 8: (Int8(), "channel")}[bits]
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": True}
    weights |= {"group_size": 32} if bits == 4 else {}
    groups = {"group_0": {"weights": weights}}
    source = {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}
    foreign, floats = write(tmp_path, "qwen3", source, lambda w: compressed(w, source))
    model = load_quantized(foreign, precision="full", dtype=torch.float32)
    assert formats(model) == [(layout, layout)] * 2
    assert row_error(logits(model), float_logits(floats)) < 5e-6


def compressed(w, source):
    """What the library writes of w, and what it makes of that."""
    scheme = QuantizationScheme(targets=["Linear"], **source["config_groups"]["group_0"], format=source["format"])
    groups = w.unflatten(1, (-1, scheme.weights.group_size or w.shape[1]))
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(source["format"])
    parts = compressor.compress({"weight": w, "weight_scale": scales.half().float()}, scheme)
    return parts, compressor.decompress(parts, scheme)["weight"]


def test_fp8_is_exact_where_its_blocks_end_with_gate_and_up(tmp_path):
    foreign, floats = write(tmp_path, "qwen3-128", "fp8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactWarning)
        model = load_quantized(foreign, dtype=torch.float32)
    assert formats(model) == [(Fp8(), Fp8())] * 2
    assert row_error(logits(model), float_logits(floats)) < 5e-6
    model.to(torch.bfloat16).save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert formats(again) == [(Fp8(), Fp8())] * 2 and row_error(logits(again), float_logits(floats)) < 0.03


def test_deepseek_in_fp8_blocks(tmp_path):
    foreign, floats = write(tmp_path, "deepseek", "fp8")
    stored = load_file(foreign / "model.safetensors")
    assert stored["model.layers.1.mlp.experts.3.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert "model.layers.0.mlp.gate_proj.weight_scale_inv" in stored  # of the dense layer
    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactWarning)
        model = load_quantized(foreign, precision="full", dtype=torch.float32)
    assert formats(model) == [(Fp8(), Fp8())] * 2  # layers 1 and 2
    assert row_error(logits(model), float_logits(floats)) < 5e-6
    experts = next(module for module in model.modules() if isinstance(module, PackedExperts))
    scales = [stored[f"model.layers.1.mlp.experts.3.{name}_proj.weight_scale_inv"] for name in ("gate", "up")]
    assert torch.equal(experts.packed("w1").scales[3], torch.cat(scales))  # as they lie in the file


def test_fp8_of_gate_and_up_in_one_block_is_converted_and_said(tmp_path):
    foreign, floats = write(tmp_path, "qwen3", "fp8")
    with pytest.warns(InexactWarning, match="16 converted to .*group=128.: gate and up share blocks of 128 rows"):
        model = load_quantized(foreign, precision="full", dtype=torch.float32)
    assert formats(model) == [(Int8(128), Fp8())] * 2
    assert 0 < row_error(logits(model), float_logits(floats)) < 0.05


@pytest.mark.parametrize("source,why", [("desc_act", "are not neighbours")])
def test_converted_and_said(source, why, tmp_path):
    foreign, floats = write(tmp_path, "qwen3", source)
    with pytest.warns(InexactWarning, match=f"24 converted to .*group=128.: .*{why}"):
        model = load_quantized(foreign, precision="full", dtype=torch.float32)
    assert formats(model) == [(Int8(128), Int8(128))] * 2
    assert 0 < row_error(logits(model), float_logits(floats)) < 0.05
    with pytest.warns(InexactWarning, match="converted to"):
        other = load_quantized(foreign, convert="int8", dtype=torch.bfloat16)
    assert formats(other) == [(Int8(), Int8())] * 2 and other.dtype == torch.bfloat16


def test_saved_and_reloaded_bit_for_bit(tmp_path):
    model = load_quantized(write(tmp_path, "qwen3", "gptq")[0], dtype=torch.float32)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert formats(again) == [(Int4(), Int4())] * 2
    assert row_error(logits(again), logits(model)) < 1e-6
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_layers_left_float_stay_float(tmp_path):
    foreign, floats = write(tmp_path, "qwen3", "gptq", plain=["layers.0.mlp"])
    model = load_quantized(foreign, precision="full", dtype=torch.float32)
    assert formats(model) == [(Int4(), Int4())] and model.config.quantization_config.skip == [
        "model.layers.0.mlp.experts"
    ]
    assert row_error(logits(model), float_logits(floats)) < 5e-6


def test_the_library_of_the_format_keeps_its_quantizer():
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    for method in ("gptq", "awq", "compressed-tensors", "fp8", "mxfp4"):
        for registry in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING):
            assert registry[method].__module__.startswith("transformers.")


NAME = "model.layers.1.mlp.experts.2.up_proj"
FAULTS = {
    "part missing": (f"{NAME}.scales", None, "must have all parts of every matrix, got 4 qweight, 4 qzeros, 3 scales"),
    "weight missing": ("model.norm.weight", None, "checkpoint must hold every weight, got no model.norm.weight"),
    "shape": (f"{NAME}.scales", lambda t: t[:1], r"gate_up_proj: scales must have shape \[2, 32\], got \[1, 32\]"),
    "nan": (f"{NAME}.scales", lambda t: t * torch.nan, "scales must be finite, got inf or nan"),
    "dtype": (f"{NAME}.qweight", lambda t: t.long(), "qweight must be torch.int32, got torch.int64"),
    "router": (
        "model.layers.0.mlp.gate.weight",
        lambda t: t[:3],
        r"gate.weight: weight must have shape \[4, 64\] .* got \[3, 64\]",
    ),
    "attention": ("model.layers.0.self_attn.q_proj.qzeros", lambda t: t + 1, "q_proj.weight: qzeros must stand for 8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken(fault, tmp_path):
    foreign, _ = write(tmp_path, "qwen3", "gptq")
    name, change, message = FAULTS[fault]
    tensors = load_file(foreign / "model.safetensors")
    changed = {} if change is None else {name: change(tensors[name]).contiguous()}
    del tensors[name]
    save_file(tensors | changed, foreign / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_quantized(foreign, dtype=torch.float32)


def test_truncated_files(tmp_path):
    foreign, _ = write(tmp_path, "qwen3", "awq")
    file = foreign / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 7, 8, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises((SafetensorError, ValueError, OSError)):
            load_quantized(foreign, dtype=torch.float32)


def test_pickled_weights_are_not_read(tmp_path):
    foreign, _ = write(tmp_path, "qwen3", "awq")
    torch.save(load_file(foreign / "model.safetensors"), foreign / "pytorch_model.bin")
    (foreign / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load_quantized(foreign, dtype=torch.float32)


def test_other_sizes_than_the_config(tmp_path):
    foreign, _ = write(tmp_path, "qwen3", "gptq")
    config = json.loads((foreign / "config.json").read_text())
    for change, message in [
        (
            {key: 5 for key in ("num_experts", "num_local_experts") if key in config},
            r"down_proj must have shape \[5, 64, 32\] by the config, got \[4, 64, 32\]",
        ),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 8},
            r"weight must have shape \[128, 64\] by the config, got \[64, 64\]|\[64, 128\]",
        ),
    ]:
        (foreign / "config.json").write_text(json.dumps(config | change))
        with pytest.raises((ValueError, RuntimeError), match=message):
            load_quantized(foreign, dtype=torch.float32)


def test_a_path_that_is_not_there_is_said_without_asking_the_hub(tmp_path, monkeypatch):
    asked = []

    def ask(name, **_):
        asked.append(name)
        raise OSError("asked the Hub")

    monkeypatch.setattr("moert.integrations.transformers.loading.AutoConfig.from_pretrained", ask)
    for path in (tmp_path / "no", str(tmp_path / "no"), "./no", "../no", "~/no", "some/models/no", Path("org/no")):
        with pytest.raises(ValueError, match="directory must exist or be a name on the Hub, got .*no"):
            load_quantized(path)
    assert not asked
    for name in ("gpt2", "org/name-1.0_awq"):
        with pytest.raises(OSError, match="asked the Hub"):
            load_quantized(name)
    assert asked == ["gpt2", "org/name-1.0_awq"]


def test_what_is_refused(tmp_path):
    foreign, floats = write(tmp_path, "qwen3", "gptq")
    with pytest.raises(ValueError, match="config.json must have a quantization_config, got none"):
        load_quantized(floats)
    with pytest.raises(ValueError, match="format must be one of .*, got int3"):
        load_quantized(foreign, convert="int3")
    with pytest.raises(ValueError, match="precision must be one of .*, got int3"):
        load_quantized(foreign, precision="int3")
    with pytest.raises(ValueError, match="precision must be one of auto, .* for int4, got fp8_group128"):
        load_quantized(foreign, precision="fp8_group128")
    for choice in (False, None):
        with pytest.raises(ValueError, match=f"use_safetensors must be True, as pickled .* run code, got {choice}"):
            load_quantized(foreign, use_safetensors=choice)
    config = json.loads((foreign / "config.json").read_text())
    for source, message in [
        ({"quant_method": "aqlm"}, "quant_method must be one of gptq, awq, .* got aqlm"),
        (SOURCES["gptq"][0] | {"bits": 2}, "bits must be 4 in GPTQ checkpoints, got 2"),
    ]:
        (foreign / "config.json").write_text(json.dumps(config | {"quantization_config": source}))
        with pytest.raises(ValueError, match=message):
            load_quantized(foreign)
