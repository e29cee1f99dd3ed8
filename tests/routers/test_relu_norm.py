import math
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from moert import RouterContext
from moert.routers import ReLUNormRouter, activation_locality_loss, chunk_sparsity_loss

H, E = 12, 5
DOCUMENTS = torch.tensor([0, 9, 21], dtype=torch.int32)


def test_forward():
    router, x = ReLUNormRouter(H, E), torch.randn(30, H)
    torch.nn.init.uniform_(router.gain, 0.5, 2)
    routing = router(x)
    for t in range(30):
        on = [max(0.0, (router.weight[e] @ x[t]).item()) for e in range(E)]
        rms = math.sqrt(sum(a * a for a in on) / E + 1e-5)
        expected = [float(router.gain[e]) * a / rms for e, a in enumerate(on)]
        torch.testing.assert_close(routing.weights[t], torch.tensor(expected), rtol=1e-5, atol=1e-6)
        assert routing.ids[t].tolist() == [e if a > 0 else E for e, a in enumerate(on)]
    torch.testing.assert_close(routing.dense_weights(), routing.weights)


def test_a_token_that_uses_nothing():
    router = ReLUNormRouter(H, E, logit_bias=True)
    torch.nn.init.constant_(router.logit_bias, -100.0)
    x = torch.randn(4, H, requires_grad=True)
    routing = router(x)
    assert (routing.ids == E).all() and not routing.weights.any()
    (routing.weights.sum() + routing.losses["cs"]).backward()
    assert x.grad.isfinite().all() and router.weight.grad.isfinite().all()


def entropy(p, q):
    """Cross-entropy of the prediction p against the target q."""
    return -(q * math.log(p) + (1 - q) * math.log(1 - p))


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("documents", (None, DOCUMENTS), ids=("one", "two"))
def test_activation_locality_loss(documents, masked):
    logits = torch.randn(21, E, dtype=torch.float64) * 0.02
    mask = torch.arange(21) % 5 != 2 if masked else None
    terms = []
    for t in range(1, 21):
        if (documents is not None and t == 9) or (masked and not (mask[t] and mask[t - 1])):
            continue
        left, right = torch.sigmoid(100 * logits[t - 1 : t + 1]).tolist()
        terms += [entropy(p, q) for p, q in zip(left, right, strict=True)]
    loss = activation_locality_loss(logits, documents, mask)
    assert abs(loss.item() - sum(terms) / len(terms)) <= 1e-6


def test_activation_locality_of_a_constant_sequence_is_the_entropy():
    row = torch.randn(1, E, dtype=torch.float64) * 0.02
    p = torch.sigmoid(100 * row)
    expected = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    torch.testing.assert_close(activation_locality_loss(row.expand(7, E)), expected)


def test_both_sides_of_the_locality_loss_carry_gradient():
    logits = (torch.randn(6, E, dtype=torch.float64) * 0.01).requires_grad_()
    assert gradcheck(activation_locality_loss, logits)
    (both,) = torch.autograd.grad(activation_locality_loss(logits), logits)
    (left,) = torch.autograd.grad(activation_locality_loss(logits, detach_target=True), logits)
    assert both[-1].abs().min() > 0 and not left[-1].any() and left[:-1].abs().min() > 0


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("documents", (None, DOCUMENTS), ids=("one", "two"))
@pytest.mark.parametrize("chunk", (8, 64))
def test_chunk_sparsity_loss(chunk, documents, masked):
    on = torch.randn(21, E, dtype=torch.float64).relu()
    on[3] = 0
    on[5] = torch.eye(E, dtype=torch.float64)[2]  # p = 1
    mask = torch.arange(21) % 5 != 2 if masked else torch.ones(21, dtype=torch.bool)
    before = on.clone()
    terms = []
    ends = [0, 21] if documents is None else documents.tolist()
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        for first in range(start, end, chunk):
            for e in range(E):
                silent = 1.0
                for t in range(first, min(first + chunk, end)):
                    p = on[t, e].item() / (on[t].sum().item() + 1e-5) if mask[t] else 0.0
                    silent *= 1 - p + 1e-5
                terms.append(1 - silent)
    loss = chunk_sparsity_loss(on, chunk, documents, mask)
    assert abs(loss.item() - sum(terms) / len(terms)) <= 1e-6
    assert torch.equal(on, before)


def test_chunk_sparsity_loss_is_a_share():
    assert gradcheck(lambda on: chunk_sparsity_loss(on, 3), torch.rand(7, E, dtype=torch.float64).requires_grad_())
    assert abs(chunk_sparsity_loss(torch.zeros(16, E), 8).item()) <= 1e-4
    one_each = chunk_sparsity_loss(torch.eye(E).repeat(3, 1), 15)
    assert 0.99 < one_each <= 1
    assert 0 < chunk_sparsity_loss(torch.rand(64, E), 8) <= 1


def test_losses_in_training_only():
    router, x = ReLUNormRouter(H, E, al_coef=0.5, cs_coef=2.0, chunk=8), torch.randn(21, H)
    torch.nn.init.uniform_(router.gain, 0.5, 2)  # which is no part of the losses
    context = RouterContext(cu_seqlens=DOCUMENTS, mask=torch.arange(21) > 1)
    routing = router(x, context)
    on = routing.logits.relu()
    expected = {
        "al": 0.5 * activation_locality_loss(routing.logits, DOCUMENTS, context.mask),
        "cs": 2 * chunk_sparsity_loss(on, 8, DOCUMENTS, context.mask),
    }
    torch.testing.assert_close(routing.losses, expected)
    as_numbers = replace(context, mask=context.mask.long()[None])  # as tokenizers give it
    torch.testing.assert_close(router(x, as_numbers).losses, expected)
    router.al_coef = 0.0
    assert list(router(x).losses) == ["cs"]
    assert router.eval()(x).losses == {}


@pytest.mark.parametrize("T", (0, 1))
def test_few_tokens(T):
    router, x = ReLUNormRouter(H, E), torch.randn(T, H, requires_grad=True)
    routing = router(x)
    sum(routing.losses.values(), routing.weights.sum()).backward()
    assert routing.ids.shape == (T, E) and x.grad.isfinite().all() and routing.losses["al"] == 0


def test_bfloat16_computes_in_float32():
    router, x = ReLUNormRouter(H, E).bfloat16(), torch.randn(9, H).bfloat16()
    routing = router(x)
    assert routing.weights.dtype == routing.logits.dtype == torch.float32
    wide = ReLUNormRouter(H, E)
    wide.load_state_dict(router.float().state_dict())
    torch.testing.assert_close(routing.weights, wide(x.float()).weights, rtol=0.02, atol=0.02)


def test_compile():
    torch._dynamo.reset()
    router = ReLUNormRouter(H, E)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (21, 40):
        x = torch.randn(T, H)
        context = RouterContext(cu_seqlens=torch.tensor([0, 9, T]))
        got, expected = compiled(x, context), router(x, context)
        assert torch.equal(got.ids, expected.ids)
        torch.testing.assert_close(got.losses, expected.losses)


def test_state_dict_and_repr():
    router = ReLUNormRouter(H, E)
    assert list(router.state_dict()) == ["weight", "gain"] and router.gain.tolist() == [1.0] * E
    assert repr(router) == "ReLUNormRouter(hidden=12, num_experts=5, al_coef=0.002, cs_coef=0.05, chunk=64)"


@pytest.mark.parametrize(
    "options,message",
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"al_steep": 0.0}, "al_steep must be positive, got 0.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ReLUNormRouter(**({"hidden": H, "num_experts": E} | options))
