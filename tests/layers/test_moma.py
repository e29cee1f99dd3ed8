import pytest
import torch
import torch.nn.functional as F

from moert import RouterContext
from moert.layers import MoDBlock, MoMaLayer, PackedBlock, all_rows, train_auxiliary, upcycle
from moert.routers import DepthRouter, causal_routers_, recorded_routings
from moert.runtime import SkippableKV
from moert.testing import OperatorsRan

H = 16
GROUPS = (1, 2, 4)


def loop(layer, x, modality):
    """MoMa's equations with loops over groups and experts."""
    y, expert = torch.zeros_like(x), 0
    for g, router in enumerate(layer.router.routers):
        tokens = torch.where(modality == g)[0]
        for e in range(router.num_experts):
            count = -(-len(tokens) // router.num_experts)
            scores = torch.sigmoid(x[tokens] @ router.weight[e])
            best = scores.sort(descending=True, stable=True).indices[:count]
            gate, up = (x[tokens[best]] @ layer.experts.gate_up_proj[expert].T).chunk(2, -1)
            y[tokens[best]] += scores[best, None] * ((F.silu(gate) * up) @ layer.experts.down_proj[expert].T)
            expert += 1
    return y


@pytest.mark.parametrize("sizes", ((30, 17, 21), (0, 9, 1), (1, 0, 12), (0, 0, 0)))
def test_against_loops(sizes):
    layer = MoMaLayer(H, 24, GROUPS)
    modality = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))[torch.randperm(sum(sizes))]
    x, seen = torch.randn(sum(sizes), H), []
    layer.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    with OperatorsRan() as ran:
        y = layer(x, RouterContext(modality=modality))
    assert ran.names == ["expert_choice"] * 3 + ["fused_experts"]
    torch.testing.assert_close(y, loop(layer, x, modality), rtol=0, atol=1e-5)
    load = torch.bincount(seen[0].ids.flatten().long(), minlength=8)[:7].tolist()
    assert load == [-(-sizes[g] // GROUPS[g]) for g in (0, 1, 1, 2, 2, 2, 2)]


def test_modalities_do_not_see_each_other():
    layer, x, modality = MoMaLayer(H, 24, (4, 4)), torch.randn(50, H), torch.arange(50) % 2
    y = layer(x, RouterContext(modality=modality))
    for g in (0, 1):
        other = torch.where((modality == g)[:, None], x, torch.randn(50, H))
        changed = layer(other, RouterContext(modality=modality))
        assert torch.equal(changed[modality == g], y[modality == g])
        assert not torch.equal(changed[modality != g], y[modality != g])


@pytest.fixture
def trained():
    layer = MoMaLayer(H, 24, (2, 3), hidden_aux=32)
    for router in layer.router.routers:
        router.weight.data.normal_()
    batches = [(torch.randn(128, H), RouterContext(modality=torch.arange(128) % 2)) for _ in range(60)]
    before = {name: p.clone() for name, p in layer.named_parameters() if "auxiliary" not in name}
    figures = train_auxiliary(layer, batches, steps=200, rate=3e-3)
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters() if name in before)
    assert all(p.grad is None for name, p in layer.named_parameters() if name in before)
    return layer, figures


def test_causal_after_the_auxiliary_routers_have_learnt(trained):
    layer, figures = trained
    assert sorted(figures) == ["router.routers.0", "router.routers.1"]
    assert all(f["accuracy"] > 0.85 and f["precision"] > 0.7 and f["recall"] > 0.7 for f in figures.values())
    x, context = torch.randn(40, H), RouterContext(modality=torch.arange(40) % 2)
    later = x.clone()
    later[30:] = 10 * torch.randn(10, H)
    assert not torch.equal(layer(x, context)[:30], layer(later, context)[:30])
    layer.causal()
    assert torch.equal(layer(x, context)[:30], layer(later, context)[:30])
    other = MoMaLayer(H, 24, (2, 3), hidden_aux=32)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.causal()(x, context), layer(x, context))
    with recorded_routings(layer) as calls:  # what is to be learnt is expert choice, whatever decides now
        train_auxiliary(layer, [(x, context)], steps=1)
    assert all(routing.plan is not None for _, routing in calls) and layer.router.routers[0].causal
    assert not layer.causal(False).router.routers[0].causal


def test_upcycled_layer_starts_as_the_single_expert():
    one = MoMaLayer(H, 24, (1, 1))
    four = upcycle(one, 4)
    x, context = torch.randn(30, H), RouterContext(modality=torch.arange(30) % 2)
    for layer in (one, four):
        for router in layer.router.routers:
            router.weight.data.zero_()  # every score is 1/2
            router.capacity = 1.0
    four.eval()
    torch.testing.assert_close(four(x, context) / 4, one(x, context), rtol=0, atol=1e-5)
    four.train()
    four(x, context).square().sum().backward()
    grads = four.experts.down_proj.grad
    assert all(not torch.equal(grads[0], grads[e]) for e in (1, 2, 3))
    with pytest.raises(ValueError, match=r"layer must have one expert per group, got \[4, 4\]"):
        upcycle(four, 2)


def with_depth(groups=(2, 3), capacity=0.5):
    block = PackedBlock(H, 2, MoMaLayer(H, 24, groups, hidden_aux=32))
    layer = MoDBlock(block, DepthRouter(H, capacity, gate="sigmoid"))
    torch.nn.init.normal_(layer.router.weight)
    return layer


def test_depth_first_then_experts_by_modality():
    layer, x, modality, seen = with_depth(), torch.randn(3, 10, H), torch.arange(30) % 2, []
    moma = layer.block.ffn
    moma.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    moma.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with OperatorsRan() as ran:
        y, routing = layer(x, RouterContext(modality=modality))
    assert ran.names[:2] == ["expert_choice", "permute_plan"] and ran.names.count("expert_choice") == 3
    chosen = (routing.ids[:, 0] == 0).view(3, 10)
    assert (chosen.sum(1) == 5).all() and torch.equal(y[~chosen], x[~chosen])
    (h, context), (_, inner) = seen
    assert torch.equal(context.modality, modality[chosen.flatten()])
    # Groups share out the chosen tokens of their modality, not all tokens.
    sizes = torch.bincount(context.modality, minlength=2).tolist()
    load = torch.bincount(inner.ids.flatten().long(), minlength=6)[:5].tolist()
    assert load == [-(-sizes[0] // 2)] * 2 + [-(-sizes[1] // 3)] * 3
    block, u = layer.block, x[chosen]
    rows = all_rows(u.view(3, 5, H), torch.where(chosen)[1])
    a = u + block.attention(block.attention_norm(u), rows)
    torch.testing.assert_close(h, block.ffn_norm(a))
    delta = a + loop(moma, h, context.modality) - u
    torch.testing.assert_close(y[chosen], u + routing.weights.view(3, 10, 1)[chosen] * delta, rtol=0, atol=1e-5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, RouterContext(modality=modality))[0], y)


def test_depth_and_experts_decide_by_each_token_alone_and_decode():
    layer, batches = with_depth().eval(), []
    for _ in range(8):
        batches.append((torch.randn(4, 16, H), RouterContext(modality=torch.arange(64) % 2)))
    assert len(train_auxiliary(layer, batches, steps=8)) == 2
    causal_routers_(layer)
    x, modality = torch.randn(3, 12, H), torch.arange(36).view(3, 12) // 5 % 2
    whole, routing = layer(x, RouterContext(modality=modality))
    assert 0 < (routing.ids == 0).sum() < 36
    later = x.clone()
    later[:, 8:] = 10 * torch.randn(3, 4, H)
    torch.testing.assert_close(layer(later, RouterContext(modality=modality))[0][:, :8], whole[:, :8])
    kv = SkippableKV(1, 3)
    for s in range(12):
        at = torch.full((3, 1), s)
        y, _ = layer(x[:, s : s + 1], RouterContext(modality=modality[:, s]), positions=at, kv=kv)
        torch.testing.assert_close(y[:, 0], whole[:, s], rtol=1e-5, atol=1e-5)


def test_auxiliary_routers_learn_in_a_compiled_model():
    torch._dynamo.reset()
    layer, context = MoMaLayer(H, 24, (2, 3)), RouterContext(modality=torch.arange(40) % 2)
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(x := torch.randn(40, H), context)
    figures = train_auxiliary(compiled, [(x, context)], steps=3)
    assert len(figures) == 2 and all(router.auxiliary.trained for router in layer.router.routers)


def test_what_the_routers_are_given():
    one = MoMaLayer(H, 24, (1, 1), 0.5, "softmax", hidden_aux=5, scope="world")
    for layer in (one, upcycle(one, 3)):
        for router in layer.router.routers:
            assert (router.score, router.scope, router.auxiliary.up.weight.shape[0]) == ("softmax", "world", 5)
    assert one.router.routers[0].capacity == 0.5 and upcycle(one, 3).groups == (3, 3)


def test_bfloat16_compile_and_untrained():
    layer = MoMaLayer(H, 24, (2, 3)).bfloat16()
    x, context = torch.randn(2, 9, H, dtype=torch.bfloat16), RouterContext(modality=torch.arange(18) % 2)
    y = layer(x, context)
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, context), y)
    with pytest.raises(ValueError, match="auxiliary must be trained"):
        layer.causal()
    with pytest.raises(ValueError, match="model must have expert choice routers with an auxiliary router, got none"):
        train_auxiliary(torch.nn.Linear(1, 1), [], 1)
