import json
import shutil

import pytest
import torch
from outside import operators_of, outside_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from moert import quantize_
from moert.cli.checkpoint import byte_tokenizer, check_files, load_model, load_tokenizer
from moert.cli.errors import CommandError
from moert.integrations.transformers.swap import blocks

TEXT = "def f(x):\r\n\treturn 'ä€ \U0001f600\0' \n"


def test_byte_tokenizer_is_utf8(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode())
    assert tokenizer.decode(list(TEXT.encode())) == TEXT
    assert len(tokenizer) == 256


def test_a_sound_checkpoint_loads(checkpoint):
    check_files(checkpoint)
    eager, grouped = (load_model(checkpoint, name, "auto") for name in ("eager", "grouped_mm"))
    ids = load_tokenizer(checkpoint)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(eager(ids).logits, grouped(ids).logits, atol=1e-4)
    assert not eager.training and eager.dtype == torch.float32
    assert load_model(checkpoint, "eager", "bfloat16").dtype == torch.bfloat16


def test_experts_are_packed_while_it_loads(checkpoint, tmp_path):
    model = load_model(checkpoint, "moert", "auto", packing="int4:64")
    expected = load_model(checkpoint, "moert", "auto")
    quantize_(expected, "int4", 64)
    ids = torch.randint(256, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    expected.save_pretrained(tmp_path)
    assert load_model(tmp_path, "moert", "auto").config.quantization_config.group == 64
    with pytest.raises(CommandError, match="model must have float weights to be packed, got quantized ones"):
        load_model(tmp_path, "moert", "auto", packing="int4")


def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


def test_no_directory(tmp_path):
    with pytest.raises(CommandError, match="model must be a local directory, got .*nothing"):
        check_files(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "model must have a config.json, got none in"),
        ("{", "config.json must be readable JSON"),
        ("[" * 100_000, "config.json must be readable JSON"),
        ("[]", "config.json must be a JSON object, got list"),
        ("{}", "config.json of the model must have a model_type, got none"),
    ],
)
def test_config_files(checkpoint, tmp_path, text, message):
    model = copy(checkpoint, tmp_path)
    (model / "config.json").unlink() if text is None else (model / "config.json").write_text(text)
    with pytest.raises(CommandError, match=message):
        check_files(model)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights(checkpoint, tmp_path, keep):
    path = copy(checkpoint, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CommandError, match="model.safetensors must be a sound safetensors file"):
        check_files(path.parent)


def test_pickles_are_not_read(checkpoint, tmp_path):
    model = copy(checkpoint, tmp_path)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(
        CommandError, match=r"must have safetensors weights, got only pickled files \(pytorch_model.bin"
    ):
        check_files(model)
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(CommandError, match="must have safetensors weights, got none"):
        check_files(model)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "gone.safetensors"}, "model must have every file its index names, got no .*gone.safetensors"),
        ({"a": "../model.safetensors"}, r"must name files beside it, got \.\./model.safetensors"),
        ({}, "must have a weight_map, got dict"),
        (None, "must have a weight_map, got NoneType"),
    ],
)
def test_indexes(checkpoint, tmp_path, weight_map, message):
    model = copy(checkpoint, tmp_path)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CommandError, match=message):
        check_files(model)


def edit_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def test_unknown_and_unsuitable_models(checkpoint, dense_checkpoint, tmp_path):
    with pytest.raises(CommandError, match="must have mixture-of-experts layers, got Qwen3ForCausalLM without any"):
        load_model(dense_checkpoint, "eager", "auto")
    model = copy(checkpoint, tmp_path)
    edit_config(model, model_type="no_such_model")
    with pytest.raises(CommandError, match="config that transformers knows.*no_such_model"):
        load_model(model, "eager", "auto")
    edit_config(model, model_type="vit")
    with pytest.raises(CommandError, match="model must generate text, got model_type vit"):
        load_model(model, "eager", "auto")


def test_config_that_does_not_fit_the_weights(checkpoint, tmp_path):
    model = copy(checkpoint, tmp_path)
    edit_config(model, hidden_size=64)
    with pytest.raises(CommandError, match=r"\S+weight must have shape \[.*64.*\] by the config, got \["):
        load_model(model, "eager", "auto")


def test_config_that_does_not_fit_its_class(checkpoint, tmp_path):
    model = copy(checkpoint, tmp_path)
    edit_config(model, num_hidden_layers="two")
    with pytest.raises(CommandError, match="model must have a config that"):
        load_model(model, "eager", "auto")


def test_missing_weights_are_not_made_up(checkpoint, tmp_path):
    path = copy(checkpoint, tmp_path) / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CommandError, match="must have every weight, got none for model.norm.weight and 0 more"):
        load_model(path.parent, "eager", "auto")


def test_no_tokenizer(checkpoint, tmp_path):
    model = copy(checkpoint, tmp_path)
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CommandError, match="model must have a tokenizer in .*, got no tokenizer.json"):
        load_tokenizer(model)


@pytest.mark.parametrize("family", ("dbrx", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "switch_transformers"))
def test_experts_outside_the_interface_are_swapped(family, tmp_path):
    outside_model(family, vocab_size=256).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    eager, moert = (load_model(tmp_path, name, "auto") for name in ("eager", "moert"))
    assert not any("unswapped" in vars(type(module)) for module in eager.modules()) and blocks(moert)
    prompt = load_tokenizer(tmp_path)("import os", return_tensors="pt")
    expected = eager.generate(**prompt, max_new_tokens=4, do_sample=False)
    ran = operators_of(lambda: moert.generate(**prompt, max_new_tokens=4, do_sample=False))
    assert ran and torch.equal(moert.generate(**prompt, max_new_tokens=4, do_sample=False), expected)
    with pytest.raises(CommandError, match="model must have experts that can be packed, got .* without any"):
        load_model(tmp_path, "moert", "auto", packing="int4")


def test_a_config_that_would_take_for_ever(checkpoint, tmp_path):
    directory = copy(checkpoint, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(CommandError, match="num_hidden_layers must be at most 10000, got 1000000000"):
        load_model(directory, "eager", "auto")


def test_sizes_are_checked_before_the_loader_sees_them(checkpoint, tmp_path, monkeypatch):
    """It allocates what does not fit, or is missing, at the size that the config says."""
    monkeypatch.setattr(Qwen3MoeForCausalLM, "from_pretrained", lambda *args, **options: pytest.fail("allocates"))
    for i, (change, message) in enumerate(
        [
            ({"moe_intermediate_size": 2**20}, r"experts.down_proj must have shape .*1048576.* by the config, got"),
            ({"num_experts": 2**20, "num_local_experts": 2**20}, r"must have shape \[1048576, .*\] by the config, got"),
            ({"vocab_size": 2**40}, r"must have shape \[1099511627776, 32\] by the config, got \[256, 32\]"),
            ({"num_hidden_layers": 40}, "checkpoint must hold every weight, got none for model.layers.10"),
        ]
    ):
        model = copy(checkpoint, tmp_path / str(i))
        edit_config(model, **change)
        with pytest.raises(CommandError, match=message):
            load_model(model, "eager", "auto")


@pytest.mark.parametrize("format", ["int4", "fp8", "sub1"])
def test_sizes_of_packed_experts_are_checked_too(format, checkpoint, tmp_path, monkeypatch):
    model = load_model(checkpoint, "moert", "auto")
    quantize_(model, format)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path, "moert", "auto").config.quantization_config.format == format
    monkeypatch.setattr(Qwen3MoeForCausalLM, "from_pretrained", lambda *args, **options: pytest.fail("allocates"))
    edit_config(tmp_path, moe_intermediate_size=2**20)
    with pytest.raises(CommandError, match=r"experts.w._\w+ must have shape .* by the config, got"):
        load_model(tmp_path, "moert", "auto")
