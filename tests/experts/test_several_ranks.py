"""Experts that lie on several ranks, as in the papers: which rows go where, and that the sum is the same."""

import torch
import torch.distributed as dist

from moert import Experts, GluExperts, MoELayer, Routing, fused_experts, permute, permute_plan, unpermute
from moert.experts import HeteroExperts
from moert.routers import DeepSeekRouter, GatingResidualRouter
from ranks import ranks

H, I, T, R = 16, 8, 40, 4
KINDS = ["ffn"] * 8 + ["const"] * 2 + ["copy", "zero"]


class ShardedExperts(Experts):
    """The experts of `whole`, of which each rank computes an equal contiguous part; rows travel there and back.

    sent is the number of rows of each call that went to each rank, this one included.
    """

    def __init__(self, whole: GluExperts):
        super().__init__()
        self.whole, self.num_experts, self.sent = whole, whole.num_experts, []

    def forward(self, x, routing):
        size, rank = self.num_experts // R, dist.get_rank()
        plan = permute_plan(routing.ids, self.num_experts)
        counts = plan.offsets[::size].diff()
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        self.sent.append(counts.tolist())
        splits = theirs.tolist(), counts.tolist()
        rows, back = permute(x, plan), x.new_zeros(len(plan.tokens), x.shape[1])
        used = plan.offsets[-1]
        expert = torch.repeat_interleave(torch.arange(self.num_experts), plan.offsets.diff())
        got, ids = rows.new_empty(sum(splits[0]), x.shape[1]), expert.new_empty(sum(splits[0]))
        for there, here in ((got, rows[:used]), (ids, expert)):
            dist.all_to_all_single(there, here, *splits)
        mine = slice(rank * size, (rank + 1) * size)
        local = Routing((ids - rank * size)[:, None], torch.ones(len(ids), 1), size)
        computed = fused_experts(got, local, self.whole.gate_up_proj[mine], self.whole.down_proj[mine])
        dist.all_to_all_single(back[:used], computed, *splits[::-1])
        return unpermute(back, plan, routing.weights)


@torch.no_grad()
def spread_out() -> tuple[list[int], bool, list[int], bool]:
    """Rows that this rank sent and should have sent, and whether the layer gives what one rank alone does."""
    torch.manual_seed(1)
    deepseek = MoELayer(DeepSeekRouter(H, 16, 4, n_group=R, topk_group=2), GluExperts(16, H, I)).eval()
    plus = MoELayer(GatingResidualRouter(H, 12, kinds=KINDS), HeteroExperts(GluExperts(8, H, I), KINDS, H)).eval()
    torch.manual_seed(10 + dist.get_rank())
    x, out = torch.randn(T, H), []
    for layer, holder, name in ((deepseek, deepseek, "experts"), (plus, plus.experts, "ffn")):
        alone = layer(x)
        sharded = ShardedExperts(getattr(holder, name))
        setattr(holder, name, sharded)
        y, routing = layer.forward_with_routing(x)
        of_rank = routing.ids // (sharded.num_experts // R)
        assert sharded.sent == [[int((of_rank == r).sum()) for r in range(R)]]
        out += [sum(sharded.sent[0]), max(len({r for r in row if r < R}) for row in of_rank.tolist())]
        out += [torch.allclose(y, alone, rtol=0, atol=1e-5), int((routing.ids < sharded.num_experts).sum())]
    return out


def test_rows_go_to_the_ranks_of_their_experts_and_no_further():
    for rows, most, same, choices, plus_rows, _, plus_same, plus_choices in ranks(R, spread_out):
        assert same and plus_same
        # DeepSeek's groups are the ranks: no token goes to more than two of them.
        assert rows == choices == 4 * T and most == 2
        # MoE++: experts that cost nothing are on every rank, only the others' rows travel.
        assert 0 < plus_rows == plus_choices < 2 * T
