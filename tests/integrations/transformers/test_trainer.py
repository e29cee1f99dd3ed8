"""transformers' Trainer over a tiny Qwen3-MoE: the loss curve with moert's experts beside that of the eager ones.

Noise is what bfloat16 does to eager's own curve: the root mean square, over the steps, of its distance from float32's.
"""

import argparse
import functools
import inspect
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch
from families import randomize
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

from moert import cuda
from moert.cli.corpus import evenly_spaced
from moert.integrations.transformers import experts

STEPS, BATCH, LENGTH = 60, 8, 32
TEXT = torch.frombuffer(bytearray(inspect.getsource(argparse).encode()), dtype=torch.uint8)
DEVICES = (
    "cpu",
    pytest.param(
        "cuda",
        marks=(
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
            pytest.mark.skipif(not cuda.is_built(), reason="needs a moert built with MOERT_CUDA=ON"),
        ),
    ),
)


def tiny_model():
    """Weights from `randomize`, with which the experts matter to the loss."""
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2, output_router_logits=True,
    )  # fmt: skip
    return randomize(Qwen3MoeForCausalLM(config))


def loss_curve(implementation: str, directory, device="cpu", bf16=True, **options):
    """The loss [STEPS] of every step, float64; weights and order of the data are the same in every run."""
    windows = evenly_spaced(TEXT, LENGTH, STEPS * BATCH)
    model = tiny_model()
    model.set_experts_implementation(implementation)
    with mock.patch.dict(os.environ):  # which the arguments write to
        arguments = TrainingArguments(
            str(directory), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=1e-3, bf16=bf16,
            lr_scheduler_type="constant", use_cpu=device == "cpu", dataloader_pin_memory=False, logging_steps=1,
            disable_tqdm=True, save_strategy="no", report_to="none", **options,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=[{"input_ids": w, "labels": w} for w in windows])
        trainer.train()
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    assert len(losses) == STEPS
    return torch.tensor(losses, dtype=torch.float64)


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """eager(device, bf16): the curve of the eager experts, trained once."""
    return functools.cache(
        lambda device, bf16: loss_curve("eager", tmp_path_factory.mktemp("eager"), device=device, bf16=bf16)
    )


def distance(curve, other):
    return (curve - other).square().mean().sqrt().item()


def noise(eager, device="cpu"):
    return distance(eager(device, True), eager(device, False))


@pytest.mark.parametrize("device", DEVICES)
def test_the_curve_in_bfloat16_is_eagers_within_noise(device, eager, tmp_path):
    exact, curve = eager(device, False), loss_curve("moert", tmp_path, device)
    counts = torch.bincount(TEXT.long(), minlength=256).double()
    assert curve[-5:].mean() < torch.distributions.Categorical(counts).entropy()  # more is learnt than frequent bytes
    assert 0 < distance(curve, exact) <= 2 * noise(eager, device)


def test_the_curve_in_float32_is_eagers(eager, tmp_path):
    # Rounding alone moves it by a ten-thousandth of the noise; a token that is as near to two experts may add to that.
    assert distance(loss_curve("moert", tmp_path, bf16=False), eager("cpu", False)) <= noise(eager) / 10


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")  # its new name is unknown to 5.23
def test_gradient_checkpointing_changes_no_bit(tmp_path, monkeypatch):
    calls = []
    fused = experts.fused_experts
    monkeypatch.setattr(experts, "fused_experts", lambda *args: calls.append(1) or fused(*args))
    curve, forwards = loss_curve("moert", tmp_path), len(calls)
    again = loss_curve("moert", tmp_path, gradient_checkpointing=True)
    assert torch.equal(curve, again) and len(calls) - forwards == 2 * forwards


def without_gradient_of_x(fused, x, routing, *rest):
    return fused(x.detach(), routing, *rest)


def without_gradient_of_the_routing(fused, x, routing, *rest):
    return fused(x, replace(routing, weights=routing.weights.detach()), *rest)


def without_gradients_of_half_the_experts(fused, x, routing, w1, w2, *rest):
    half = torch.arange(len(w1))[:, None, None] % 2 == 0
    return fused(x, routing, torch.where(half, w1.detach(), w1), torch.where(half, w2.detach(), w2), *rest)


@pytest.mark.parametrize(
    "wrong", (without_gradient_of_x, without_gradient_of_the_routing, without_gradients_of_half_the_experts)
)
def test_a_wrong_gradient_is_no_noise(wrong, eager, tmp_path, monkeypatch):
    monkeypatch.setattr(experts, "fused_experts", functools.partial(wrong, experts.fused_experts))
    assert distance(loss_curve("moert", tmp_path), eager("cpu", False)) > 2 * noise(eager)
