import pytest
import torch

from moert import RouterContext
from moert.routers import DepthRouter, TokenDepthRouter, update_expert_bias_
from moert.testing import OperatorsRan

H = 12


def sequences(B, S):
    return torch.arange(B + 1, dtype=torch.int32) * S


def naive_choice(r, S, k, mask=None):
    """By Python's sort, sequence by sequence: the chosen tokens of all."""
    chosen = set()
    for start in range(0, len(r), S):
        tokens = [t for t in range(start, start + S) if mask is None or mask[t]]
        chosen |= set(sorted(tokens, key=lambda t: (-r[t].item(), t))[:k])
    return torch.tensor([t in chosen for t in range(len(r))])


@pytest.mark.parametrize("S,k,capacity", ((8, 1, 0.125), (13, 3, 0.29), (10, 10, 1.0), (5, 1, 0.01)))
@pytest.mark.parametrize("masked", (False, True))
def test_each_sequence_keeps_its_best(S, k, capacity, masked):
    router, x = DepthRouter(H, capacity), torch.randn(4 * S, H)
    mask = torch.rand(4 * S) > 0.6 if masked else None
    routing = router(x, RouterContext(cu_seqlens=sequences(4, S), mask=mask))
    assert router.limit(S) == k
    assert torch.equal(routing.ids[:, 0] == 0, naive_choice(x @ router.weight[0].detach(), S, k, mask))


@pytest.mark.parametrize("gate,rows", (("raw", 1), ("sigmoid", 1), ("softmax2", 2)))
def test_gates(gate, rows):
    router, x = DepthRouter(H, 0.5, gate, alpha=0.1 if gate == "sigmoid" else 1.0), torch.randn(6, H)
    assert router.weight.shape == (rows, H)
    scores = x @ router.weight.T
    expected = {
        "raw": lambda: scores,
        "sigmoid": lambda: 0.1 / (1 + (-scores).exp()),
        "softmax2": lambda: scores.softmax(-1)[:, 1:],
    }[gate]()
    torch.testing.assert_close(router(x).weights, expected)


def test_defaults():
    router = DepthRouter(H)
    assert (router.capacity, router.gate, router.aid, router.threshold) == (0.125, "raw", "predictor", 0.5)
    assert router.predictor.up.weight.shape == (H // 2, H) and abs(DepthRouter(4000).weight.std() - 0.02) < 0.002
    assert DepthRouter(H, hidden_predictor=5).predictor.up.weight.shape == (5, H)


def test_no_product_is_rounded_down():
    assert [DepthRouter(H, c).limit(100) for c in (0.29, 0.57, 0.58, 2 / 3, 0.07)] == [29, 57, 58, 66, 7]


def test_capacity_warms_up_by_a_cosine():
    router = DepthRouter(H, 0.2, warmup=8)
    assert [round(router.share(step), 6) for step in (0, 4, 8, 9, None)] == [1.0, 0.6, 0.2, 0.2, 0.2]
    routing = router(torch.randn(20, H), RouterContext(step=4, cu_seqlens=sequences(2, 10)))
    assert (routing.ids == 0).sum() == 12 and router(torch.randn(20, H), RouterContext(step=0)).ids.sum() == 0
    assert router.eval().limit(10, 0) == 2


def test_stochastic_control_ignores_the_tokens():
    router, x = DepthRouter(H, 0.5, causal="none", stochastic=True), torch.randn(400, H)
    first, second = router(x), router(x)
    assert not torch.equal(first.ids, second.ids) and (first.ids == 0).sum() == 200
    assert abs(first.logits.std() - 1) < 0.2 and not first.losses


def test_z_loss():
    routing = DepthRouter(H, 0.5, z_coef=0.1)(torch.randn(9, H), RouterContext(mask=torch.arange(9) < 4))
    torch.testing.assert_close(routing.losses["z"], 0.1 * routing.logits[:4].square().mean())


def test_predictor_learns_without_touching_the_model():
    router, x = DepthRouter(H, 0.5), torch.randn(10, H, requires_grad=True)
    loss = router(x).losses["depth_bce"]
    loss.backward()
    assert x.grad is None and router.weight.grad is None
    assert all(p.grad.abs().sum() > 0 for p in router.predictor.parameters())
    ids = router(x).ids[:, 0]
    p = router.predictor(x.detach())[:, 0].sigmoid()
    expected = -torch.where(ids == 0, p, 1 - p).log().mean()
    torch.testing.assert_close(loss, expected)


def test_aux_loss_reaches_the_router_and_counts_the_mask_only():
    router, x = DepthRouter(H, 0.5, causal="aux", loss_coef=0.001), torch.randn(10, H)
    mask = torch.arange(10) < 7
    routing = router(x, RouterContext(mask=mask))
    p = routing.logits[:7, 0].sigmoid()
    expected = -0.001 * torch.where(routing.ids[:7, 0] == 0, p, 1 - p).log().mean()
    torch.testing.assert_close(routing.losses["depth_bce"], expected)
    routing.losses["depth_bce"].backward()
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("causal", ("predictor", "aux"))
def test_threshold_is_causal_and_top_k_is_not(causal):
    router, x = DepthRouter(H, 0.5, causal=causal).causal_(), torch.randn(16, H)
    other = x.clone()
    other[9:] = torch.randn(7, H) * 9
    assert torch.equal(router(x).ids[:9], router(other).ids[:9])
    router.causal_(False)
    # The counter-example that makes a predictor necessary: later tokens with larger scores take an earlier one's place.
    other[9:] = router.weight[0].detach() * 1e3
    assert not torch.equal(router(x).ids[:9], router(other).ids[:9])


@pytest.mark.parametrize("causal", ("predictor", "aux"))
def test_a_token_passes_above_the_threshold(causal):
    x = torch.randn(60, H)
    routers = [DepthRouter(H, causal=causal, threshold=t).causal_() for t in (0.5, 0.52, 0.3)]
    for router in routers:
        router.load_state_dict(routers[0].state_dict())
        p = (router.predictor(x) if causal == "predictor" else x @ router.weight.T).sigmoid()[:, 0]
        assert torch.equal(router(x).ids[:, 0] == 0, p > router.threshold)
    assert len({int(router(x).ids.sum()) for router in routers}) == 3


def test_evaluation_has_no_losses_and_masked_tokens_never_pass():
    router, x = DepthRouter(H, 1.0).eval(), torch.randn(6, H)
    mask = torch.tensor([True, False] * 3)
    for causal in (False, True):
        routing = router.causal_(causal)(x, RouterContext(mask=mask))
        assert not routing.losses and (routing.ids[~mask] == 1).all()
    assert not router.train()(x).losses  # what a token decides alone is no target for itself


def test_empty_bf16_bias_compile_and_state():
    assert DepthRouter(H)(torch.zeros(0, H)).ids.shape == (0, 1)
    router = DepthRouter(H, 0.5, logit_bias=True).bfloat16()
    routing = router(torch.randn(8, H).bfloat16())
    assert routing.weights.dtype == torch.float32 and (routing.ids == 0).sum() == 4
    shifted = router(torch.zeros(8, H).bfloat16(), RouterContext(logit_bias=torch.ones(1)))
    assert torch.equal(shifted.weights, torch.ones(8, 1))
    other = DepthRouter(H, 0.5, logit_bias=True).bfloat16()
    other.load_state_dict(router.state_dict())
    x = torch.randn(8, H).bfloat16()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x).ids, router(x).ids)


def test_operators_that_run():
    with OperatorsRan() as ran:
        DepthRouter(H)(torch.randn(9, H))
        TokenDepthRouter(H, 3)(torch.randn(9, H))
    assert ran.names == ["expert_choice", "topk_gating"]


def test_depths_are_the_best_score():
    router, x = TokenDepthRouter(H, 3, alpha=0.5), torch.randn(20, H)
    routing = router(x)
    p = (x @ router.weight.T).softmax(-1)
    assert torch.equal(routing.ids[:, 0].long(), p.argmax(-1))
    torch.testing.assert_close(routing.weights[:, 0], 0.5 * p.amax(-1))
    f = torch.bincount(routing.ids[:, 0].long(), minlength=3) / 20
    torch.testing.assert_close(routing.losses["balance"], 0.1 * 3 * (f * p.mean(0)).sum())


def test_bias_balances_depths_without_a_loss():
    router = TokenDepthRouter(H, 3, balance="bias")
    with torch.no_grad():
        router.weight[0] += 0.05  # skewed towards depth 0
    generator = torch.Generator().manual_seed(1)
    for _ in range(500):
        routing = router(torch.randn(96, H, generator=generator) + 0.5)
        assert not routing.losses
        update_expert_bias_(router.expert_bias, routing)
    ids = router(torch.randn(3000, H, generator=generator) + 0.5).ids[:, 0].long()
    load = torch.bincount(ids, minlength=3) / 3000
    assert load.min() >= 0.2 and load.max() <= 0.47


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: DepthRouter(H, 0.0), r"capacity must be in \(0, 1\], got 0.0"),
        (lambda: DepthRouter(H, 1.5), r"capacity must be in \(0, 1\], got 1.5"),
        (lambda: DepthRouter(H, gate="tanh"), "gate must be one of raw, sigmoid, softmax2, got tanh"),
        (lambda: DepthRouter(H, causal="yes"), "causal must be predictor, aux or none, got yes"),
        (lambda: DepthRouter(H, warmup=-1), "warmup must be at least 0, got -1"),
        (lambda: DepthRouter(H, threshold=1.0), r"threshold must be in \(0, 1\), got 1.0"),
        (lambda: DepthRouter(H, causal="none").causal_(), "causal must be predictor or aux for causal_, got none"),
        (lambda: TokenDepthRouter(H, 3, "relu"), "score must be softmax or sigmoid, got relu"),
        (lambda: TokenDepthRouter(H, 3, balance="hope"), "balance must be loss or bias, got hope"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
