import pytest
import torch

from moert import GluExperts, MoELayer, RouterContext, permute_plan
from moert.routers import AuxiliaryRouter, ExpertChoiceRouter
from moert.testing import OperatorsRan

H, E = 16, 5


def chosen(routing):
    return torch.zeros(len(routing.ids), E + 1, dtype=torch.bool).scatter(1, routing.ids.long(), True)[:, :E]


@pytest.mark.parametrize("capacity,count", [(None, 8), (0.5, 20), (1.0, 40), (0.01, 1)])
@pytest.mark.parametrize("score", ("sigmoid", "softmax"))
def test_every_expert_takes_its_best_tokens(score, capacity, count):
    router, x = ExpertChoiceRouter(H, E, capacity, score, logit_bias=True), torch.randn(40, H)
    router.logit_bias.data.normal_()
    routing = router(x)
    scores = x @ router.weight.T + router.logit_bias
    scores = scores.sigmoid() if score == "sigmoid" else scores.softmax(-1)
    for e in range(E):
        best = scores[:, e].sort(descending=True, stable=True).indices[:count]
        assert set(best.tolist()) == set(torch.where(chosen(routing)[:, e])[0].tolist())
    dense = torch.zeros(40, E + 1).scatter(1, routing.ids.long(), routing.weights)[:, :E]
    torch.testing.assert_close(dense, torch.where(chosen(routing), scores, 0))


def test_the_number_of_tokens_is_rounded_up_and_padding_left_out():
    router, mask = ExpertChoiceRouter(H, E), torch.rand(64) < 0.6
    x = torch.randn(64, H)
    x[~mask] = float("nan")
    routing = router(x, RouterContext(mask=mask))
    number = -(-int(mask.sum()) // E)
    assert chosen(routing).sum(0).tolist() == [number] * E and not chosen(routing)[~mask].any()
    # A third of 9 is 3 although the product is a little more.
    third = ExpertChoiceRouter(H, E, 0.1 + 0.2 + 1e-16)
    assert chosen(third(torch.randn(10, H))).sum(0).tolist() == [3] * E


def test_tokens_compete_within_their_sequence():
    router, x = ExpertChoiceRouter(H, E, 0.25, per="sequence"), torch.randn(40, H)
    together = router(x, RouterContext(cu_seqlens=torch.tensor([0, 8, 40])))
    for rows in (slice(0, 8), slice(8, 40)):
        assert torch.equal(together.ids[rows], router(x[rows]).ids)
    assert chosen(together)[:8].sum(0).tolist() == [2] * E


@pytest.mark.parametrize("per", ("batch", "sequence"))
@pytest.mark.parametrize("capacity", (None, 0.01, 0.3, 1.0))
@pytest.mark.parametrize("T", (0, 1, 7, 40))
def test_experts_read_their_tokens_without_a_sort(T, capacity, per):
    router, x = ExpertChoiceRouter(H, E, capacity, per=per), torch.randn(T, H)
    for ends in ([0, T], [0, 0, T // 3, T]):
        for mask in (None, torch.rand(T) < 0.7):
            routing = router(x, RouterContext(cu_seqlens=torch.tensor(ends), mask=mask))
            plan, sorted_ids = routing.plan, permute_plan(routing.ids, E)
            used = int(plan.offsets[-1])
            assert torch.equal(plan.offsets, sorted_ids.offsets) and torch.equal(plan.slots, sorted_ids.slots)
            assert torch.equal(plan.tokens[:used], sorted_ids.tokens[:used]) and (plan.tokens[used:] == -1).all()
            # Room for the share of all tokens, and one more of each document.
            share = T / E if capacity is None else capacity * T
            assert used <= len(plan.tokens) <= min(E * T, E * (share + len(ends)))
    with OperatorsRan() as ran:
        MoELayer(router, GluExperts(E, H, 8))(x)
    assert ran.names == ["expert_choice", "fused_experts"]


def test_noise_only_in_training():
    router, x = ExpertChoiceRouter(H, E, gumbel=True), torch.randn(40, H)
    assert not torch.equal(router(x).ids, router(x).ids)
    router.eval()
    assert torch.equal(router(x).ids, router(x).ids)


def test_noise_is_the_difference_of_two_gumbels():
    """A logistic variable, whose sigmoid is uniform."""
    router = ExpertChoiceRouter(H, E, 1.0, gumbel=True)
    torch.nn.init.zeros_(router.weight)
    scores = router(torch.randn(4000, H)).weights.flatten()
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs((scores < share).double().mean() - share) < 0.02


def test_a_later_token_displaces_an_earlier_one_unless_causal():
    router = ExpertChoiceRouter(H, E, auxiliary=AuxiliaryRouter(H, E))
    x = torch.randn(20, H)
    later = x.clone()
    later[15:] = 10 * torch.randn(5, H)
    assert not torch.equal(router(x).ids[:15], router(later).ids[:15])
    with pytest.raises(ValueError, match="auxiliary must be trained for causal_ .*, got an untrained one"):
        router.causal_()
    router.auxiliary.trained.fill_(True)
    router.causal_()
    one, other = router(x), router(later)
    assert torch.equal(one.ids[:15], other.ids[:15]) and torch.equal(one.weights[:15], other.weights[:15])
    aux = torch.sigmoid(torch.nn.functional.silu(x @ router.auxiliary.up.weight.T) @ router.auxiliary.down.weight.T)
    assert torch.equal(chosen(one), aux > 0.5)
    scores = torch.sigmoid(x @ router.weight.T)
    torch.testing.assert_close(one.weights, torch.where(aux > 0.5, scores, 0))
    assert not chosen(router(x, RouterContext(mask=torch.zeros(20)))).any()
    assert torch.equal(router.causal_(False)(x).ids, router(x).ids)
    with pytest.raises(ValueError, match="auxiliary must be given for causal_, got None"):
        ExpertChoiceRouter(H, E).causal_()


def test_layer_gradients_bfloat16_compile_and_no_tokens():
    layer, x = MoELayer(ExpertChoiceRouter(H, E), GluExperts(E, H, 8)), torch.randn(20, H)
    with OperatorsRan() as ran:
        layer(x).sum().backward()
    assert ran.names == ["expert_choice", "fused_experts", "fused_experts_backward"]
    assert layer.router.weight.grad.norm() > 0
    layer, x = layer.bfloat16(), x.bfloat16()
    assert layer.router.weight.dtype == torch.float32 and layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (20, 33):
        x = torch.randn(T, H, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), layer(x))
    assert layer(x[:0]).shape == (0, H)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"capacity": 0.0}, r"capacity must be in \(0, 1\], got 0.0"),
        ({"score": "relu"}, "score must be sigmoid or softmax, got relu"),
        ({"per": "token"}, "per must be batch or sequence, got token"),
        ({"scope": "node"}, "scope must be rank or world, got node"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ExpertChoiceRouter(H, E, **options)
