"""Every routed operator at its boundary: odd routings, NaN and infinity, odd memory.

An operator is an entry of OPERATORS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moert import permute, permute_plan, unpermute
from moert.ops.fused_experts import fused_experts
from moert.ops.gating import topk_gating, topk_gating_ref
from moert.ops.grouped_gemm import grouped_gemm
from moert.testing import ID_DTYPES, LAYOUTS, assert_rows_close, random_routing, row_error, strided
from moert.types import Routing

H = 9


@dataclass(frozen=True)
class Operator:
    """y = run(x, routing, *params), where every param has one part an expert, and what an expert makes of one row."""

    name: str
    run: Callable
    expert: Callable
    shapes: tuple[tuple[int, ...], ...] = ()

    def __str__(self):
        return self.name

    def params(self, E: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return tuple((torch.randn(E, *shape) / 3).to(dtype) for shape in self.shapes)


def run_permute(x, routing):
    plan = permute_plan(routing.ids, routing.num_experts)
    return unpermute(permute(x, plan), plan, routing.weights)


def run_grouped_gemm(x, routing, w, bias):
    plan = permute_plan(routing.ids, routing.num_experts)
    return unpermute(grouped_gemm(permute(x, plan), w, plan.offsets, bias), plan, routing.weights)


def run_gathering_gemm(x, routing, w, bias):
    plan = permute_plan(routing.ids, routing.num_experts)
    return unpermute(grouped_gemm(x, w, plan.offsets, bias, plan.tokens), plan, routing.weights)


def run_fused_experts(x, routing, w1, w2, b1, b2):
    return fused_experts(x, routing, w1, w2, (b1, b2))


def expert_ffn(row, w1, w2, b1, b2):
    gate, up = (w1 @ row + b1).chunk(2)
    return w2 @ (F.silu(gate) * up) + b2


FFN = ((10, H), (H, 5), (10,), (H,))
OPERATORS = (
    Operator("permute", run_permute, lambda row: row),
    Operator("grouped_gemm", run_grouped_gemm, lambda row, w, bias: w @ row + bias, ((H, H), (H,))),
    Operator("gathering_gemm", run_gathering_gemm, lambda row, w, bias: w @ row + bias, ((H, H), (H,))),
    Operator("fused_experts", run_fused_experts, expert_ffn, FFN),
)


def reference(operator, ids, E):
    """The same by hand, choice by choice; ids are Python integers of any size."""

    def run(x, weights, *params):
        rows = []
        for t, choices in enumerate(ids.tolist()):
            y = torch.zeros_like(x[t])
            for j, e in enumerate(choices):
                if 0 <= e < E:
                    y = y + weights[t, j].to(x.dtype) * operator.expert(x[t], *(p[e] for p in params))
            rows.append(y)
        return torch.stack(rows) if rows else torch.zeros_like(x)

    return run


def grads(fn, *args):
    """Gradients of a fixed mixture of the outputs by all arguments."""
    leaves = [a.detach().requires_grad_() for a in args]
    y = fn(*leaves)
    if not y.requires_grad:
        return [torch.zeros_like(a) for a in args]
    dy = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    out = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(args, out, strict=True)]


LAST = 2**31 - 1
EDGES = {
    "T0": (4, torch.zeros(0, 2, dtype=torch.int64)),
    "T1": (4, torch.tensor([[3, 0]])),
    "k0": (4, torch.zeros(3, 0, dtype=torch.int64)),
    "k_is_E": (3, torch.tensor([[0, 1, 2], [2, 0, 1]])),
    "E1": (1, torch.zeros(5, 1, dtype=torch.int64)),
    "all_to_one": (5, torch.full((9, 2), 3)),
    "all_dropped": (4, torch.tensor([[-1, 4], [4, -1], [-1, -1]])),
    "repeated": (4, torch.tensor([[1, 1, 2], [0, 0, 0]])),
    "empty_experts": (40, torch.tensor([[0, 39], [39, 17]])),
    "sentinels": (4, torch.tensor([[-1, 0], [3, 4], [-2, 5], [1, 127]])),
    "int32_ends": (4, torch.tensor([[LAST, 1], [-LAST - 1, 2]])),
    "int64_ends": (4, torch.tensor([[2**63 - 1, 1], [-(2**63), 3]])),
    "wraps_to_an_expert": (4, torch.tensor([[2**32, 1], [2**32 + 3, 2], [-(2**32) + 1, 0]])),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_edge_routings(operator, edge, dtype):
    E, ids = EDGES[edge]
    T, k = ids.shape
    args = torch.randn(T, H).to(dtype), torch.rand(T, k) + 0.1, *operator.params(E, dtype)
    ref = reference(operator, ids, E)

    def run(x, weights, *params):
        return operator.run(x, Routing(ids, weights, E), *params)

    y = run(*args)
    assert_rows_close(y, ref, *args)
    kept = (ids >= 0) & (ids < E)
    assert (y[~kept.any(-1)] == 0).all()
    if dtype == torch.float32:
        for i, grad in enumerate(grads(run, *args)):
            assert_rows_close(grad.flatten(1), lambda *a, i=i: grads(ref, *a)[i].flatten(1), *args, floor=1e-5)
            if i == 0:
                assert (grad[~kept.any(-1)] == 0).all()
            if i == 1:
                assert (grad[~kept] == 0).all()


@pytest.mark.parametrize("id_dtype", (*ID_DTYPES, torch.uint16, torch.uint32, torch.uint64), ids=str)
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_ids_of_any_integer_dtype(operator, id_dtype):
    ids = torch.tensor([[0, 3], [-1, 2], [4, 1], [2, 2], [100, 0]])
    x, weights, params = torch.randn(5, H), torch.rand(5, 2), operator.params(4)
    expected = operator.run(x, Routing(ids, weights, 4), *params)
    # -1 becomes the largest number of an unsigned type: dropped all the same.
    assert torch.equal(operator.run(x, Routing(ids.to(id_dtype), weights, 4), *params), expected)


def poison_case(operator):
    routing = random_routing(40, 6, 2, "sentinels")
    routing.ids[7], routing.ids[8] = torch.tensor([-1, 6]), torch.tensor([2, 5])
    return torch.randn(40, H), routing, operator.params(6)


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_poison_stays_in_its_rows(operator, value):
    x, routing, params = poison_case(operator)
    ids, weights = routing.ids, routing.weights
    clean = operator.run(x, routing, *params)
    kept = (ids >= 0) & (ids < 6)

    def check(poisoned, y):
        assert torch.equal(y[~poisoned], clean[~poisoned])
        assert not y[poisoned].isfinite().all(-1).any()

    token = torch.zeros(40, dtype=torch.bool)
    token[8] = True
    check(token, operator.run(x.masked_fill(token[:, None], value), routing, *params))
    check(token, operator.run(x, Routing(ids, weights.masked_fill(token[:, None], value), 6), *params))

    check(token & ~token, operator.run(x, Routing(ids, weights.masked_fill(~kept, value), 6), *params))
    dropped = ~kept.any(-1)
    assert dropped[7]
    check(token & ~token, operator.run(x.masked_fill(dropped[:, None], value), routing, *params))

    for i, param in enumerate(params):
        bad = param.clone()
        bad[5] = value
        check((ids == 5).any(-1), operator.run(x, routing, *params[:i], bad, *params[i + 1 :]))


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_poison_stays_in_its_gradients(operator):
    x, routing, params = poison_case(operator)
    kept = (routing.ids >= 0) & (routing.ids < 6)

    def run(dy, x=x, weights=routing.weights):
        leaves = [a.detach().requires_grad_() for a in (x, weights, *params)]
        y = operator.run(leaves[0], Routing(routing.ids, leaves[1], 6), *leaves[2:])
        return torch.autograd.grad(y, leaves, dy)

    dy = torch.randn(40, H)
    clean = run(dy)
    bad = dy.clone()
    bad[8] = torch.nan
    others = torch.arange(40) != 8
    for got in (run(bad), run(dy, x=x.masked_fill(~others[:, None], torch.nan))):
        assert torch.equal(got[0][others], clean[0][others]) and torch.equal(got[1][others], clean[1][others])
        assert got[1][8].isnan().all()
        for grad, expected in zip(got[2:], clean[2:], strict=True):  # token 8 went to experts 2 and 5
            assert torch.equal(grad[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
    # Neither the weight, the gradient nor the row of a dropped choice reaches anything.
    got = run(dy, weights=routing.weights.masked_fill(~kept, torch.nan))
    assert all(map(torch.equal, got, clean))
    bad, lost = dy.clone(), x.clone()
    bad[7] = lost[7] = torch.nan
    assert all(map(torch.equal, run(bad, x=lost), clean))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_any_memory_layout(operator, dtype, layout):
    routing = random_routing(7, 4, 3, "sentinels")
    args = torch.randn(7, H).to(dtype), routing.weights, *operator.params(4, dtype)

    def run(x, weights, *params, ids=routing.ids):
        return operator.run(x, Routing(ids, weights, 4), *params)

    ref = reference(operator, routing.ids, 4)
    assert torch.equal(run(*args, ids=strided(routing.ids, layout)), run(*args))
    for i, arg in enumerate(args):
        odd = [strided(arg, layout) if j == i else a for j, a in enumerate(args)]
        assert_rows_close(run(*odd), ref, *args)
        for j, grad in enumerate(grads(run, *odd)):
            assert_rows_close(grad.flatten(1), lambda *a, j=j: grads(ref, *a)[j].flatten(1), *args, floor=1e-5)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_zero_strides(operator):
    ids = torch.tensor([[1, 2]]).expand(6, 2)
    params = operator.params(4)
    same_rows = torch.randn(1, H).expand(6, H), torch.rand(1, 2).expand(6, 2), *(p[:1].expand(p.shape) for p in params)
    same_columns = [
        a[..., :1].expand(a.shape) for a in (torch.randn(6, H), torch.rand(6, 2), *(p.clone() for p in params))
    ]

    def run(x, weights, *params):
        return operator.run(x, Routing(ids, weights, 4), *params)

    for args in (same_rows, same_columns):
        assert_rows_close(run(*args), reference(operator, ids, 4), *args)
    # The gradient of a sum is one number, expanded.
    x = torch.randn(6, H, requires_grad=True)
    y = run(x, same_rows[1], *params)
    got = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(got, torch.autograd.grad(y, x, torch.ones(6, H))[0])


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_any_mix_of_requires_grad(operator):
    routing = random_routing(7, 4, 2, "sentinels")
    args = torch.randn(7, H), routing.weights, *operator.params(4)

    def run(x, weights, *params):
        return operator.run(x, Routing(routing.ids, weights, 4), *params)

    every = grads(run, *args)
    for i in range(len(args)):
        got = grads(lambda a, i=i: run(*args[:i], a, *args[i + 1 :]), args[i])[0]
        assert torch.equal(got, every[i])
    with torch.no_grad():
        assert not run(*(a.detach().requires_grad_() for a in args)).requires_grad


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_autocast(operator):
    routing = random_routing(7, 4, 2, "sentinels")
    x, params = torch.randn(7, H), operator.params(4)
    expected = reference(operator, routing.ids, 4)(x, routing.weights, *params)
    with torch.autocast("cpu", torch.bfloat16):
        y = operator.run(x, routing, *params)
    assert row_error(y, expected) < 0.03  # four roundings to 8 bits


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_meta_has_the_shape_and_dtype_of_the_result(operator):
    routing = random_routing(7, 4, 2)
    for dtype in (torch.float32, torch.bfloat16):
        x, params = torch.randn(7, H, dtype=dtype), operator.params(4, dtype)
        y = operator.run(x, routing, *params)
        far = Routing(routing.ids.to("meta"), routing.weights.to("meta"), 4)
        fake = operator.run(x.to("meta"), far, *(p.to("meta") for p in params))
        assert (fake.device.type, fake.shape, fake.dtype, fake.stride()) == ("meta", y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("score", ("softmax", "softmax_over_topk", "sigmoid", "relu"))
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_gating_of_poisoned_logits(value, score):
    """Ids are distinct and in range whatever the logits, and other tokens do not notice."""
    logits = torch.randn(9, 12)
    clean_weights, clean_ids = topk_gating(logits, 5, score)
    some, whole = logits.clone(), logits.clone()
    some[4, ::2], whole[4] = value, value
    others = torch.arange(9) != 4
    for bad in (some, whole):
        weights, ids = topk_gating(bad, 5, score)
        assert torch.equal(weights[others], clean_weights[others]) and torch.equal(ids[others], clean_ids[others])
        assert ids.min() >= 0 and ids.max() < 12
        assert all(len(set(row)) == 5 for row in ids.tolist())
        dlogits = grads(lambda x: topk_gating(x, 5, score)[0], bad)[0]
        assert torch.equal(dlogits[others], grads(lambda x: topk_gating(x, 5, score)[0], logits)[0][others])


@pytest.mark.parametrize("T,E,k", ((0, 4, 2), (1, 4, 2), (3, 1, 1), (3, 4, 0), (3, 4, 4)), ids=str)
def test_gating_edges(T, E, k):
    logits = torch.randn(T, E)
    weights, ids = topk_gating(logits, k)
    assert torch.equal(ids, topk_gating_ref(logits, k)[1])
    assert_rows_close(weights, lambda x: topk_gating_ref(x, k)[0], logits)
    assert_rows_close(
        grads(lambda x: topk_gating(x, k)[0], logits)[0],
        lambda x: grads(lambda x: topk_gating_ref(x, k)[0], x)[0],
        logits,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gating_of_any_memory_layout(layout):
    logits, bias = torch.randn(5, 9), torch.randn(2, 9)
    expected = topk_gating(logits, 3, "sigmoid", bias[0])
    got = topk_gating(strided(logits, layout), 3, "sigmoid", strided(bias, layout)[0])
    assert all(map(torch.equal, got, expected))
    flat = topk_gating(logits[:, :1].expand(5, 9), 3, "sigmoid", bias[0, :1].expand(9))
    assert flat[1].tolist() == [[0, 1, 2]] * 5
