"""Packed experts in every family: what the class itself computes on the unpacked weights."""

import copy

import pytest
import torch
from compare import routing
from families import families, tiny_model

from moert.integrations.transformers.quantized import PackedExperts, quantized_, weight_names
from moert.quant import Int4, Int8, Mxfp4, Ternary5
from moert.testing import row_error


def experts_of(family):
    model = tiny_model(family)
    return next(m for m in model.modules() if isinstance(m, family.experts))


def packed(module, fmt, precision="full"):
    module = quantized_(copy.deepcopy(module), fmt, precision)
    for place, name in zip(("w1", "w2"), weight_names(module), strict=True):
        module.pack_(place, getattr(module, name))
    return module


def rounded_(module, fmt):
    """The float module with weights that the format holds exactly, whatever its layout."""
    with torch.no_grad():
        for name in weight_names(module):
            w = getattr(module, name)
            rows = w.mT if module.is_transposed else w
            back = fmt.unpack(fmt.pack(rows.float().contiguous())).to(w.dtype)
            w.copy_(back.mT if module.is_transposed else back)
    return module


@pytest.mark.parametrize("family", families(), ids=lambda family: family.id)
def test_as_eager_on_the_unpacked_weights(family):
    module = experts_of(family)
    module.config._experts_implementation = "eager"
    k, H = 2, module.down_proj.shape[2 if module.is_transposed else 1]
    ids, weights = routing(module, 9, k, torch.float32)
    x = torch.randn(9, H)
    float_module = rounded_(copy.deepcopy(module), Int4())
    mine = packed(module, Int4())
    assert not [name for name, _ in mine.named_parameters() if name in weight_names(module)]
    for shape in (x, x[:1], x[:0]):
        n = len(shape)
        expected = float_module(shape, ids[:n], weights[:n])
        y = mine(shape, ids[:n], weights[:n])
        assert y.shape == expected.shape and y.dtype == expected.dtype
        assert n == 0 or row_error(y, expected) < 2e-6
    bf16 = mine.to(torch.bfloat16)(x.bfloat16(), ids, weights)
    assert row_error(bf16, float_module(x, ids, weights)) < 0.03


@pytest.mark.parametrize("fmt", [Int8(), Int8(32), Int4(128), Mxfp4(), Ternary5()], ids=str)
@pytest.mark.parametrize("precision", ["full", "auto"])
def test_formats(fmt, precision):
    module = experts_of(next(f for f in families() if f.id == "Qwen3Moe"))
    module.config._experts_implementation = "eager"
    ids, weights = routing(module, 20, 2, torch.float32)
    x = torch.randn(20, module.down_proj.shape[1])
    expected = rounded_(copy.deepcopy(module), fmt)(x, ids, weights)
    error = row_error(packed(module, fmt, precision)(x, ids, weights), expected)
    assert error < (2e-6 if precision == "full" else 0.03)  # int8 rows add their own rounding


def test_gradients_of_x_and_weights():
    module = experts_of(next(f for f in families() if f.id == "GptOss"))
    module.config._experts_implementation = "eager"
    ids, weights = routing(module, 6, 2, torch.float32)
    float_module, mine = rounded_(copy.deepcopy(module), Int8(32)), packed(module, Int8(32))
    grads = []
    for experts in (float_module, mine):
        x = torch.randn(6, module.down_proj.shape[2], generator=torch.Generator().manual_seed(0)).requires_grad_()
        w = weights.clone().requires_grad_()
        for bias in (experts.gate_up_proj_bias, experts.down_proj_bias):
            bias.requires_grad_(False)
        experts(x, ids, w).square().sum().backward()
        grads.append((x.grad, w.grad))
    for mine_grad, expected in zip(grads[1], grads[0], strict=True):
        assert row_error(mine_grad.reshape(1, -1), expected.reshape(1, -1)) < 1e-5


def test_sentinels_are_dropped():
    mine = packed(experts_of(next(f for f in families() if f.id == "Mixtral")), Int8())
    ids, weights = routing(
        mine_float := experts_of(next(f for f in families() if f.id == "Mixtral")), 4, 2, torch.float32
    )
    x = torch.randn(4, mine_float.down_proj.shape[1])
    y = mine(x, torch.where(torch.arange(4)[:, None] == 2, 6, ids), weights)
    assert (y[2] == 0).all() and torch.equal(y[[0, 1, 3]], mine(x, ids, weights)[[0, 1, 3]])


def test_casting_does_not_touch_what_is_packed():
    mine = packed(experts_of(next(f for f in families() if f.id == "Qwen3Moe")), Int4())
    before = {name: buffer.clone() for name, buffer in mine.named_buffers()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        mine.to(dtype)
    assert before.keys() == {"w1_codes", "w1_scales", "w2_codes", "w2_scales"}
    assert all(torch.equal(buffer, before[name]) for name, buffer in mine.named_buffers())


def test_copies():
    mine = packed(experts_of(next(f for f in families() if f.id == "Qwen3Moe")), Int4())
    other = copy.deepcopy(mine)
    assert isinstance(other, PackedExperts) and type(other) is type(mine)
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), mine.buffers(), strict=True))
    assert "format=Int4(group=32), precision=full" in repr(other)
