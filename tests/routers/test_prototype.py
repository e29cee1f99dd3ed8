import math

import pytest
import torch

from moert import GluExperts, MoELayer, RouterContext
from moert.layers import FeedForward
from moert.routers import PrototypeRouter
from moert.testing import OperatorsRan

H, N = 16, 6


def conditional(T, every=3):
    return torch.arange(T) % every != 0


@pytest.mark.parametrize("k", (1, 2))
@pytest.mark.parametrize("score", ("identity", "sigmoid", "softmax"))
def test_routing_against_a_loop_in_float64(score, k):
    router, x, cond = PrototypeRouter(H, N, k, score), torch.randn(60, H), conditional(60)
    routing = router(x, RouterContext(conditional=cond))
    assert routing.num_experts == N + 1
    for t in range(60):
        if not cond[t]:
            assert routing.ids[t].tolist() == [N] + [N + 1] * (k - 1)
            assert routing.weights[t].tolist() == [1.0] + [0.0] * (k - 1)
            continue
        c, token = router.prototypes.double(), x[t].double()
        cos = torch.stack([token @ row / (token.norm() * row.norm()) for row in c])
        g = {"identity": cos, "sigmoid": 1 / (1 + (-cos).exp()), "softmax": cos.softmax(-1)}[score]
        ids = cos.sort(descending=True, stable=True).indices[:k]
        assert torch.equal(routing.ids[t].long(), ids)
        torch.testing.assert_close(routing.weights[t].double(), g[ids], rtol=0, atol=1e-6)
    assert routing.weights.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("k", (1, 2))
def test_layer_against_a_loop(k):
    layer = MoELayer(
        PrototypeRouter(H, N, k),
        GluExperts(N + 1, H, 2 * H, "gelu_tanh", bias=True),
        FeedForward(H, 2 * H, "gelu_tanh", True),
    )
    x, context = torch.randn(30, H), RouterContext(conditional=conditional(30))
    with OperatorsRan() as ran:
        y, routing = layer.forward_with_routing(x, context)
    assert ran.names == ["topk_gating", "fused_experts"]
    e, rows = layer.experts, []
    for t in range(30):
        row = layer.shared_experts(x[t])
        for i, w in zip(routing.ids[t].tolist(), routing.weights[t], strict=True):
            if i <= N:
                h = torch.nn.functional.gelu(e.gate_up_proj[i] @ x[t] + e.gate_up_proj_bias[i], approximate="tanh")
                row = row + w * (e.down_proj[i] @ h + e.down_proj_bias[i])
        rows.append(row)
    torch.testing.assert_close(y, torch.stack(rows), rtol=0, atol=1e-5)
    # Only the unconditional half knows the last expert.
    with torch.no_grad():
        e.down_proj[N] += 1
    same = (layer(x, context) == y).all(-1)
    assert torch.equal(same, conditional(30))


def test_defaults():
    router = PrototypeRouter(64, 200)
    assert (router.k, router.score, router.mode, router.uncond_expert) == (1, "identity", "token", True)
    assert (router.rcl_coef, router.rcl_tau, router.rcl_topk) == (1.0, 0.07, True)
    assert abs(router.prototypes.std() - 0.02) < 1e-3 and abs(router.prototypes.mean()) < 1e-3


def test_lengths_do_not_count():
    router, x = PrototypeRouter(H, N, 2, uncond_expert=False), torch.randn(40, H)
    before = router(x)
    with torch.no_grad():
        router.prototypes[3] *= 7
    after = router(5 * x)
    assert torch.equal(before.ids, after.ids)
    torch.testing.assert_close(before.weights, after.weights, rtol=0, atol=1e-6)
    zero = router(torch.zeros(1, H))
    assert zero.ids.tolist() == [[0, 1]] and zero.weights.tolist() == [[0, 0]]


def test_contrastive_loss_at_known_points():
    V = 12
    router = PrototypeRouter(V, V, uncond_expert=False)
    router.prototypes.data = torch.eye(V)
    got = router(3 * torch.eye(V)).losses["rcl"]
    torch.testing.assert_close(got, torch.tensor(math.log1p((V - 1) * math.exp(-1 / 0.07))), rtol=0, atol=1e-6)
    # The means are the same where every token chooses every expert.
    alike = PrototypeRouter(V, V, k=V, uncond_expert=False, rcl_coef=2.0)
    torch.testing.assert_close(alike(torch.randn(5, V)).losses["rcl"], torch.tensor(2 * math.log(V)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode,experts", (("token", 4), ("expert", 4), ("token", 40)))
def test_contrastive_loss_against_a_loop_and_finite_differences(mode, experts):
    router = PrototypeRouter(5, experts, 2, mode=mode, dtype=torch.float64)  # of 40 some have no token
    router.prototypes.data.normal_()
    x, cond = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) < 9
    context = RouterContext(conditional=cond, cu_seqlens=torch.tensor([0, 4, 9, 12]))
    routing = router(x, context)
    samples = [range(9)] if mode == "token" else [range(4), range(4, 9)]  # the last sample has no label
    total = 0
    for sample in samples:
        members = {e: [t for t in sample if e in routing.ids[t].tolist()] for e in range(experts)}
        used = [e for e in range(experts) if members[e]]
        assert (len(used) < experts) == (experts == 40)
        for e in used:
            s = [torch.cosine_similarity(router.prototypes[e], x[members[f]].mean(0), 0) / 0.07 for f in used]
            total = total + (torch.stack(s).logsumexp(0) - s[used.index(e)]) / len(used) / len(samples)
    torch.testing.assert_close(routing.losses["rcl"], total)

    def loss(x, prototypes):
        return torch.func.functional_call(router, {"prototypes": prototypes}, (x, context)).losses["rcl"]

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), router.prototypes))


def test_the_loss_may_count_the_first_choice_alone():
    one, two, both = PrototypeRouter(H, N), PrototypeRouter(H, N, 2, rcl_topk=False), PrototypeRouter(H, N, 2)
    two.prototypes = both.prototypes = one.prototypes
    x, context = torch.randn(20, H), RouterContext(conditional=conditional(20))
    one, two, both = (router(x, context).losses["rcl"] for router in (one, two, both))
    torch.testing.assert_close(one, two)
    assert (both - one).abs() > 1e-3


def test_contrastive_loss_without_partners_is_zero_and_connected():
    router, x = PrototypeRouter(H, N), torch.randn(8, H)
    for cond in (torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)):
        same = x[:1].expand(8, H)
        routing = router(same, RouterContext(conditional=cond))
        assert routing.losses["rcl"] == 0
        (grad,) = torch.autograd.grad(routing.losses["rcl"] + 0 * routing.weights.sum(), router.prototypes)
        assert (grad == 0).all()
    layer = MoELayer(router, GluExperts(N + 1, H, 8))
    layer(x, RouterContext(conditional=torch.zeros(8, dtype=torch.bool))).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert layer.experts.down_proj.grad[:N].abs().sum() == 0
    assert not router.eval()(x, RouterContext(conditional=conditional(8))).losses


def test_tokens_can_be_left_out_of_the_loss_and_of_its_gradient():
    x, cond, mask = torch.randn(9, H, requires_grad=True), torch.ones(9, dtype=torch.bool), torch.arange(9) < 6
    router = PrototypeRouter(H, N, rcl_detach_tokens=True)
    loss = router(x, RouterContext(conditional=cond)).losses["rcl"]
    assert torch.autograd.grad(loss, x, allow_unused=True)[0] is None
    part = PrototypeRouter(H, N)
    part.prototypes = router.prototypes
    padded = part(x, RouterContext(conditional=cond, mask=mask)).losses["rcl"]
    torch.testing.assert_close(padded, part(x[:6], RouterContext(conditional=cond[:6])).losses["rcl"])


@pytest.mark.parametrize("k", (1, 2))
def test_every_expert_takes_its_share_of_every_sample(k):
    router, T = PrototypeRouter(H, N, k, mode="expert"), 45
    bounds, cond = [0, 20, 23, 38, 45], torch.arange(T) < 38
    context = RouterContext(conditional=cond, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    with OperatorsRan() as ran:
        ids = router(torch.randn(T, H), context).ids
    assert "expert_choice" in ran.names
    for first, last in zip(bounds[:3], bounds[1:4], strict=True):
        load = torch.bincount(ids[first:last].flatten().long(), minlength=N + 2)[: N + 1]
        assert load.tolist() == [max(1, (last - first) * k // N)] * N + [0]
    assert (ids[38:, 0] == N).all() and (ids[38:, 1:] == N + 1).all()


@pytest.mark.parametrize("mode", ("token", "expert"))
def test_bfloat16_compile_state_and_no_tokens(mode):
    layer = MoELayer(PrototypeRouter(H, N, mode=mode), GluExperts(N + 1, H, 8)).bfloat16()
    assert layer.router.prototypes.dtype == torch.float32
    x = torch.randn(9, H, dtype=torch.bfloat16)
    context = RouterContext(conditional=conditional(9), cu_seqlens=torch.tensor([0, 5, 9]))
    y = layer(x, context)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, context), y)
    other = MoELayer(PrototypeRouter(H, N, mode=mode), GluExperts(N + 1, H, 8)).bfloat16()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, context), y)
    routing = layer.router(x[:0], RouterContext(conditional=torch.zeros(0, dtype=torch.bool)))
    assert routing.ids.shape == (0, 1 if mode == "token" else N) and routing.losses["rcl"] == 0


@pytest.mark.parametrize(
    "options,message",
    [
        ({"k": 7}, r"k must be in \[1, num_routed=6\], got 7"),
        ({"score": "relu"}, "score must be identity, sigmoid or softmax, got relu"),
        ({"mode": "both"}, "mode must be token or expert, got both"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        PrototypeRouter(H, N, **options)
    with pytest.raises(ValueError, match="context.conditional must be given with uncond_expert, got None"):
        PrototypeRouter(H, N)(torch.randn(3, H))
