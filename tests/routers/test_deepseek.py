import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from moert import GluExperts, MoELayer, RouterContext, Routing
from moert.layers import FeedForward
from moert.routers import DeepSeekRouter, expert_load
from moert.testing import OperatorsRan

E, G, H, k, T = 64, 8, 32, 8, 512


def dense(routing, ids=None, weights=None):
    ids, weights = (routing.ids, routing.weights) if ids is None else (ids, weights)
    return torch.zeros(len(ids), routing.num_experts).scatter(1, ids.long(), weights.float())


def assert_same_choice(routing, ids, weights, scale=1.0):
    """The same sets of experts, and weights to 1e-6 of their scale."""
    assert torch.equal(dense(routing) != 0, dense(routing, ids, weights) != 0)
    torch.testing.assert_close(dense(routing), dense(routing, ids, weights), rtol=0, atol=1e-6 * scale)


def test_v3_chooses_like_transformers():
    config = DeepseekV3Config(
        hidden_size=H, n_routed_experts=E, num_experts_per_tok=k, n_group=G, topk_group=4, routed_scaling_factor=2.5
    )
    theirs, mine = DeepseekV3TopkRouter(config), DeepSeekRouter.v3(H, E, k).eval()
    mine.weight.data.normal_()
    # All choice scores below zero: a group that is masked by 0 instead of -inf would win.
    for shift in (0, -3):
        mine.expert_bias.normal_(std=0.1).add_(shift)
        theirs.load_state_dict({"weight": mine.weight, "e_score_correction_bias": mine.expert_bias})
        x = torch.randn(T, H)
        _, weights, ids = theirs(x)
        assert_same_choice(mine(x), ids, weights)


@pytest.mark.parametrize("grouped", (True, False), ids=("v2", "v1"))
def test_v2_and_v1_choose_like_transformers(grouped):
    kind = (
        {"topk_method": "group_limited_greedy", "n_group": G, "topk_group": 3} if grouped else {"topk_method": "greedy"}
    )
    config = DeepseekV2Config(
        hidden_size=H, n_routed_experts=E, num_experts_per_tok=6, routed_scaling_factor=16.0 if grouped else 1.0,
        **kind,
    )  # fmt: skip
    theirs = DeepseekV2TopkRouter(config)
    mine = (DeepSeekRouter.v2 if grouped else DeepSeekRouter.v1)(H, E, 6).eval()
    mine.weight.data.normal_()
    x = torch.randn(T, H)
    theirs.load_state_dict(mine.state_dict())
    _, weights, ids = theirs(x)
    assert_same_choice(mine(x), ids, weights, mine.scale)
    if grouped:
        assert all(len(set(row)) <= 3 for row in (mine(x).ids // (E // G)).tolist())


def test_the_papers_values():
    v1, v2, v3 = DeepSeekRouter.v1(8), DeepSeekRouter.v2(8), DeepSeekRouter.v3(8)
    assert [(r.num_experts, r.k, r.scale, r.renormalize) for r in (v1, v2, v3)] == [
        (64, 6, 1.0, False), (160, 6, 16.0, False), (256, 8, 2.5, True),
    ]  # fmt: skip
    assert [r.aux_alpha for r in (v1, v2, v3)] == [0.001, 0.003, 1e-4] and {r.aux for r in (v1, v2, v3)} == {"sequence"}
    assert (v2.device_alpha, v2.comm_alpha, v2.num_devices, v2.device_capacity, v2.spared) == (0.05, 0.02, 8, 1.0, 0.1)
    assert v1.groups is None and (v2.groups.num_groups, v2.groups.topk_groups, v2.groups.score) == (8, 3, "max")
    assert (v3.groups.num_groups, v3.groups.topk_groups, v3.groups.score) == (8, 4, "top2")
    assert v1.bias_balance is None is v2.bias_balance and v3.bias_balance == 0.001 and v3.score == "sigmoid"


def test_layer_against_a_dense_loop_over_experts():
    torch.manual_seed(1)
    for shared in (None, FeedForward(H, 24)):
        layer = MoELayer(DeepSeekRouter(H, 16, 4), GluExperts(16, H, 12), shared)
        layer.router.weight.data.normal_()
        x, dy = torch.randn(40, H), torch.randn(40, H)

        def loop(x, layer=layer, shared=shared):
            p = (x @ layer.router.weight.T).softmax(-1)
            y = 0 if shared is None else shared(x)
            for e in range(16):
                gate = torch.where(p[:, e] >= p.topk(4).values[:, -1], p[:, e], 0)
                g, u = (x @ layer.experts.gate_up_proj[e].T).chunk(2, -1)
                y = y + gate[:, None] * ((torch.nn.functional.silu(g) * u) @ layer.experts.down_proj[e].T)
            return y

        torch.testing.assert_close(layer(x), loop(x), rtol=0, atol=1e-5)
        parameters = list(layer.parameters())
        for one, other in zip(
            torch.autograd.grad(layer(x), parameters, dy), torch.autograd.grad(loop(x), parameters, dy), strict=True
        ):
            assert (one - other).norm() <= 1e-4 * other.norm()


def test_finely_segmented_expert_is_the_whole_expert():
    m, I = 4, 16
    whole, parts = GluExperts(1, H, I), GluExperts(m, H, I // m)
    gate, up = whole.gate_up_proj[0].chunk(2)
    with torch.no_grad():
        for i in range(m):
            rows = slice(i * I // m, (i + 1) * I // m)
            parts.gate_up_proj[i] = torch.cat([gate[rows], up[rows]])
            parts.down_proj[i] = whole.down_proj[0][:, rows]
    x, w = torch.randn(9, H), torch.rand(9, 1)
    one = whole(x, Routing(torch.zeros(9, 1, dtype=torch.int32), w, 1))
    four = parts(x, Routing(torch.arange(m).expand(9, m), w.expand(9, m), m))
    torch.testing.assert_close(one, four, rtol=0, atol=1e-5)


def test_bias_balances_a_skewed_gate():
    router = DeepSeekRouter(32, 32, 4, "sigmoid", renorm=True, bias_balance=0.001)
    torch.nn.init.eye_(router.weight.data)
    offsets, excess = torch.randn(32), []
    for _ in range(400):
        with torch.no_grad():
            load = expert_load(router(offsets + 0.7 * torch.randn(2048, 32)))
        router.update_bias()
        excess.append((load.max() / load.double().mean() - 1).item())
    assert excess[0] > 4 and sum(excess[-10:]) / 10 <= 0.3
    routing, bias = router(torch.randn(5, 32)), router.expert_bias.clone()
    chosen = torch.sigmoid(routing.logits).gather(1, routing.ids.long())
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True))
    assert torch.equal(bias, router.expert_bias)  # no forward pass moves it


def test_bias_moves_once_per_step_over_several_forward_passes():
    router = DeepSeekRouter(4, 4, 1, "sigmoid", bias_balance=0.5)
    router.weight.data = torch.eye(4)
    for token in ([3, 0, 0, 0], [3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0]):
        router(torch.tensor([token], dtype=torch.float32))
    router.eval()(torch.full((9, 4), 1.0))  # does not count
    padding = RouterContext(mask=torch.zeros(1, 5, dtype=torch.int64))
    router.train()(torch.randn(5, 4), padding)  # nor does this
    assert router.load.tolist() == [2, 1, 1, 0]
    router.update_bias()
    assert router.expert_bias.tolist() == [-0.5, 0, 0, 0.5] and router.load.sum() == 0
    router.update_bias(torch.tensor([0, 0, 0, 4]))
    assert router.expert_bias.tolist() == [0, 0.5, 0.5, 0]
    assert sorted(router.state_dict()) == ["expert_bias", "weight"]


def loss_by_loop(router, routing, sequences, mask):
    """The sequence loss with loops over sequences and experts."""
    scores = routing.logits.softmax(-1) if router.score == "softmax" else torch.sigmoid(routing.logits)
    scores, total, E = scores / scores.sum(-1, keepdim=True), [], router.num_experts
    for first, last in zip(sequences, sequences[1:], strict=False):
        tokens = [t for t in range(first, last) if mask[t]]
        if tokens:
            f = [
                E / (router.k * len(tokens)) * sum((routing.ids[t] == e).sum().item() for t in tokens) for e in range(E)
            ]
            total.append(sum(f[e] * scores[tokens, e].mean() for e in range(E)))
    return router.aux_alpha * sum(total) / len(total)


@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
def test_sequence_loss_against_a_loop(score):
    router = DeepSeekRouter(8, 8, 2, score, aux="sequence", aux_alpha=0.5)
    router.weight.data.normal_()
    mask = torch.rand(30) > 0.2
    mask[10:17] = False  # a document of padding alone
    routing = router(torch.randn(30, 8), RouterContext(mask=mask, cu_seqlens=torch.tensor([0, 10, 17, 30])))
    torch.testing.assert_close(routing.losses["sequence"], loss_by_loop(router, routing, [0, 10, 17, 30], mask))
    routing.losses["sequence"].backward()
    assert router.weight.grad.norm() > 0


def test_device_and_message_losses_against_a_loop():
    router = DeepSeekRouter.v2(8, 16, 4, n_group=4, topk_group=2, num_devices=4, aux="batch", device_capacity=None)
    router.weight.data.normal_()
    mask = torch.arange(24) % 6 != 5
    routing = router(torch.randn(24, 8), RouterContext(mask=mask))
    losses, logits = routing.losses, routing.logits[mask]
    routing = Routing(routing.ids[mask], routing.weights[mask], 16)
    p, f = logits.softmax(-1).mean(0), expert_load(routing) * 16 / (4 * 20)
    sent = [sum(bool((row // 4 == d).any()) for row in routing.ids) for d in range(4)]
    device = sum(f[4 * d : 4 * d + 4].mean() * p[4 * d : 4 * d + 4].sum() for d in range(4))
    comm = sum(4 / (2 * 20) * sent[d] * p[4 * d : 4 * d + 4].sum() for d in range(4))
    torch.testing.assert_close(losses["expert"], 0.003 * (f * p).sum())
    torch.testing.assert_close(losses["device"], 0.05 * device)
    torch.testing.assert_close(losses["comm"], 0.02 * comm)


def test_devices_above_capacity_drop_their_weakest_choices_in_training():
    router = DeepSeekRouter.v2(8, 16, 4, n_group=4, topk_group=2, num_devices=4, spared=0.0)
    router.weight.data.normal_()
    x, mask = torch.randn(64, 8), torch.arange(64) < 48
    whole, routing = router.eval()(x), router.train()(x, RouterContext(mask=mask))
    dropped = (routing.ids != whole.ids)[:48]
    assert dropped.any() and (routing.ids[:48][dropped] == 16).all() and torch.equal(routing.ids[48:], whole.ids[48:])
    p, device = whole.logits.softmax(-1).gather(1, whole.ids.long())[:48], whole.ids[:48] // 4
    for d in range(4):
        here = device == d
        assert (here & ~dropped).sum() == min(here.sum(), 48 * 4 // 4)  # capacity 1: an even load
        if (here & dropped).any():
            assert p[here & dropped].max() <= p[here & ~dropped].min()
    # What is dropped counts in the losses, whose aim is that nothing be dropped.
    free = DeepSeekRouter.v2(8, 16, 4, n_group=4, topk_group=2, num_devices=4, device_capacity=None)
    free.weight = router.weight
    torch.testing.assert_close(routing.losses, free(x, RouterContext(mask=mask)).losses)
    router.spared = 1.0
    assert torch.equal(router(x).ids, whole.ids)


def test_ranks_in_training():
    """Choices that a token's ranks leave empty take no device's room."""
    router = DeepSeekRouter.v2(8, 16, 4, n_group=4, topk_group=2, num_devices=4, spared=0.0)
    context = RouterContext(ranks=((1, 2), (3,)), group=torch.arange(40) % 2)
    x = torch.randn(40, 8)
    whole, routing = router.eval()(x, context), router.train()(x, context)
    assert (whole.ids[1::2, 1] == 16).all() and ((routing.ids == whole.ids) | (routing.ids == 16)).all()
    assert (torch.bincount(routing.ids.flatten().long(), minlength=17)[:16].view(4, 4).sum(1) <= 40).all()


def test_some_sequences_are_spared():
    router = DeepSeekRouter(4, 4, 1, num_devices=2, device_capacity=0.5)
    router.weight.data = 9 * torch.eye(4)
    x = torch.tensor([9.0, 0, 0, 0]).expand(4000, 4)  # all to the first device, with the same affinity
    ids = router(x, RouterContext(cu_seqlens=torch.arange(0, 4001, 2))).ids.view(2000, 2)
    assert ((ids == 0).sum() - 1000).abs() <= 1  # the budget is met, spared tokens first
    spared = (ids[1500:] == 0).all(1).double().mean()
    assert 0.05 < spared < 0.16
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    assert (compiled(x).ids == 0).sum() in (1000, 4000) and compiled(x[:0]).ids.shape == (0, 1)


def test_losses_of_even_and_of_collapsed_routing():
    router = DeepSeekRouter(6, 6, 6, aux="batch", aux_alpha=0.25)  # k = E is even
    torch.testing.assert_close(router(torch.randn(7, 6)).losses["expert"], torch.tensor(0.25))
    for E, k in ((6, 2), (9, 4)):  # or every expert chosen as often as any other, with the same mean score
        router = DeepSeekRouter(E, E, k, aux="batch", aux_alpha=0.25)
        router.weight.data = torch.eye(E)
        x = torch.stack([torch.arange(E, dtype=torch.float32).roll(shift) for shift in range(E)])
        torch.testing.assert_close(router(x).losses["expert"], torch.tensor(0.25))
    router = DeepSeekRouter(6, 6, 2, aux="batch", aux_alpha=1.0)
    routing = router(torch.randn(1, 6).expand(9, 6))
    share = routing.logits.softmax(-1)[0, routing.ids[0].long()].sum()
    torch.testing.assert_close(routing.losses["expert"], 6 / 2 * share)


def test_no_tokens_and_one_choice():
    router = DeepSeekRouter.v3(8, 16, 2, n_group=4, topk_group=2, device_alpha=0.1, comm_alpha=0.1, num_devices=4)
    routing = router(torch.zeros(0, 8))
    assert sorted(routing.losses) == ["comm", "device", "sequence"]
    assert all(loss == 0 for loss in routing.losses.values())
    one = DeepSeekRouter(8, 16, 1, "sigmoid", renorm=True, scale=2.5)
    assert (one(torch.randn(5, 8)).weights == 2.5).all()


def test_bfloat16_compile_and_operators():
    layer = MoELayer(DeepSeekRouter.v3(16, 16, 2, n_group=4, topk_group=2), GluExperts(16, 16, 8), FeedForward(16, 8))
    layer = layer.bfloat16()
    assert layer.router.expert_bias.dtype == torch.float32 and layer.router.weight.dtype == torch.bfloat16
    x = torch.randn(9, 16, dtype=torch.bfloat16)
    with OperatorsRan() as ran:
        y = layer(x)
    assert ran.names == ["topk_gating", "fused_experts"] and layer.router(x).logits.dtype == torch.float32
    layer.router.load.zero_()
    compiled = torch.compile(layer.forward_with_routing, backend="aot_eager", fullgraph=True)
    out, routing = compiled(x)
    assert torch.equal(out, y) and layer.router.load.sum() == 18
    torch.testing.assert_close(routing.losses["sequence"], layer.router(x).losses["sequence"])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"n_group": 3}, "groups.num_groups must divide num_experts=16, got 3"),
        ({"n_group": 8, "topk_group": 1}, r"k must be in \[1, 2\], got 4"),
        ({"n_group": 16, "topk_group": 8, "group_score": "top2sum"}, "must leave two experts to a group .*, got 16"),
        ({"score": "relu"}, "score must be softmax or sigmoid, got relu"),
        ({"group_score": "mean"}, "group_score must be max or top2sum, got mean"),
        ({"aux": "token"}, "aux must be none, batch or sequence, got token"),
        ({"num_devices": 3}, "num_devices must divide num_experts=16, got 3"),
        ({"device_capacity": 0.0}, "device_capacity must be above 0, got 0.0"),
        ({"spared": 2.0}, r"spared must be in \[0, 1\], got 2.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DeepSeekRouter(8, 16, 4, **options)


def test_update_without_a_bias_is_refused():
    with pytest.raises(ValueError, match="bias_balance must be a rate for update_bias, got None"):
        DeepSeekRouter(8, 16, 4).update_bias()
