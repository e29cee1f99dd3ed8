import pytest
import torch
import torch.distributed as dist

from moert import GluExperts, Routing
from moert.parallel.slices import SlicedExperts, _Gather, _joined, _sliced, cut_of, divisors
from moert.testing import DTYPES
from moert.types import ExpertLayout
from ranks import ranks

E, H, I, s = 2, 8, 12, 4
LAYOUTS = [ExpertLayout(transposed, interleaved) for transposed in (False, True) for interleaved in (False, True)]


def columns(experts: GluExperts, j: int, s: int) -> list[int]:
    """Of gate_up_proj those of slice j, one by one."""
    mine = range(j * experts.intermediate // s, (j + 1) * experts.intermediate // s)
    if not experts.activation.gated:
        return [*mine]
    if experts.layout.interleaved:
        return [2 * c + half for c in mine for half in (0, 1)]
    return [half * experts.intermediate + c for half in (0, 1) for c in mine]


def slice_of(name: str, whole: torch.Tensor, experts: GluExperts, j: int, s: int) -> torch.Tensor:
    """Slice j of s of each expert: columns of the first product, as many of the second, a part of the last bias."""
    H, i = experts.hidden, experts.intermediate // s
    if name == "down_proj_bias":
        return whole[:, j * H // s : (j + 1) * H // s]
    if name == "down_proj":
        rows = whole if experts.layout.transposed else whole.mT
        rows = rows[:, j * i : (j + 1) * i]
        return rows if experts.layout.transposed else rows.mT
    if name == "gate_up_proj_bias":
        return whole[:, columns(experts, j, s)]
    rows = whole.mT if experts.layout.transposed else whole
    rows = rows[:, columns(experts, j, s)]
    return rows.mT if experts.layout.transposed else rows


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_slices(activation, layout):
    """Each is what it should be, together they are the expert again, and their results add up to the expert's."""
    experts = GluExperts(E, H, I, activation, bias=True, layout=layout)
    experts.gate_up_proj.requires_grad_(False)
    slices = _sliced(experts, s)
    for name, whole in experts.named_parameters():
        got = slices.get_parameter(name)
        for j in range(s):
            assert torch.equal(got[j::s], slice_of(name, whole, experts, j, s)), name
        assert torch.equal(_joined(got, s, *cut_of(name, experts)), whole)
        assert got.requires_grad == whole.requires_grad
        pairs = _joined(got, 2, *cut_of(name, experts))
        assert torch.equal(_joined(pairs, s // 2, *cut_of(name, experts)), whole)
    x, routing = torch.randn(5, H), Routing(torch.tensor([[0, 1]] * 5), torch.rand(5, 2), E)
    slices.down_proj_bias = None
    each = [Routing(routing.ids * s + j, routing.weights, E * s) for j in range(s)]
    bias = routing.weights @ experts.down_proj_bias
    torch.testing.assert_close(sum(slices(x, r) for r in each) + bias, experts(x, routing), rtol=1e-5, atol=1e-6)


def test_divisors():
    assert [divisors(n) for n in (1, 2, 6, 16)] == [(1,), (1, 2), (1, 2, 3, 6), (1, 2, 4, 8, 16)]


def gathered() -> None:
    """Slices in the order of ranks, bit for bit; of neighbours too; the gradients of all added up in float32."""
    R, rank = dist.get_world_size(), dist.get_rank()
    spread = SlicedExperts(GluExperts(1, H, I, bias=True), R)
    for n, group in spread.neighbours.items():
        first = rank // n * n
        assert dist.get_process_group_ranks(group) == [*range(first, first + n)]
        limit, whole = (each._get_backend(torch.device("cpu")).options._timeout for each in (group, dist.group.WORLD))
        assert limit == whole
    assert [*spread.neighbours] == [2, 4]
    for dtype in (*DTYPES, torch.float64):
        for n, group in ((R, None), (2, spread.neighbours[2])):
            everybody = torch.randn(R, 3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
            mine = everybody[rank].clone().requires_grad_()
            whole = _Gather.apply(mine.mT, group, spread.ranks.guarded)
            first = rank // n * n
            assert torch.equal(whole, everybody[first : first + n].mT.flatten(0, 1))
            grads = torch.randn(R, 5 * n, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
            whole.backward(grads[rank])
            summed = grads[first : first + n].to(torch.promote_types(dtype, torch.float32)).sum(0).to(dtype)
            expected = summed.unflatten(0, (n, 5))[rank - first].mT
            torch.testing.assert_close(mine.grad, expected, rtol=1e-6 if dtype.itemsize > 2 else 0, atol=0)


def test_gathered():
    assert ranks(4, gathered) == [None] * 4
