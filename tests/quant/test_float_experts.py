import pytest
import torch
from torch import nn

from moert import ExpertLayout, GluExperts
from moert.experts.calibrated import FloatGluExperts
from moert.ops.fused_experts import apply_activation
from moert.quant import Int4, Int8
from moert.quant.float_experts import pack_experts
from moert.quant.gptq import GPTQ, gptq
from moert.testing import random_routing

T, E, k, H, I = 150, 6, 2, 48, 40


def experts_of(layout=ExpertLayout()):
    return FloatGluExperts(nn.ModuleDict({"experts": GluExperts(E, H, I, bias=True, layout=layout)}), "experts")


def calls(kind="uniform"):
    return torch.randn(T, H // 2) @ torch.randn(H // 2, H), random_routing(T, E, k, kind).ids


def same(a, b):
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("kind", ["uniform", "empty_experts", "sentinels"])
def test_each_expert_by_its_own_rows(kind):
    experts, (x, ids), formats, settings = experts_of(), calls(kind), (Int4(), Int8(32)), GPTQ(min_rows=5)
    (w1, w2), rows = pack_experts(experts, x, ids, formats, settings)
    module = experts.module
    for e in range(E):
        mine = x[(ids == e).any(1)]
        assert rows[e] == len(mine)
        if not len(mine):
            assert torch.equal(w1.codes[e], Int4().pack(module.gate_up_proj[e]).codes)
            assert torch.equal(w2.codes[e], Int8(32).pack(module.down_proj[e]).codes)
            continue
        first = gptq(module.gate_up_proj[e : e + 1].detach(), (mine.T @ mine)[None], Int4(), settings)
        h = apply_activation(mine @ Int4().unpack(first)[0].T + module.gate_up_proj_bias[e], module.activation)
        second = gptq(module.down_proj[e : e + 1].detach(), (h.T @ h)[None], Int8(32), settings)
        # Sums in another order may round a tie the other way.
        assert (first.codes[0] == w1.codes[e]).float().mean() > 0.98 and torch.equal(first.scales[0], w1.scales[e])
        assert (second.codes[0] == w2.codes[e]).float().mean() > 0.9 and torch.equal(second.scales[0], w2.scales[e])


def test_memory_decides_how_many_at_once_and_nothing_else():
    experts, (x, ids) = experts_of(), calls()
    results, steps = [], []
    for memory in (1, 3 * 8 * H**2, 2**30):
        done = []
        results.append(pack_experts(experts, x, ids, (Int4(), Int4()), GPTQ(memory=memory), done.append)[0])
        steps.append(done)
    assert steps == [[1] * 6, [3, 3], [6]]
    assert all(same(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_layouts_give_the_same():
    plain, mixed = experts_of(), experts_of(ExpertLayout(transposed=True, interleaved=True))
    with torch.no_grad():
        for name in ("gate_up_proj", "gate_up_proj_bias"):
            gate, up = getattr(plain.module, name).chunk(2, 1)
            rows = torch.stack([gate, up], 2).flatten(1, 2)
            getattr(mixed.module, name).copy_(rows.mT if rows.dim() == 3 else rows)
        mixed.module.down_proj.copy_(plain.module.down_proj.mT)
    mixed = FloatGluExperts(mixed.owner, "experts")  # reads the bias anew
    x, ids = calls()
    pairs = [pack_experts(each, x, ids, (Int4(), Int4()))[0] for each in (plain, mixed)]
    assert all(same(a, b) for a, b in zip(*pairs, strict=True))


def test_too_few_rows_round():
    experts, (x, ids) = experts_of(), calls()
    (w1, w2), rows = pack_experts(experts, x, ids, (Int4(), Int4()), GPTQ(min_rows=T + 1))
    assert same(w1, Int4().pack(experts.module.gate_up_proj)) and same(w2, Int4().pack(experts.module.down_proj))
    assert sum(rows) == T * k
    zeros = pack_experts(experts, torch.zeros(T, H), ids, (Int4(), Int4()))[0]
    assert same(zeros[0], w1)


def test_rows_that_are_not_finite():
    experts, (x, ids) = experts_of(), calls()
    x[ids[7, 0] == ids[:, 0]] = float("inf")
    with pytest.raises(ValueError, match="calibration must give expert . finite rows, got inf or nan"):
        pack_experts(experts, x, ids, (Int4(), Int4()))
