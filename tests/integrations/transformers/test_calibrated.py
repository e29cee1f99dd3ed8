"""GPTQ in every family: the experts of the first layer come nearer to the float ones than by rounding."""

import copy

import pytest
import torch
from families import families, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

from moert import quantize_
from moert.integrations.transformers.calibrated import FloatHfExperts
from moert.integrations.transformers.quantized import PackedExperts, experts_modules
from moert.quant import GPTQ, SubOneBit
from moert.quant.calibration import _run

SETTINGS = GPTQ(min_rows=1)


def calls(model, module, batches):
    """What the module is called with."""
    kept = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: kept.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            _run(model, batch)
    hook.remove()
    return kept


def error(module, float_module, inputs):
    with torch.no_grad():
        pairs = [(module(*args, **kwargs), float_module(*args, **kwargs)) for args, kwargs in inputs]
    return sum((a - b).square().sum() for a, b in pairs).item()


@pytest.mark.parametrize("family", families(), ids=lambda family: family.id)
def test_nearer_than_rounded(family):
    model = tiny_model(family)
    batches = [tiny_inputs(model, seed) for seed in range(1, 4)]
    calibrated, rounded = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(rounded, "int4", precision="full")
    names = quantize_(calibrated, "int4", precision="full", calibration=batches, method=SETTINGS)
    assert sorted(names) == sorted(experts_modules(model)) == sorted(layer.name for layer in names.layers)
    first = names.layers[0]
    module = model.get_submodule(first.name)
    inputs = calls(model, module, batches)
    assert sum(first.rows) == sum(len(args[0]) * args[1].shape[1] for args, _ in inputs)
    errors = [error(net.get_submodule(first.name), module, inputs) for net in (calibrated, rounded)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_padding_are_not_counted(side):
    model = tiny_model(next(family for family in families() if family.id == "Qwen3Moe"))
    ids, mask = torch.randint(64, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = mask[2, :1] = 0
    mask = mask if side == "left" else mask.flip(1)
    k = model.config.num_experts_per_tok
    padded, other, plain = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    names = quantize_(padded, "int4", calibration=[{"input_ids": ids, "attention_mask": mask}], method=SETTINGS)
    assert all(sum(layer.rows) == int(mask.sum()) * k for layer in names.layers)
    changed = torch.where(mask == 0, (ids + 1) % 64, ids)  # what padding holds does not matter
    quantize_(other, "int4", calibration=[{"input_ids": changed, "attention_mask": mask}], method=SETTINGS)
    first = f"{names.layers[0].name}.w1_codes"
    assert torch.equal(padded.state_dict()[first], other.state_dict()[first])
    assert sum(quantize_(plain, "int4", calibration=[ids], method=SETTINGS).layers[0].rows) == ids.numel() * k


def test_saved_and_reloaded(tmp_path):
    model = tiny_model(next(family for family in families() if family.id == "GptOss"))
    inputs = tiny_inputs(model)
    names = quantize_(model, "int8", group=32, calibration=[inputs["input_ids"]], method=SETTINGS)
    assert len(names) == 2 and all(isinstance(model.get_submodule(name), PackedExperts) for name in names)
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss", "Inkling2"])
def test_sub_one_bit_runs_and_is_saved(kind, tmp_path):
    model = tiny_model(next(family for family in families() if family.id == kind))
    rounded, batches = copy.deepcopy(model), [tiny_inputs(model, seed) for seed in range(1, 4)]
    quantize_(rounded, "sub1", skip=["*.layers.1"])
    names = quantize_(model, "sub1", calibration=batches, method=SETTINGS)
    assert len(names) == 2 and all(model.get_submodule(name).format == SubOneBit() for name in names)
    module = model.get_submodule(names.layers[0].name)
    inputs = calls(model, module, batches)
    float_module = tiny_model(next(family for family in families() if family.id == kind))
    float_module = float_module.get_submodule(names.layers[0].name)
    errors = [error(net.get_submodule(names.layers[0].name), float_module, inputs) for net in (model, rounded)]
    assert errors[0] < 0.9 * errors[1]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert set(again.config.quantization_config.experts) == set(names)


def test_a_failure_in_a_later_layer_is_not_saved(tmp_path, monkeypatch):
    """What is packed runs; a checkpoint of some packed and some float experts would be read as neither."""
    family = next(family for family in families() if family.id == "Qwen3Moe")
    model = tiny_model(family)
    whole = FloatHfExperts.replace
    done = []

    def once(self, packed):
        if done:
            raise RuntimeError("no memory left")
        done.append(whole(self, packed))

    monkeypatch.setattr(FloatHfExperts, "replace", once)
    with pytest.raises(RuntimeError, match="no memory left"):
        quantize_(model, "int4")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "half")
    assert torch.isfinite(model(torch.arange(6)[None]).logits).all()


@pytest.mark.parametrize("fmt", ["int4", "sub1"])
def test_a_failure_before_the_first_layer_leaves_the_model_as_it_was(fmt, tmp_path):
    model = tiny_model(next(family for family in families() if family.id == "Qwen3Moe"))
    with pytest.raises(ValueError, match="calibration must hold at least one batch, got none"):
        quantize_(model, fmt, calibration=[])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
