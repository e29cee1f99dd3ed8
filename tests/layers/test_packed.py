import pytest
import torch

from moert import GluExperts, MoELayer, RouterContext, TopKRouter
from moert.layers import FeedForward, PackedBlock, all_rows, run_chosen
from moert.layers.packed import Rows, attend, packed_attention


def test_packed_rows_give_what_the_rectangle_gives():
    block, x = PackedBlock(16, 2, FeedForward(16, 8)), torch.randn(3, 7, 16)
    rows = all_rows(x)
    packed = Rows(rows.positions, rows.offsets)
    u = x.flatten(0, 1)
    torch.testing.assert_close(block(u, packed), block(u, rows), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(block(u, rows), u + block.delta(u, rows))


def test_only_positions_decide_what_is_seen():
    q, k, v = torch.randn(3, 5, 2, 4).unbind(0)
    rows = Rows(torch.tensor([3, 5, 9, 0, 4]), torch.tensor([0, 3, 5]))
    got = packed_attention(q, k, v, rows)
    assert torch.equal(got[0], v[0]) and torch.equal(got[3], v[3])
    scores = torch.einsum("hd,mhd->hm", q[4], k[3:]) / 2
    torch.testing.assert_close(got[4], torch.einsum("hm,mhd->hd", scores.softmax(-1), v[3:]))
    assert attend(q[:0], Rows(torch.zeros(0), torch.tensor([0, 0])), [(k, v, torch.arange(5))]).shape == (0, 2, 4)


@pytest.mark.parametrize("limit", (None, 3))
def test_run_chosen(limit):
    x, chosen = torch.randn(2, 5, 4), torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1, 0]).bool()
    weights, seen = torch.rand(10, 1), []

    def run(rows_NH, rows):
        seen.append(rows)
        return rows_NH * 2

    y = run_chosen(run, x, chosen, weights, limit=limit).flatten(0, 1)
    u = x.flatten(0, 1)
    assert torch.equal(y[~chosen], u[~chosen])
    torch.testing.assert_close(y[chosen], (u + 2 * weights * u)[chosen])
    last = torch.iinfo(torch.int64).max
    expected = [0, 2, 3, 3] if limit is None else [0, 2, 3, 3, last, last]
    assert seen[0].positions.tolist() == expected and seen[0].length == limit
    assert seen[0].offsets.tolist() == ([0, 3, 4] if limit is None else [0, 3, 6])


@pytest.mark.parametrize("limit", (None, 4))
def test_routers_inside_a_block_are_told_of_its_rows(limit):
    seen = []

    class Seeing(TopKRouter):
        def forward(self, x, context=None):
            seen.append(context)
            return super().forward(x, context)

    block = PackedBlock(16, 2, MoELayer(Seeing(16, 4, 2), GluExperts(4, 16, 8)))
    x, chosen = torch.randn(2, 5, 16), torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1, 0]).bool()
    context = RouterContext(modality=torch.arange(10))
    run_chosen(block.delta, x, chosen, torch.ones(10, 1), limit=limit, context=context)
    run_chosen(block.delta, x, chosen, torch.ones(10, 1), limit=limit)
    block(x.flatten(0, 1), all_rows(x, context=context))
    assert seen[0].modality[seen[0].mask].tolist() == [0, 2, 3, 8] and len(seen[0].mask) == (4 if limit is None else 8)
    assert seen[1] is None and seen[2] is context


def test_errors():
    with pytest.raises(ValueError, match=r"hidden must be a multiple of 2 \* heads=8, got 12"):
        PackedBlock(12, 4, FeedForward(12, 8))
