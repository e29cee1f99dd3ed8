"""Adapters over the packed experts of transformers models."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from compare import routing
from families import families, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

from moert import quantize_
from moert.experts import add_lora_, load_lora_, lora_state_dict
from moert.integrations.transformers.calibrated import FloatHfExperts
from moert.integrations.transformers.quantized import experts_modules
from moert.quant import Int8
from moert.testing import row_error

# Plain, transposed, transposed with biases and interleaved, unknown gate, norm after the experts, without gate.
KINDS = ["Qwen3Moe", "Aria", "GptOss", "Inkling2", "MuseSpark", "NemotronH"]


def model_of(kind):
    return tiny_model(next(family for family in families() if family.id == kind))


def adapted(model, std=0.2):
    quantize_(model, "int8", group=32)
    add_lora_(model, rank=3, alpha=6)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(".B"):
                value.normal_(std=std)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_float_experts_with_the_product_added(kind):
    float_model = model_of(kind)
    model = adapted(copy.deepcopy(float_model))
    name, module = next(iter(experts_modules(model).items()))
    source = FloatHfExperts(float_model.get_submodule(name), Int8(32), "full")
    w1, w2 = (w.format.unpack(w) for w in module.packed_pair())
    (A1, B1), (A2, B2) = ((adapter.A, adapter.B) for adapter in module.adapters)
    ids, weights = routing(source.module, 9, 2, torch.float32)
    x = torch.randn(9, w1.shape[2], requires_grad=True)
    y = module(x, ids, weights)
    expected = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        token, choice = torch.where(ids == e)
        h = source.middle(x[token] @ (w1[e] + 2 * B1[e] @ A1[e]).T, e)
        out = h @ (w2[e] + 2 * B2[e] @ A2[e]).T
        if source.module.has_bias:
            out = out + source.module.down_proj_bias[e].detach()
        out = source.module.post_expert_norm(out) if source.module.has_post_expert_norm else out
        expected = expected.index_add(0, token, out * weights[token, choice, None])
    assert row_error(y, expected) < 1e-5
    dy = torch.randn_like(y)
    tensors = x, A1, B1, A2, B2
    grads, wanted = torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy)
    for mine, want in zip(grads, wanted, strict=True):
        assert row_error(mine.reshape(1, -1), want.reshape(1, -1)) < 1e-5


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
def test_a_model_trains(kind, tmp_path):
    model = model_of(kind)
    model.save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    quantize_(model, "int4")
    model.save_pretrained(tmp_path / "packed")
    names = add_lora_(model, rank=4)
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    ids, losses = tiny_inputs(model)["input_ids"], []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(lora_state_dict(model))
    after = model.state_dict()
    assert len(names) == 2 and all(torch.equal(value, after[name]) for name, value in before.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    add_lora_(again, rank=4)
    load_lora_(again, lora_state_dict(model))
    with torch.no_grad():
        mine, other = (F.log_softmax(net.eval()(input_ids=ids).logits, -1) for net in (model, again))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_beside_peft_on_attention():
    """PEFT finds no float weight in packed experts to adapt; its adapters on other layers stay trainable."""
    model = model_of("Qwen3Moe")
    quantize_(model, "int8")
    config = peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"])
    with pytest.raises(ValueError, match="no `target_parameters` found"):
        peft.get_peft_model(copy.deepcopy(model), config)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    add_lora_(wrapped, rank=2)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 + 2 * 2 and all("lora_" in name for name in trained)
