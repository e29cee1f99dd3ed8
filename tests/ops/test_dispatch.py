import gc
import re
import time

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from moert import Routing, fused_experts
from moert.ops.dispatch import (
    combine,
    combine_ref,
    dispatch,
    dispatch_pack_ref,
    dispatch_plan_ref,
    dispatch_ref,
    start_combine,
)
from moert.ops.expert_map import ExpertMap
from moert.ops.fused_experts import fused_experts_ref
from moert.ops.permute import unpermute, unpermute_ref
from moert.testing import (
    DTYPES,
    ID_DTYPES,
    LAYOUTS,
    PERMUTE_SHAPES,
    Shape,
    assert_grads_close,
    assert_rows_close,
    random_routing,
    strided,
)
from moert.types import DispatchPlan
from ranks import error_of, ranks

OPS = torch.ops.moert
E = 7
# Tokens of the ranks, k, kind of routing: for two, three and four ranks (the first so many).
CASES = (
    ((5, 3, 8, 2), 2, "uniform"),
    ((0, 6, 0, 1), 3, "uniform"),
    ((0, 0, 0, 0), 2, "uniform"),
    ((4, 1, 3, 9), 1, "uniform"),
    ((3, 4, 2, 5), E, "uniform"),
    ((9, 2, 4, 3), 2, "one_expert"),
    ((7, 7, 7, 7), 3, "empty_experts"),
    ((11, 2, 6, 8), 4, "sentinels"),
)


def placements(R: int):
    """None, one that is interleaved, one that leaves rank 0 without experts."""
    return None, [(e * 5 + 1) % R for e in range(E)], [1 + e % (R - 1) for e in range(E)]


def problem(T: int, k: int, kind: str, dtype: torch.dtype, seed: int, H: int = 10) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator).to(dtype)
    return x, random_routing(T, E, k, kind, generator, torch.promote_types(dtype, torch.float32))


def weights_of(experts: ExpertMap, dtype: torch.dtype, H: int = 10, I: int = 6):
    generator = torch.Generator().manual_seed(5)
    w1 = (torch.randn(E, 2 * I, H, generator=generator) / H**0.5).to(dtype)
    w2 = (torch.randn(E, H, I, generator=generator) / I**0.5).to(dtype)
    return w1, w2, experts.experts_of(dist.get_rank())


def same_as_reference(R: int) -> None:
    """On every rank: what arrives, what comes back, and both with experts between, gradients included."""
    rank = dist.get_rank()
    torch.manual_seed(rank)  # a spawned process has no seed of the suite
    for placement in placements(R):
        experts = ExpertMap.of(placement, E, R)
        for seed, (tokens, k, kind) in enumerate(CASES):
            for dtype in (*DTYPES, torch.float64):
                x, routing = problem(tokens[rank], k, kind, dtype, 10 * seed + rank)
                arrives_and_returns(x, routing, experts)
                with_experts(x, routing, experts, dtype)


def arrives_and_returns(x, routing, experts):
    got = dispatch(x, routing, experts)
    rows, arrived = dispatch_ref(x, routing, experts)
    assert torch.equal(got.x, rows) and got.x.dtype == x.dtype
    assert torch.equal(got.routing.ids.long(), arrived.ids.long())
    assert torch.equal(got.routing.weights, arrived.weights) and got.routing.num_experts == arrived.num_experts
    y = torch.cos(rows) * (1 + dist.get_rank())
    assert_rows_close(combine(y, got), lambda y: combine_ref(y, routing, experts), y)
    later = dispatch(x, routing, experts, asynchronous=True)
    assert torch.equal(later.wait().x, rows) and torch.equal(later.routing.weights, arrived.weights)
    residual = torch.randn_like(x)
    assert_rows_close(
        combine(y, got, residual), lambda y, residual: residual + combine_ref(y, routing, experts), y, residual
    )


def with_experts(x, routing, experts, dtype):
    w1, w2, mine = weights_of(experts, dtype)

    def spread(x, weights, w1, w2):
        got = dispatch(x, Routing(routing.ids, weights, E), experts)
        # A rank without experts gets no rows.
        y = fused_experts(got.x, got.routing, w1[mine], w2[mine]) if mine else got.x
        return combine(y, got)

    def alone(x, weights, w1, w2):
        return fused_experts_ref(x, Routing(routing.ids, weights, E), w1, w2)

    args = x, routing.weights, w1, w2
    assert_rows_close(spread(*args), alone, *args)
    dy = torch.randn(x.shape).to(dtype)
    assert_grads_close(
        lambda x, weights: spread(x, weights, w1, w2),
        lambda x, weights: alone(x, weights, w1.to(x.dtype), w2.to(x.dtype)),
        dy,
        *args[:2],
        factor=4,  # a few tokens' weights are few numbers: plain torch is lucky in them as often as not
    )


@pytest.mark.parametrize("R", [2, 3, 4])
def test_forward_and_backward(R):
    assert ranks(R, same_as_reference, R) == [None] * R


def traffic() -> None:
    """A token travels once to a rank, whatever it wants there."""
    experts, rank = ExpertMap.of(None, E, 2), dist.get_rank()  # experts 0 to 3, 4 to 6
    ids = torch.tensor([[0, 1, 2], [4, 5, 6], [0, 4, 1], [E, -1, 99]])
    got = dispatch(torch.arange(4.0)[:, None].expand(4, 5), Routing(ids, torch.ones(4, 3), E), experts)
    assert got.splits.sent == [2, 2] and got.splits.received == [2, 2]
    assert got.x[:, 0].tolist() == ([0, 2, 0, 2] if rank == 0 else [1, 2, 1, 2])
    expected = [[0, 1, 2], [0, -1, 1]] if rank == 0 else [[0, 1, 2], [-1, 0, -1]]
    assert got.routing.ids.tolist() == 2 * expected and got.routing.weights.sum() == 2 * (5 if rank == 0 else 4)
    assert combine(got.x, got)[:, 0].tolist() == [0, 1, 4, 0]
    x, routing = problem(9, 3, "sentinels", torch.float32, rank)
    plain = dispatch(x, routing, experts)
    for dtype in ID_DTYPES[:4]:
        same = dispatch(x, Routing(routing.ids.to(dtype), routing.weights, E), experts)
        assert torch.equal(same.x, plain.x) and torch.equal(same.routing.ids, plain.routing.ids)
    for layout in LAYOUTS:
        odd = Routing(strided(routing.ids, layout), strided(routing.weights, layout), E)
        same = dispatch(strided(x, layout), odd, experts)
        assert torch.equal(same.x, plain.x) and torch.equal(same.routing.weights, plain.routing.weights)
    # Gradients of rows alone, and of weights alone.
    for which in (0, 1):
        leaves = [x.clone().requires_grad_(which == 0), routing.weights.clone().requires_grad_(which == 1)]
        got = dispatch(leaves[0], Routing(routing.ids, leaves[1], E), experts)
        (grad,) = torch.autograd.grad((got.x, got.routing.weights)[which].sum(), leaves[which])
        kept = (routing.ids >= 0) & (routing.ids < E)
        copies = torch.stack([(routing.ids >= 0) & (routing.ids < 4), (routing.ids >= 4) & (routing.ids < E)])
        wanted = copies.any(-1).sum(0)[:, None].expand(x.shape) if which == 0 else kept
        assert torch.equal(grad, wanted.float())


def test_what_travels():
    assert ranks(2, traffic) == [None] * 2


def bytes_sent(R: int, k: int) -> tuple[float, float]:
    """All that this rank gives to others over the rows that must go, one for each (token, rank): there and back, and
    of gradients of both.
    """
    rank, sent, real = dist.get_rank(), [], dist.all_to_all_single

    def counted(output, input, output_split_sizes=None, input_split_sizes=None, *args, **kwargs):
        splits = input_split_sizes or [len(input) // R] * R
        sent.append((len(input) and input[0].nbytes) * (sum(splits) - splits[rank]))
        return real(output, input, output_split_sizes, input_split_sizes, *args, **kwargs)

    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(64, 2048, generator=generator).bfloat16().requires_grad_()
    routing, experts = random_routing(64, 32, k, generator=generator), ExpertMap.of(None, 32, R)
    routing.weights.requires_grad_()
    dist.all_to_all_single = counted
    got = dispatch(x, routing, experts)
    y = combine(got.x * got.routing.weights.sum(1, keepdim=True).bfloat16(), got)
    forward = sum(sent)
    assert len(sent) == 3
    y.sum().backward()
    where = experts.expert_to_rank[routing.ids.long()]
    needed = sum(len(set(row.tolist()) - {rank}) for row in where)
    asked = sum(n for r, n in enumerate(got.splits.received) if r != rank)  # rows of others, whose results go back
    assert len(sent) == 5 and needed == sum(got.splits.sent) - got.splits.sent[rank]
    must = (needed + asked) * x[0].nbytes
    return forward / must, (sum(sent) - forward) / must


@pytest.mark.parametrize("k", [1, 2, 8, 16])
def test_bytes_sent(k):
    """With all that comes along at most 1.02 of the rows that must travel, at H = 2048 in bfloat16."""
    for shares in ranks(4, bytes_sent, 4, k):
        assert all(1 <= share <= 1.02 for share in shares), shares


def refused() -> list[str]:
    rank, told = dist.get_rank(), []
    odd = rank == 1
    x, routing = problem(4, 2, "uniform", torch.float32, rank)
    whole = ExpertMap.of(None, E, 3)
    other = ExpertMap.of([2, *whole.expert_to_rank.tolist()[1:]], E, 3)
    three = Routing(routing.ids.repeat(1, 2)[:, :3], routing.weights.repeat(1, 2)[:, :3], E)
    for call in (
        (x[:, :9] if odd else x, routing, whole),
        (x, three if odd else routing, whole),
        (x.bfloat16() if odd else x, routing, whole),
        (x.half(), Routing(routing.ids, routing.weights.half() if odd else routing.weights, E), whole),
        (x, routing, other if odd else whole),
        (x.requires_grad_() if odd else x.detach(), routing, whole),
        (x.detach(), routing, whole, None, False, None, None, 2 if odd else 1),
        (x.detach(), Routing(routing.ids, routing.weights, 5), ExpertMap.of(None, 5, 3))
        if odd
        else (x.detach(), routing, whole),
        (x.detach(), Routing(routing.ids, routing.weights, 5) if odd else routing, whole),
        (x.detach(), routing, ExpertMap.of(None, E, 4) if odd else whole),
        (x.detach().int() if odd else x.detach(), routing, whole),
        (x.detach(), Routing(routing.ids[1:], routing.weights, E) if odd else routing, whole),
        (x.detach(), (routing.ids, routing.weights) if odd else routing, whole),
    ):
        told.append(error_of(dispatch, *call))
    # The group is as it was.
    got = dispatch(x.detach(), routing, whole)
    assert combine(got.x, got).shape == x.shape
    for wrong in (got.x[1:], got.x[:, :9], got.x.bfloat16()):
        with pytest.raises(ValueError) as error:
            combine(wrong, got)
        told.append(str(error.value))
    return told


def test_errors():
    told = ranks(3, refused)
    same = [
        "H must be the same on every rank, got 10 on ranks 0, 2, 9 on rank 1",
        "k must be the same on every rank, got 2 on ranks 0, 2, 3 on rank 1",
        "the dtype of x must be the same on every rank, got float32 on ranks 0, 2, bfloat16 on rank 1",
        "the dtype of weights must be the same on every rank, got float32 on ranks 0, 2, float16 on rank 1",
        r"the checksum of placement must be the same on every rank, got \d+ on ranks 0, 2, \d+ on rank 1",
        "x.requires_grad must be the same on every rank, got no on ranks 0, 2, yes on rank 1",
        "the number of parts must be the same on every rank, got 1 on ranks 0, 2, 2 on rank 1",
        "E must be the same on every rank, got 7 on ranks 0, 2, 5 on rank 1",
    ]
    own = [
        "routing must be to E=7 experts, got 5",
        "experts must lie on the R=3 ranks, got 4",
        "x must have dtype Float, BFloat16, Half or Double, got Int",
        r"ids must have shape \[T=4, k\], got \[3, 2\]",
        "routing must be of type Routing, got tuple",
    ]
    elsewhere = r"every rank must be able to go on, got an error on rank 1 \(see there\)"
    for rank, texts in enumerate(told):
        *texts, fewer, narrower, rounded = texts
        expected = same + (own if rank == 1 else [elsewhere] * len(own))
        assert len(texts) == len(expected)
        for text, pattern in zip(texts, expected, strict=True):
            assert re.search(pattern, text), text
        assert re.fullmatch(r"y must have shape \[M=\d+, H=10\], got \[\d+, 10\]", fewer)
        assert re.fullmatch(r"y must have shape \[M=\d+, H=10\], got \[\d+, 9\]", narrower)
        assert rounded == "y must have the dtype of the rows dispatched (torch.float32), got torch.bfloat16"


@pytest.mark.parametrize("R", [1, 3, 8])
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_plan(shape, R):
    routing = shape.routing()
    ranks_of = torch.randint(0, R, (shape.E,), dtype=torch.int32)
    plan = dispatch_plan_ref(routing.ids, ranks_of, R)
    assert all(map(torch.equal, OPS.dispatch_plan(routing.ids, ranks_of, R), (plan.offsets, plan.tokens, plan.slots)))


def pack_args(shape, dtype, R, weight_dtype=torch.float32):
    routing = shape.routing()
    experts = ExpertMap.of(torch.randint(0, R, (shape.E,)), shape.E, R)
    offsets, tokens, _ = OPS.dispatch_plan(routing.ids, experts.expert_to_rank, R)
    x = torch.randn(shape.T, shape.H).to(dtype)
    maps = experts.expert_to_rank, experts.local_ids
    return x, routing.weights.to(weight_dtype), routing.ids, *maps, offsets, tokens[: offsets[-1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_pack(shape, dtype):
    for weight_dtype in (torch.float32, dtype):
        args = pack_args(shape, dtype, 3, weight_dtype)
        records = OPS.dispatch_pack(*args)
        assert torch.equal(records, dispatch_pack_ref(*args)) and records.shape[1] % 16 == 0
        unused = torch.cat([args[-1], args[-1].new_full((2,), -1)])
        assert torch.equal(dispatch_pack_ref(*args[:-1], unused)[:-2], records)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_pack_some(shape, dtype):
    """Records of some slots, in memory that there is."""
    args = pack_args(shape, dtype, 3)
    for payload in ("none", "int8", "float8_e4m3"):
        whole = OPS.dispatch_pack(*args, payload)
        assert torch.equal(whole, dispatch_pack_ref(*args, payload))
        for first, last in ((0, len(whole)), (len(whole) // 3, len(whole) // 2), (len(whole), len(whole))):
            records = torch.full_like(whole[first:last], 77)
            OPS.dispatch_pack_(records, *args, first, payload)
            assert torch.equal(records, whole[first:last])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_rows_of_two_places_are_added_as_those_of_one(shape, dtype):
    """Bit for bit: own rows at the begin, at the end and in between, strided, none or all."""
    offsets, tokens, slots = OPS.dispatch_plan(shape.routing().ids, torch.randint(0, 3, (shape.E,)).int(), 3)
    plan, N = DispatchPlan(offsets, tokens[: offsets[-1]], slots), int(offsets[-1])
    rows, residual = torch.randn(N, shape.H + 3).to(dtype)[:, : shape.H], torch.randn(shape.T, shape.H).to(dtype)
    for first, last in ((0, N // 2), (N // 2, N), (N // 3, N - N // 4), (0, 0), (0, N)):
        others = torch.cat([rows[:first], rows[last:]])
        for onto in (None, residual):
            got = OPS.dispatch_combine(others, rows[first:last], first, slots, onto)
            assert torch.equal(got, unpermute(rows, plan, None, onto))
            assert_rows_close(
                got,
                lambda rows, onto: unpermute_ref(rows, plan, None, onto),
                rows,
                torch.zeros_like(residual) if onto is None else onto,
            )


@pytest.mark.parametrize("threads", [2, 3])
def test_same_bits_for_every_number_of_threads(threads):
    before, shape = torch.get_num_threads(), Shape("several tasks of every kernel", 9001, 64, 8, 40, kind="sentinels")
    try:
        args = pack_args(shape, torch.float32, 5)
        torch.set_num_threads(1)
        plan, records = OPS.dispatch_plan(args[2], args[3], 5), OPS.dispatch_pack(*args)
        torch.set_num_threads(threads)
        assert all(map(torch.equal, OPS.dispatch_plan(args[2], args[3], 5), plan))
        assert torch.equal(OPS.dispatch_pack(*args), records)
    finally:
        torch.set_num_threads(before)


def test_compile():
    def pack(x, weights, ids, ranks_of, local_ids, offsets, tokens):
        return OPS.dispatch_plan(ids, ranks_of, 3)[2], OPS.dispatch_pack(
            x, weights, ids, ranks_of, local_ids, offsets, tokens
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pack, backend=counter, fullgraph=True, dynamic=True)
    for T in (3, 17, 64):
        args = pack_args(Shape("compiled", T, 8, 2, 16), torch.float32, 3)
        assert all(map(torch.equal, compiled(*args), pack(*args)))
    assert counter.frame_count <= 2


def checks(op, shape):
    """Arguments of an operator."""
    x, weights, ids, *_ = args = pack_args(shape, torch.bfloat16, 3)
    records = OPS.dispatch_pack(*args, "int8")
    rows, N = torch.zeros(len(records), shape.H, dtype=torch.bfloat16), len(records)
    slots = OPS.dispatch_plan(ids, args[3], 3)[2]
    return {
        "dispatch_plan": [(ids, args[3], 3), (ids, args[3], 3, x, weights)],
        "dispatch_pack": [args, (*args, "float8_e4m3")],
        "dispatch_pack_": [(records[N // 2 :], *args, N // 2, "int8")],
        "dispatch_unpack_": [(rows, records, "int8")],
        "dispatch_combine": [(rows[N // 2 :], rows[: N // 2], 0, slots, each) for each in (None, x)],
    }[op]


OPERATORS = ("dispatch_plan", "dispatch_pack", "dispatch_pack_", "dispatch_unpack_", "dispatch_combine")


@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(op):
    for shape in PERMUTE_SHAPES[:8]:
        for args in checks(op, shape):
            opcheck(getattr(OPS, op).default, args)


def read_early() -> None:
    """A reader that needs no gradient takes none from the others: rows of dispatch, results of combine."""
    x = torch.randn(4, 6, requires_grad=True)
    routing, experts = random_routing(4, E, 2), ExpertMap.of(None, E, dist.get_world_size())
    grads = []
    for early in (False, True):
        there = dispatch(x, routing, experts, asynchronous=True)
        with torch.set_grad_enabled(not early):
            there.wait()
        back = start_combine(there.x.cos(), there)
        with torch.set_grad_enabled(not early):
            first = back.wait()
        y = back.wait()
        assert torch.equal(first, y)
        grads.append(torch.autograd.grad(y.sum(), x, retain_graph=True)[0])
    assert torch.equal(*grads) and grads[0].any()
    first, y = back.wait(), back.wait(x)  # residual and results, twice the latter
    assert torch.equal(torch.autograd.grad((first + y).sum(), x)[0], 2 * grads[0] + 1)


def test_first_read_without_gradient():
    assert ranks(2, read_early) == [None] * 2


def read_partly() -> None:
    """A gradient of the residual alone, or a pass that failed, leaves nothing for the next."""
    x, residual = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    routing, experts = random_routing(4, E, 2), ExpertMap.of(None, E, dist.get_world_size())
    there = dispatch(x, routing, experts, payload="int8")
    end = time.monotonic() + 20  # a thread of Gloo may hold what it has sent a little longer
    while held := [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dtype == torch.uint8]:
        assert time.monotonic() < end, held  # all was read
        del held
        time.sleep(0.01)
    y = combine(there.x * 2, there, residual).sum()
    expected = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, residual, retain_graph=True)[0], torch.ones(4, 6))
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


def test_a_gradient_of_the_residual_alone():
    assert ranks(2, read_partly) == [None] * 2
