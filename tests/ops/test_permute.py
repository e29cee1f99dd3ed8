import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from moert import _C, permute, permute_plan, unpermute
from moert.ops.permute import permute_plan_ref, permute_ref, plan_of, unpermute_ref
from moert.testing import DTYPES, ID_DTYPES, LAYOUTS, PERMUTE_SHAPES, assert_rows_close, random_routing, strided
from moert.types import DispatchPlan

ISAS = ("generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
OPS = torch.ops.moert


def assert_plan_equal(plan, ref):
    for name in ("offsets", "tokens", "slots"):
        assert torch.equal(getattr(plan, name), getattr(ref, name)), name


def case(shape, dtype=torch.float32):
    routing = shape.routing(dtype=torch.promote_types(dtype, torch.float32))
    plan = permute_plan(routing.ids, shape.E)
    x = torch.randn(shape.T, shape.H).to(dtype)
    rows = torch.randn(shape.T * shape.k, shape.H).to(dtype)
    return plan, x, rows, routing.weights


@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=str)
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_forward_plan(shape, id_dtype):
    # Where E does not fit the dtype, ids wrap; what they wrap to is routed or dropped like any other.
    ids = shape.routing(id_dtype=id_dtype).ids
    assert_plan_equal(permute_plan(ids, shape.E), permute_plan_ref(ids, shape.E))


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_forward(shape, dtype):
    plan, x, rows, weights = case(shape, dtype)
    assert torch.equal(permute(x, plan), permute_ref(x, plan))
    assert_rows_close(unpermute(rows, plan), lambda rows: unpermute_ref(rows, plan), rows)
    assert_rows_close(
        unpermute(rows, plan, weights), lambda *args: unpermute_ref(args[0], plan, args[1]), rows, weights
    )


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_backward(shape, dtype):
    plan, x, rows, weights = case(shape, dtype)
    drows, dy = torch.randn_like(rows), torch.randn_like(x)

    def dx(fn):
        return lambda x: torch.autograd.grad(fn(x.requires_grad_(), plan), x, drows.to(x.dtype))[0]

    def grads(fn, i):
        def grad(rows, weights):
            args = rows.detach().requires_grad_(), weights.detach().requires_grad_()
            return torch.autograd.grad(fn(args[0], plan, args[1]), args, dy.to(rows.dtype))[i]

        return grad

    assert_rows_close(dx(permute)(x), dx(permute_ref), x)
    assert_rows_close(grads(unpermute, 0)(rows, weights), grads(unpermute_ref, 0), rows, weights)
    assert_rows_close(grads(unpermute, 1)(rows, weights), grads(unpermute_ref, 1), rows, weights)


@pytest.mark.parametrize("kind", ("uniform", "one_expert", "sentinels"))
def test_gradcheck_twice(kind):
    routing = random_routing(5, 4, 2, kind, dtype=torch.float64)
    plan = permute_plan(routing.ids, 4)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    weights = routing.weights.requires_grad_()
    for fn, inputs in (
        (lambda x: permute(x, plan), (x,)),
        (lambda rows: unpermute(rows, plan), (rows,)),
        (lambda rows, weights: unpermute(rows, plan, weights), (rows, weights)),
        (lambda rows, weights, x: unpermute(rows, plan, weights, x), (rows, weights, x)),
        (lambda *args: OPS.unpermute_backward(*args[:2], plan.tokens, plan.slots, args[2]), (x, rows, weights)),
    ):
        assert gradcheck(fn, inputs)
        assert gradgradcheck(fn, inputs)


def test_weights_in_the_dtype_of_the_rows_give_their_gradient_in_it():
    plan, _, rows, weights = case(PERMUTE_SHAPES[4], torch.bfloat16)
    low = weights.bfloat16().requires_grad_()
    unpermute(rows, plan, low).sum().backward()
    wide = low.detach().float().requires_grad_()
    unpermute(rows, plan, wide).sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert torch.equal(low.grad, wide.grad.bfloat16())


@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_there_and_back(shape):
    plan, x, _, weights = case(shape)
    kept = (plan.slots >= 0).float()
    assert_rows_close(unpermute(permute(x, plan), plan), lambda x: x * kept.sum(-1, keepdim=True).to(x.dtype), x)
    norm = (weights * kept).sum(-1, keepdim=True)
    assert_rows_close(unpermute(permute(x, plan), plan, weights), lambda x: x * norm.to(x.dtype), x, floor=1e-5)


@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_plan_is_a_stable_sort(shape):
    ids = shape.routing().ids
    plan = permute_plan(ids, shape.E)
    used = int(plan.offsets[-1])
    for e in range(shape.E):
        tokens = plan.tokens[plan.offsets[e] : plan.offsets[e + 1]]
        assert torch.equal(tokens, torch.where(ids == e)[0].int())
    assert (plan.tokens[used:] == -1).all()
    assert sorted(plan.slots[plan.slots >= 0].tolist()) == list(range(used))


@pytest.mark.parametrize("threads", (1, 2, 3, 7))
def test_same_bits_for_every_number_of_threads(threads):
    # Enough choices (> 2^16) for the parallel sort, enough rows for many tasks.
    routing = random_routing(9001, 61, 8, "sentinels")
    x, dy = torch.randn(9001, 33), torch.randn(9001, 33)

    def run():
        plan = permute_plan(routing.ids, 61)
        rows = permute(x, plan)
        backward = OPS.unpermute_backward(dy, rows, plan.tokens, plan.slots, routing.weights)
        return plan.offsets, plan.tokens, plan.slots, rows, unpermute(rows, plan, routing.weights), *backward

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        torch.set_num_threads(threads)
        for _ in range(3):
            assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(before)
    assert_plan_equal(DispatchPlan(*expected[:3]), permute_plan_ref(routing.ids, 61))


def test_a_row_does_not_depend_on_the_batch():
    plan, _, rows, weights = case(PERMUTE_SHAPES[-1])
    y = unpermute(rows, plan, weights)
    for t in (0, 1, 1500, 3000):
        alone = permute_plan(torch.zeros(1, 8, dtype=torch.int32), 1)
        assert torch.equal(unpermute(rows[plan.slots[t]], alone, weights[t : t + 1])[0], y[t])


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_gives_the_same_plan(isa):
    if ISAS.index(isa) > ISAS.index(_C.best_isa()):
        pytest.skip(f"needs a CPU with {isa}")
    program = """
import torch
from moert import _C, permute, permute_plan, unpermute
from moert.ops.permute import permute_plan_ref, permute_ref, unpermute_ref
from moert.testing import DTYPES, PERMUTE_SHAPES, assert_rows_close
for shape in PERMUTE_SHAPES:
    routing = shape.routing()
    plan, ref = permute_plan(routing.ids, shape.E), permute_plan_ref(routing.ids, shape.E)
    assert all(torch.equal(getattr(plan, name), getattr(ref, name)) for name in ("offsets", "tokens", "slots"))
    for dtype in DTYPES:
        x = torch.randn(shape.T, shape.H).to(dtype)
        rows = permute(x, plan)
        assert torch.equal(rows, permute_ref(x, plan))
        y = unpermute(rows, plan, routing.weights)
        assert_rows_close(y, lambda rows, weights: unpermute_ref(rows, plan, weights), rows, routing.weights)
print(_C.isa())
"""
    run = subprocess.run([sys.executable, "-c", program], env={**os.environ, "MOERT_ISA": isa}, capture_output=True)
    assert run.stdout.decode().strip() == isa, run.stderr.decode()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(layout, dtype):
    routing = random_routing(7, 5, 3, "sentinels")
    ids, weights = strided(routing.ids, layout), strided(routing.weights, layout)
    plan = permute_plan(routing.ids, 5)
    assert_plan_equal(permute_plan(ids, 5), plan)
    far = DispatchPlan(plan.offsets, strided(plan.tokens[None], layout)[0], strided(plan.slots, layout))
    x, rows, dy = torch.randn(7, 19).to(dtype), torch.randn(21, 19).to(dtype), torch.randn(7, 19).to(dtype)
    assert torch.equal(permute(strided(x, layout), far), permute(x, plan))
    assert torch.equal(unpermute(strided(rows, layout), far, weights), unpermute(rows, plan, routing.weights))
    got = OPS.unpermute_backward(strided(dy, layout), strided(rows, layout), far.tokens, far.slots, weights)
    expected = OPS.unpermute_backward(dy, rows, plan.tokens, plan.slots, routing.weights)
    assert all(map(torch.equal, got, expected))


def test_expanded_gradients():
    routing = random_routing(6, 4, 2)
    plan = permute_plan(routing.ids, 4)
    x = torch.randn(6, 5, requires_grad=True)
    permute(x, plan).sum().backward()
    assert torch.equal(x.grad, torch.full((6, 5), 2.0))
    rows, weights = torch.randn(12, 5, requires_grad=True), routing.weights.requires_grad_()
    unpermute(rows, plan, weights).sum().backward()
    assert torch.equal(rows.grad[plan.slots], weights.detach()[..., None].expand(6, 2, 5))
    assert_rows_close(weights.grad, lambda rows: rows[plan.slots].sum(-1), rows.detach())


def test_dropped_choices_give_nothing_and_get_no_gradient():
    ids = torch.tensor([[-1, 4], [2**62, -(2**63)], [1, 2**32 + 1]])
    plan = permute_plan(ids, 4)
    assert plan.offsets.tolist() == [0, 0, 1, 1, 1]
    assert plan.slots.tolist() == [[-1, -1], [-1, -1], [0, -1]]
    x = torch.ones(3, 2, requires_grad=True)
    weights = torch.full((3, 2), torch.nan)
    weights[2, 0] = 3
    weights.requires_grad_()
    y = unpermute(permute(x, plan), plan, weights)
    assert y.tolist() == [[0, 0], [0, 0], [3, 3]]
    y.sum().backward()
    assert x.grad.tolist() == [[0, 0], [0, 0], [3, 3]]
    assert weights.grad.tolist() == [[0, 0], [0, 0], [2, 0]]


@pytest.mark.parametrize("T,k,H", ((0, 2, 3), (3, 0, 3), (3, 2, 0), (0, 0, 0)))
def test_empty(T, k, H):
    plan = permute_plan(torch.zeros(T, k, dtype=torch.int64), 4)
    assert plan.offsets.tolist() == [0, T * k, T * k, T * k, T * k]
    x = torch.randn(T, H, requires_grad=True)
    weights = torch.ones(T, k, requires_grad=True)
    rows = permute(x, plan)
    assert rows.shape == (T * k, H)
    y = unpermute(rows, plan, weights)
    assert torch.equal(y, x * k)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((T, H), float(k)))
    assert torch.equal(weights.grad, x.detach().sum(-1, keepdim=True).expand(T, k))


@pytest.mark.parametrize("capacity", (0, 1, 3, 50))
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_capacity_gives_every_expert_the_same_number_of_slots(shape, capacity):
    ids = shape.routing().ids
    plan = permute_plan(ids, shape.E, capacity)
    assert_plan_equal(plan, permute_plan_ref(ids, shape.E, capacity))
    free = permute_plan(ids, shape.E)
    for e in range(shape.E):  # the first choices of each expert stay, in the order of the tokens
        mine = plan.tokens[e * capacity : (e + 1) * capacity]
        first = free.tokens[free.offsets[e] : free.offsets[e + 1]][:capacity]
        assert torch.equal(mine[: len(first)], first) and (mine[len(first) :] == -1).all()


def test_rows_of_a_capacity_plan_there_and_back():
    routing = random_routing(37, 5, 2, "sentinels", dtype=torch.float64)
    plan = permute_plan(routing.ids, 5, 9)
    x = torch.randn(37, 6, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(45, 6, dtype=torch.float64, requires_grad=True)
    weights = routing.weights.requires_grad_()
    assert torch.equal(permute(x, plan), permute_ref(x, plan))
    assert_rows_close(unpermute(rows, plan, weights), lambda r, w: unpermute_ref(r, plan, w), rows, weights)
    assert gradcheck(lambda x: permute(x, plan), x)
    assert gradcheck(lambda rows, weights: unpermute(rows, plan, weights), (rows, weights))


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("shape", PERMUTE_SHAPES, ids=str)
def test_residual_is_added_before_the_only_rounding(shape, dtype):
    plan, x, rows, weights = case(shape, dtype)
    y = unpermute(rows, plan, weights, x)
    assert_rows_close(y, lambda rows, weights, x: unpermute_ref(rows, plan, weights, x), rows, weights, x)
    untouched = (plan.slots < 0).all(-1)
    assert torch.equal(y[untouched], x[untouched])
    assert torch.equal(unpermute(rows, plan, weights, strided(x, "columns_first")), y)
    grad = torch.autograd.grad(unpermute(rows, plan, weights, x.requires_grad_()), x, dy := torch.randn_like(x))[0]
    assert torch.equal(grad, dy)


def test_a_plan_that_contradicts_itself_has_a_defined_result():
    # Both choices of both tokens claim slot 0, which claims token 1.
    tokens, slots = torch.tensor([1, -1, -1, -1], dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
    rows, dy, weights = torch.ones(4, 3), torch.full((2, 3), 2.0), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    drows, dweights = OPS.unpermute_backward(dy, rows, tokens, slots, weights)
    assert drows.tolist() == [[14.0] * 3] + [[0.0] * 3] * 3
    assert dweights.tolist() == [[0, 0], [6, 6]]


def test_compile():
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x, ids, weights):
        plan = permute_plan(ids, 8)
        return unpermute(permute(x, plan) * 2, plan, weights)

    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for T in range(1, 65):
        routing = random_routing(T, 8, 2, "sentinels")
        x = torch.randn(T, 5, requires_grad=True)
        got = compiled(x, routing.ids, routing.weights)
        assert torch.equal(got, layer(x, routing.ids, routing.weights))
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, layer(x, routing.ids, routing.weights))]
        assert torch.equal(*grads)
    assert counter.frame_count <= 2


def opcheck_samples():
    for shape in PERMUTE_SHAPES[:8]:
        for dtype in (torch.float32, torch.bfloat16):
            routing = shape.routing()
            plan = permute_plan(routing.ids, shape.E)
            indices = plan.tokens, plan.slots
            x = torch.randn(shape.T, shape.H).to(dtype).requires_grad_()
            rows = torch.randn(shape.T * shape.k, shape.H).to(dtype).requires_grad_()
            weights = routing.weights.requires_grad_()
            yield "permute_plan", (routing.ids, shape.E)
            yield "permute", (x, *indices)
            yield "unpermute", (rows, *indices, None)
            yield "unpermute", (rows, *indices, weights)
            yield "unpermute", (rows, *indices, weights, x)
            yield "permute_plan", (routing.ids, shape.E, 2)
            yield "unpermute_backward", (x, rows, *indices, weights)


@pytest.mark.parametrize("op", ("permute_plan", "permute", "unpermute", "unpermute_backward"))
def test_opcheck(op):
    samples = [args for name, args in opcheck_samples() if name == op]
    assert len(samples) >= 8
    for args in samples:
        opcheck(getattr(OPS, op).default, args)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


TOKENS, SLOTS = ints(0, 1, 1, 2, 2, -1), ints(0, 1, 2, 3, 4, -1).view(3, 2)
ROWS, X, WEIGHTS = torch.zeros(6, 4), torch.zeros(3, 4), torch.zeros(3, 2)


@pytest.mark.parametrize(
    "op,args,message",
    [
        ("permute_plan", (SLOTS[0], 4), r"ids must be \[T, k\], got shape \[2\]"),
        ("permute_plan", (SLOTS.float(), 4), "ids must have an integer dtype, got Float"),
        ("permute_plan", (SLOTS.bool(), 4), "ids must have an integer dtype, got Bool"),
        ("permute_plan", (SLOTS, 0), r"num_experts must be in \[1, 2\^31 - 2\], got 0"),
        ("permute_plan", (SLOTS, -3), r"num_experts must be in \[1, 2\^31 - 2\], got -3"),
        ("permute_plan", (SLOTS, 2**31 - 1), r"num_experts must be in \[1, 2\^31 - 2\], got 2147483647"),
        (
            "permute_plan",
            (torch.zeros(1, 1, dtype=torch.int8).expand(2**16, 2**15), 4),
            r"ids must have fewer than 2\^31 elements, got shape \[65536, 32768\]",
        ),
        ("permute", (X[0], TOKENS, SLOTS), r"x must be \[T, H\], got shape \[4\]"),
        ("permute", (ROWS, TOKENS, SLOTS), r"x must have shape \[T=3, H\], got \[6, 4\]"),
        ("permute", (X.int(), TOKENS, SLOTS), "x must have dtype Float, BFloat16, Half or Double, got Int"),
        ("permute", (X, TOKENS.long(), SLOTS), "tokens must have dtype Int, got Long"),
        ("permute", (X, TOKENS, SLOTS.long()), "slots must have dtype Int, got Long"),
        ("permute", (X, TOKENS, SLOTS[0]), r"slots must be \[T, k\], got shape \[2\]"),
        ("permute", (X, TOKENS[None], SLOTS), r"tokens must be \[S\], got shape \[1, 6\]"),
        ("permute", (X, TOKENS + 1, SLOTS), r"tokens must hold -1 or be in \[0, T=3\), got 3"),
        ("permute", (X, TOKENS - 1, SLOTS), r"tokens must hold -1 or be in \[0, T=3\), got -2"),
        ("unpermute", (ROWS[0], TOKENS, SLOTS, None), r"rows must be \[S, H\], got shape \[4\]"),
        ("unpermute", (X, TOKENS, SLOTS, None), r"rows must have shape \[S=6, H\], got \[3, 4\]"),
        ("unpermute", (ROWS.bool(), TOKENS, SLOTS, None), "rows must have dtype Float, BFloat16, Half or Double, got"),
        ("unpermute", (ROWS, TOKENS, SLOTS + 2, None), r"slots must hold -1 or be in \[0, S=6\), got 6"),
        ("unpermute", (ROWS, TOKENS, SLOTS - 2**31, None), r"slots must hold -1 or be in \[0, S=6\), got -2147483648"),
        ("permute_plan", (SLOTS, 4, -1), r"capacity must be in \[0, 2\^31 / num_experts\), got -1"),
        ("permute_plan", (SLOTS, 4, 2**30), r"capacity must be in \[0, 2\^31 / num_experts\), got 1073741824"),
        ("unpermute", (ROWS, TOKENS[1:], SLOTS, None), r"rows must have shape \[S=5, H\], got \[6, 4\]"),
        ("unpermute", (ROWS, TOKENS, SLOTS, None, ROWS), r"residual must have shape \[T=3, H=4\], got \[6, 4\]"),
        ("unpermute", (ROWS, TOKENS, SLOTS, None, X.half()), "residual must have the dtype of rows, Float, got Half"),
        ("unpermute", (ROWS, TOKENS, SLOTS, X), r"weights must have shape \[T=3, k=2\], got \[3, 4\]"),
        (
            "unpermute",
            (ROWS, TOKENS, SLOTS, WEIGHTS.double()),
            "weights must have dtype Float or that of rows, got Dou",
        ),
        (
            "unpermute",
            (ROWS.half(), TOKENS, SLOTS, WEIGHTS.bfloat16()),
            "weights must have dtype Float or that of rows",
        ),
        ("unpermute_backward", (ROWS, ROWS, TOKENS, SLOTS, WEIGHTS), r"dy must have shape \[T=3, H=4\], got \[6, 4\]"),
        ("unpermute_backward", (X.half(), ROWS, TOKENS, SLOTS, WEIGHTS), "dy must have the dtype of rows, Float, got"),
        (
            "unpermute_backward",
            (X, ROWS, TOKENS + 1, SLOTS, WEIGHTS),
            r"tokens must hold -1 or be in \[0, T=3\), got 3",
        ),
        ("unpermute_backward", (X, ROWS, TOKENS, SLOTS + 9, WEIGHTS), r"slots must hold -1 or be in \[0, S=6\), got 9"),
    ],
)
def test_errors(op, args, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, op)(*args)


def test_a_plan_of_another_routing():
    routing, other = random_routing(5, 4, 2), random_routing(6, 4, 2)
    plan = permute_plan(routing.ids, 4)
    assert plan_of(replace(routing, plan=plan)) is plan
    assert torch.equal(plan_of(routing).slots, plan.slots)
    with pytest.raises(ValueError, match=r"slots of routing.plan must have shape \[6, 2\], got \[5, 2\]"):
        plan_of(replace(other, plan=plan))
    with pytest.raises(ValueError, match=r"offsets of routing.plan must have shape \[9\], got \[5\]"):
        plan_of(replace(routing, num_experts=8, plan=plan))
