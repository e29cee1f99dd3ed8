import pytest
import torch
import torch.nn.functional as F
from tests.decode.models import greedy, mixtral
from torch import nn
from transformers import DynamicCache

from moert.decode import RouterAdapter, rewire
from moert.decode.cached import holding
from moert.integrations.transformers.routers import use_routers_
from moert.routers import routers_in
from moert.testing import OperatorsRan

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def model():
    moe = mixtral(initializer_range=0.2)
    moe.set_experts_implementation("moert")
    use_routers_(moe)
    for router in routers_in(moe).values():
        nn.init.normal_(router.weight, std=0.3)
    return moe.double()


def adapter(moe, **options):
    return RouterAdapter(moe, tuple(routers_in(moe)), **({"steps": 3, "interval": 4} | options))


def test_as_without_a_cache():
    """Every token from a whole forward pass under the routing of its time."""
    moe = model()
    out = rewire(adapter(moe), PROMPT, 10)
    assert len(out.reports) == 3 and out.tokens.shape == (2, 18)
    by_hand, tokens = adapter(moe), PROMPT
    with by_hand.session(), torch.no_grad():
        for step in range(10):
            if step in (0, 4, 8):
                report = by_hand.adapt(tokens)
                assert torch.allclose(report.loss_after, out.reports[step // 4].loss_after, rtol=1e-4)
            tokens = torch.cat([tokens, moe(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out.tokens, tokens)
    assert not torch.equal(out.tokens, greedy(moe, PROMPT, 10))  # and the deltas matter


def test_without_steps_it_is_greedy_and_the_model_is_as_before():
    moe = model()
    before = {name: p.clone() for name, p in moe.named_parameters()}
    plain = moe(PROMPT, use_cache=False).logits
    with OperatorsRan() as ran:
        assert torch.equal(rewire(adapter(moe, steps=0), PROMPT, 9).tokens, greedy(moe, PROMPT, 9))
    assert set(ran.names) == {"topk_gating", "fused_experts"}
    rewire(adapter(moe), PROMPT, 5)
    assert torch.equal(moe(PROMPT, use_cache=False).logits, plain)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in moe.named_parameters())


def test_sequences_do_not_notice_each_other():
    moe = model()
    together = rewire(adapter(moe), PROMPT, 7).tokens
    for row in range(2):
        assert torch.equal(together[row : row + 1], rewire(adapter(moe), PROMPT[row : row + 1], 7).tokens)


def test_a_prefix_stays_as_it_was():
    """The loss of the last tokens with those before them in view, whose keys and values do not change."""
    moe = model()
    prefix = DynamicCache(config=moe.config)
    with torch.no_grad():
        moe(PROMPT[:, :3], **holding(moe, prefix))
        logits = moe(PROMPT, use_cache=False).logits[:, 3:-1].float()
    keys = [layer.keys.clone() for layer in prefix.layers]
    report = adapter(moe).adapt(PROMPT[:, 3:], cache=prefix)
    expected = F.cross_entropy(logits.transpose(1, 2), PROMPT[:, 4:], reduction="none").mean(-1)
    torch.testing.assert_close(report.loss_before, expected)
    assert (report.loss_after < report.loss_before).all()
    assert all(torch.equal(layer.keys, k) for layer, k in zip(prefix.layers, keys, strict=True))


def test_max_context_looks_at_the_last_tokens():
    moe = model()
    widths = []
    moe.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append((kwargs["input_ids"].shape[1], torch.is_grad_enabled())), with_kwargs=True
    )
    out = rewire(adapter(moe, max_context=6, steps=2), PROMPT, 6)
    assert out.tokens.shape == (2, 14) and len(out.reports) == 2
    adapting = [(6, False), (6, True), (6, True), (6, False)]  # look, two steps, look
    assert widths[:6] == [(2, False), *adapting, (6, False)]  # the prefix first, the window again at the end
    assert widths[6:9] == [(1, False)] * 3 and widths[9:14] == [*adapting, (6, False)]


def test_eos_sampling_and_short_prompts():
    moe = model()
    tokens = rewire(adapter(moe), PROMPT, 8).tokens
    eos = tokens[0, 10].item()
    ended = rewire(adapter(moe), PROMPT, 8, eos=eos, pad=49).tokens
    first = tokens[0, 8:].tolist().index(eos)
    assert torch.equal(ended[0, : 9 + first], tokens[0, : 9 + first]) and (ended[0, 9 + first :] == 49).all()
    one, two = (
        rewire(adapter(moe), PROMPT, 6, temperature=0.7, generator=torch.Generator().manual_seed(1)).tokens
        for _ in range(2)
    )
    assert torch.equal(one, two)
    short = rewire(adapter(moe), PROMPT[:, :1], 6)
    assert len(short.reports) == 1  # nothing to learn from one token, four later there is


def test_errors():
    with pytest.raises(ValueError, match="model must have moert routers, got none"):
        rewire(RouterAdapter(mixtral()), PROMPT, 1)
    with pytest.raises(ValueError, match="temperature must not be negative, got -0.5"):
        rewire(adapter(model()), PROMPT, 1, temperature=-0.5)
