import pytest
import torch

from moert import RouterContext, TopKRouter, permute_plan
from moert.routers import DeepSeekRouter, ExpertChoiceRouter, ModalityRouter

H = 16


def test_each_router_routes_its_own_tokens_to_its_own_experts():
    routers = [TopKRouter(H, 4, 2), TopKRouter(H, 3, 1), ExpertChoiceRouter(H, 2)]
    router, x, modality = ModalityRouter(routers), torch.randn(30, H), torch.randint(0, 3, (30,))
    routing = router(x, RouterContext(modality=modality))
    assert router.num_experts == 9 and routing.ids.shape == (30, 2) and routing.logits.shape == (30, 9)
    for g, offset in enumerate((0, 4, 7)):
        rows = modality == g
        alone = routers[g](x[rows])
        ids = torch.where(alone.ids < routers[g].num_experts, alone.ids + offset, 9)
        ids = torch.nn.functional.pad(ids, (0, 2 - ids.shape[1]), value=9)
        assert torch.equal(routing.ids[rows], ids)
        torch.testing.assert_close(routing.weights[rows][ids < 9], alone.weights[alone.ids < routers[g].num_experts])
    assert (routing.weights[routing.ids == 9] == 0).all()


def test_plans_become_one():
    router = ModalityRouter([ExpertChoiceRouter(H, 1), ExpertChoiceRouter(H, 2), ExpertChoiceRouter(H, 4, 0.5)])
    for modality in (torch.randint(0, 3, (30,)), torch.zeros(30).long(), torch.full((30,), 2), torch.zeros(0).long()):
        routing = router(torch.randn(len(modality), H), RouterContext(modality=modality))
        plan, expected = routing.plan, permute_plan(routing.ids, 7)
        used = int(plan.offsets[-1])
        assert torch.equal(plan.offsets, expected.offsets) and torch.equal(plan.slots, expected.slots)
        assert torch.equal(plan.tokens[:used], expected.tokens[:used]) and (plan.tokens[used:] == -1).all()
        assert (plan.offsets.dtype, plan.tokens.dtype, plan.slots.dtype) == (torch.int32,) * 3
    both = ModalityRouter([ExpertChoiceRouter(H, 2), TopKRouter(H, 4, 2)])
    assert both(torch.randn(9, H), RouterContext(modality=torch.arange(9) % 2)).plan is None


def test_losses_are_named_by_modality():
    router = ModalityRouter([DeepSeekRouter(H, 4, 2, aux="batch", aux_alpha=1.0) for _ in range(2)])
    x, modality = torch.randn(30, H), torch.arange(30) % 2
    losses = router(x, RouterContext(modality=modality)).losses
    assert sorted(losses) == ["0.expert", "1.expert"]
    torch.testing.assert_close(losses["1.expert"], router.routers[1](x[1::2]).losses["expert"])


def test_compile():
    router = ModalityRouter([ExpertChoiceRouter(H, 2), ExpertChoiceRouter(H, 3)])
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    x, context = torch.randn(12, H), RouterContext(modality=torch.arange(12) % 2, mask=torch.arange(12) > 2)
    assert torch.equal(compiled(x, context).ids, router(x, context).ids)


def test_errors():
    router = ModalityRouter([TopKRouter(H, 4, 2)])
    with pytest.raises(ValueError, match="context.modality must be given, got None"):
        router(torch.randn(3, H))
    with pytest.raises(ValueError, match=r"context.modality must be in \[0, 1\), got 2 tokens outside"):
        router(torch.randn(3, H), RouterContext(modality=torch.tensor([0, 1, -1])))
    with pytest.raises(ValueError, match="routers must have at least one, got none"):
        ModalityRouter([])
