import math

import pytest
import torch
from tests.decode.models import SIZES, greedy, llama, mixtral
from transformers import DynamicCache, Qwen2MoeConfig, Qwen2MoeForCausalLM

import moert.integrations.transformers  # noqa: F401
from moert import GluExperts, MoELayer, RouterContext
from moert.decode import contrast_logits, self_contrast
from moert.decode.cached import holding
from moert.decode.self_contrast import TwoRoutings
from moert.integrations.transformers.routers import use_routers_
from moert.routers import PrototypeRouter, given_context, routers_in
from moert.testing import OperatorsRan

PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def model():
    moe = mixtral(initializer_range=0.2)
    moe.set_experts_implementation("moert")
    use_routers_(moe)
    return moe.double()


def test_contrast_logits():
    z_s, z_w = torch.randn(5, 30) * 2, torch.randn(5, 30) * 2
    z = contrast_logits(z_s, z_w, 0.2, 0.7)
    for row in range(5):
        best = max(z_s[row].tolist())
        for i in range(30):
            s, w = z_s[row, i].item(), z_w[row, i].item()
            expected = 1.7 * s - 0.7 * w if s >= math.log(0.2) + best else -math.inf
            assert z[row, i].item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(contrast_logits(z_s, z_w), contrast_logits(z_s, z_w, 0.1, 0.5))
    assert z.gather(1, z_s.argmax(-1, keepdim=True)).isfinite().all()
    moved = contrast_logits(z_s + 3, z_w - 5, 0.2, 0.7)
    assert torch.equal(moved.argmax(-1), z.argmax(-1))
    torch.testing.assert_close(moved.softmax(-1), z.softmax(-1), rtol=1e-4, atol=1e-6)


def test_weak_logits_that_are_not_finite():
    z_s, z_w = torch.randn(2, 6), torch.randn(2, 6)
    z_w[1, 3] = torch.nan
    assert torch.equal(contrast_logits(z_s, z_w)[1], contrast_logits(z_s, torch.zeros(2, 6), beta=0.0)[1])


@pytest.mark.parametrize("options", ({"beta": 0.0}, {"alpha": 1.0, "beta": 0.9}), ids=("beta0", "alpha1"))
def test_without_contrast_it_is_greedy(options):
    moe = model()
    with OperatorsRan() as ran:
        out = self_contrast(moe, PROMPT, max_new_tokens=64, **options)
    assert torch.equal(out.tokens, greedy(moe, PROMPT, 64)) and out.fallbacks == 0
    assert ran.names[:4] == ["topk_gating", "fused_experts"] * 2


def test_one_batched_pass_is_two_passes():
    moe, steps = model(), torch.randint(50, (2, 32))
    both, cache = TwoRoutings(moe, None, (2,)), DynamicCache(config=moe.config)
    apart = [((1, 2), DynamicCache(config=moe.config)), ((2,), DynamicCache(config=moe.config))]
    new, mask = PROMPT, torch.ones_like(PROMPT)
    for step in range(33):
        got = both.logits(new, mask, cache)
        for logits, (ranks, own) in zip(got, apart, strict=True):
            with given_context(moe, RouterContext(ranks=(ranks,))), torch.no_grad():
                expected = moe(new, **holding(moe, own)).logits[:, -1]
            assert (logits - expected).abs().max() <= 1e-5
        if step == 0:
            assert (got[0] - got[1]).abs().max() > 1e-3  # the weak pass is another one
        new = steps[:, min(step, 31) :][:, :1]
        mask = torch.cat([mask, torch.ones_like(new)], 1)


def test_rows_without_usable_weak_logits_are_counted(monkeypatch):
    moe, logits = model(), TwoRoutings.logits

    def overflowing(self, ids, mask, cache):
        z_s, z_w = logits(self, ids, mask, cache)
        z_w[1, 7] = torch.inf
        return z_s, z_w

    monkeypatch.setattr(TwoRoutings, "logits", overflowing)
    out = self_contrast(moe, PROMPT, max_new_tokens=6, beta=0.9)
    assert out.fallbacks == 6
    assert torch.equal(out.tokens[1:], greedy(moe, PROMPT[1:], 6))  # its beta is 0
    eos = out.tokens[1, 7].item()
    until = out.tokens[1, 5:].tolist().index(eos) + 1
    assert self_contrast(moe, PROMPT, max_new_tokens=6, beta=0.9, eos=eos).fallbacks == until < 6


def test_a_model_of_one_expert_a_token():
    moe = mixtral(initializer_range=0.2, num_experts_per_tok=1)
    moe.set_experts_implementation("moert")
    use_routers_(moe)
    strong, weak = TwoRoutings(moe, None, (2,)).logits(PROMPT, torch.ones_like(PROMPT), DynamicCache(config=moe.config))
    assert (strong - weak).abs().max() > 1e-3
    torch.testing.assert_close(strong, moe(PROMPT, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-5)


def test_weights_of_the_ranks_may_be_renormalised_against_the_routers_rule():
    moe = model()
    for router in routers_in(moe).values():
        router.renormalize = False
    both = (TwoRoutings(moe, (1, 2), (2,), renormalize) for renormalize in (None, True))
    mask = torch.ones_like(PROMPT)
    plain, ones = (each.logits(PROMPT, mask, DynamicCache(config=moe.config)) for each in both)
    with torch.no_grad(), given_context(moe, RouterContext(ranks=((2,),), renormalize=True)):
        assert (moe(PROMPT, use_cache=False).logits[:, -1] - ones[1]).abs().max() <= 1e-5
    assert (plain[0] - ones[0]).abs().max() > 1e-3 and (plain[1] - ones[1]).abs().max() > 1e-3
    options = {"max_new_tokens": 8, "beta": 0.9}
    given = self_contrast(moe, PROMPT, renormalize=True, **options).tokens
    for router in routers_in(moe).values():
        router.renormalize = True
    assert torch.equal(self_contrast(moe, PROMPT, **options).tokens, given)


def test_shared_experts_stay_on_in_both_passes():
    sizes = SIZES | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "initializer_range": 0.2}
    moe = Qwen2MoeForCausalLM(Qwen2MoeConfig(shared_expert_intermediate_size=24, **sizes)).eval()
    moe.set_experts_implementation("moert")
    use_routers_(moe)
    moe = moe.double()
    rows = []
    for layer in moe.model.layers:
        layer.mlp.shared_expert.register_forward_hook(lambda _, args, out: rows.append(out.reshape(-1, 64).shape[0]))
    both = TwoRoutings(moe, None, (2,))
    strong, weak = both.logits(PROMPT, torch.ones_like(PROMPT), DynamicCache(config=moe.config))
    assert rows == [2 * PROMPT.numel()] * 2
    with torch.no_grad():
        assert (strong - moe(PROMPT, use_cache=False).logits[:, -1]).abs().max() <= 1e-5
        with given_context(moe, RouterContext(ranks=((2,),))):
            assert (weak - moe(PROMPT, use_cache=False).logits[:, -1]).abs().max() <= 1e-5
    assert (strong - weak).abs().max() > 1e-3


def test_left_padding():
    moe = model()
    alone = self_contrast(moe, PROMPT[:1], max_new_tokens=10).tokens[0, 5:]
    padded = torch.tensor([[0, 0, 0, 3, 1, 4, 1, 5], [7, 7, 8, 9, 2, 6, 5, 3]])
    seen = []
    moe.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["position_ids"][0]), with_kwargs=True)
    out = self_contrast(moe, padded, attention_mask=(torch.arange(16).view(2, 8) > 2).long(), max_new_tokens=10)
    assert torch.equal(out.tokens[0, 8:], alone)
    assert [at.tolist() for at in seen[:3]] == [[0, 0, 0, 0, 1, 2, 3, 4], [5], [6]]


def test_eos_stopping_and_sampling():
    moe = model()
    tokens = self_contrast(moe, PROMPT, max_new_tokens=12).tokens
    eos = tokens[0, 8].item()
    ended = self_contrast(moe, PROMPT, max_new_tokens=12, eos=eos, pad=49).tokens
    first = tokens[0, 5:].tolist().index(eos)
    assert ended[0, 5 : 6 + first].tolist() == tokens[0, 5 : 6 + first].tolist()
    assert (ended[0, 6 + first :] == 49).all()
    alone = self_contrast(moe, PROMPT[:1], max_new_tokens=12, eos=eos).tokens
    assert alone.shape == (1, 6 + first)  # where all are done nothing more comes
    assert self_contrast(moe, PROMPT, max_new_tokens=12, stopping=lambda t: t.shape[1] == 8).tokens.shape == (2, 8)
    one, two = (
        self_contrast(moe, PROMPT, do_sample=True, max_new_tokens=9, generator=torch.Generator().manual_seed(1)).tokens
        for _ in range(2)
    )
    assert torch.equal(one, two)


def test_temperatures_come_before_the_contrast():
    moe = model()
    both, cache = TwoRoutings(moe, None, (2,)), DynamicCache(config=moe.config)
    z_s, z_w = both.logits(PROMPT, torch.ones_like(PROMPT), cache)
    options = {"beta": 0.9, "temps": (3.0, 0.5), "max_new_tokens": 1}
    z = contrast_logits(z_s / 3, z_w / 0.5, 0.1, 0.9)
    assert torch.equal(self_contrast(moe, PROMPT, **options).tokens[:, -1], z.argmax(-1))
    assert not torch.equal(z.argmax(-1), contrast_logits(z_s, z_w, 0.1, 0.9).argmax(-1))
    drawn = self_contrast(moe, PROMPT, do_sample=True, generator=torch.Generator().manual_seed(5), **options)
    expected = torch.multinomial(z.softmax(-1), 1, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn.tokens[:, -1:], expected)


def test_errors():
    z = torch.zeros(1, 3)
    for alpha in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"alpha must be in \(0, 1\], got {alpha}"):
            contrast_logits(z, z, alpha)
    with pytest.raises(ValueError, match="beta must not be negative, got -1"):
        contrast_logits(z, z, beta=-1)
    with pytest.raises(ValueError, match=r"ranks must be in \[1, 8\], got 9"):
        self_contrast(model(), PROMPT, weak_ranks=(9,), max_new_tokens=1)
    other = llama()
    other.model.layers[1].mlp = MoELayer(PrototypeRouter(64, 4, uncond_expert=False), GluExperts(4, 64, 8))
    message = r"model must have routers that read ranks, got PrototypeRouter \(model.layers.1.mlp.router\)"
    with pytest.raises(ValueError, match=message):
        self_contrast(other, PROMPT, max_new_tokens=1)
    with pytest.raises(ValueError, match="model must have moert routers with a k, got none"):
        self_contrast(llama(), PROMPT, max_new_tokens=1)
