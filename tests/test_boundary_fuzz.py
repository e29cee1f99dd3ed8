"""Any tensors at an operator's boundary: the reference's result or an error that names an argument, never a crash."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moert.ops.dispatch import dispatch_pack_ref, dispatch_plan_ref
from moert.ops.expert_choice import expert_choice_ref
from moert.ops.fused_experts import fused_experts_ref
from moert.ops.gating import topk_gating_ref
from moert.ops.grouped_gemm import grouped_gemm_ref
from moert.ops.permute import permute_plan_ref, permute_ref, unpermute_ref
from moert.ops.union_experts import union_experts_ref
from moert.testing import LAYOUTS, assert_rows_close, strided
from moert.types import DispatchPlan, ExpertLayout, GroupLimit, Routing

FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
OTHERS = (torch.bool, torch.complex64, torch.float8_e4m3fn, *FLOATS, *INTS)
ENDS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 127, 255, 2**31 - 1, 2**32, 2**63 - 1)
# The right form of a complaint: ours, or that of torch's own schema and type checks.
FORM = re.compile(
    r"\w+ must (be|have|hold|end|ascend|divide|leave)|Expected a value of type|Unable to cast|out of range"
)
CHANGES = ("rank", "size", "dtype", "values", "layout", "empty")


def floats(draw, *shape, dtype):
    torch.manual_seed(draw(st.integers(0, 99)))
    return torch.randn(*shape).to(dtype)


def integers(draw, *shape, low, high, dtype=torch.int32):
    torch.manual_seed(draw(st.integers(0, 99)))
    return torch.randint(low, high, shape).to(dtype)


def changed(draw, x):
    """Something that differs from x in one way; None stays None."""
    if x is None:
        return x
    change = draw(st.sampled_from(CHANGES))
    if change == "layout":
        return strided(x, draw(st.sampled_from(LAYOUTS))) if x.dim() > 1 and x.dtype in (*FLOATS, *INTS) else x
    if change == "rank":
        return x[None] if draw(st.booleans()) or x.dim() == 0 or x.shape[0] == 0 else x[0]
    if change == "dtype":
        return x.to(draw(st.sampled_from(OTHERS)))
    if change == "values" and not x.is_floating_point() and x.numel():
        x = x.long().flatten()
        x[draw(st.integers(0, len(x) - 1))] = draw(st.sampled_from(ENDS))
        return x.view(-1).to(torch.int32) if draw(st.booleans()) else x
    shape = list(x.shape)
    if shape:
        shape[draw(st.integers(0, len(shape) - 1))] = 0 if change == "empty" else draw(st.integers(0, 9))
    return x.new_zeros(shape)


def some_changed(draw, *tensors):
    """At most two are changed: a call that is wrong everywhere only meets the first check."""
    which = draw(st.lists(st.integers(0, len(tensors) - 1), max_size=2))
    return [changed(draw, x) if i in which else x for i, x in enumerate(tensors)]


def sizes(draw):
    return [draw(st.integers(0, 7)) for _ in "TkHI"] + [draw(st.integers(1, 6))]


@st.composite
def topk_gating_calls(draw):
    T, k, _, half, groups = sizes(draw)
    E, dtype = groups * (half + 1), draw(st.sampled_from(FLOATS))
    bias = floats(draw, E, dtype=torch.promote_types(dtype, torch.float32)) if draw(st.booleans()) else None
    score = draw(st.sampled_from(("softmax", "softmax_over_topk", "sigmoid", "relu", "identity", "softplus")))
    limit = groups, draw(st.sampled_from((groups, groups, 1, 0))), draw(st.sampled_from(("max", "top2")))
    logits, bias = some_changed(draw, floats(draw, T, E, dtype=dtype), bias)
    return logits, k, score, bias, draw(st.booleans()), 1.5, *limit


@st.composite
def expert_choice_calls(draw):
    T, D, _, _, E = sizes(draw)
    scores = floats(draw, T, E, dtype=draw(st.sampled_from(FLOATS)))
    segments = integers(draw, T, low=-1, high=D + 1, dtype=torch.int64)
    capacity = integers(draw, D, E, low=0, high=4, dtype=torch.int64)
    room = draw(st.sampled_from((None, T * E, T * E + 3, 1, -1, 2**40)))
    return *some_changed(draw, scores, segments, capacity), draw(st.sampled_from((E, E, E, 1, -1, 99))), room


@st.composite
def permute_plan_calls(draw):
    T, k, _, _, E = sizes(draw)
    ids = integers(draw, T, k, low=-2, high=E + 2, dtype=draw(st.sampled_from(INTS)))
    num_experts = draw(st.sampled_from((E, E, E, 0, -1, 300, 2**31 - 1, 2**40)))
    return *some_changed(draw, ids), num_experts, draw(st.sampled_from((None, None, 0, 2, -1, 2**40)))


@st.composite
def dispatch_plan_calls(draw):
    T, k, R, _, E = sizes(draw)
    ids = integers(draw, T, k, low=-2, high=E + 2, dtype=draw(st.sampled_from(INTS)))
    where = integers(draw, E, low=0, high=max(R, 1) + draw(st.booleans()))
    return *some_changed(draw, ids, where), draw(st.sampled_from((R, R, R, 0, -1, 2**31 - 1)))


@st.composite
def dispatch_pack_calls(draw):
    T, k, H, R, E = sizes(draw)
    dtype, R = draw(st.sampled_from(FLOATS)), R + 1
    ids, where = integers(draw, T, k, low=-2, high=E + 2), integers(draw, E, low=0, high=R)
    offsets, tokens, _ = torch.ops.moert.dispatch_plan(ids, where, R)
    weights = floats(draw, T, k, dtype=draw(st.sampled_from((dtype, torch.promote_types(dtype, torch.float32)))))
    local = integers(draw, E, low=0, high=32768)
    x = floats(draw, T, H, dtype=dtype)
    payload = draw(st.sampled_from(("none", "none", "int8", "float8_e4m3")))
    if payload != "none":
        # Values whose sizes differ so much that some scales are not normal.
        x, weights = x * 10.0 ** draw(st.integers(-44, 30)), weights.float()
    return *some_changed(draw, x, weights, ids, where, local, offsets, tokens[: offsets[-1]]), payload


def plan_of(draw):
    T, k, H, _, E = sizes(draw)
    plan = permute_plan_ref(integers(draw, T, k, low=-1, high=E + 1), E)
    return T, k, H, plan.tokens, plan.slots


@st.composite
def permute_calls(draw):
    T, k, H, *plan = plan_of(draw)
    return some_changed(draw, floats(draw, T, H, dtype=draw(st.sampled_from(FLOATS))), *plan)


@st.composite
def unpermute_calls(draw):
    T, k, H, *plan = plan_of(draw)
    dtype = draw(st.sampled_from(FLOATS))
    weights = floats(draw, T, k, dtype=torch.promote_types(dtype, torch.float32)) if draw(st.booleans()) else None
    residual = floats(draw, T, H, dtype=dtype) if draw(st.booleans()) else None
    return some_changed(draw, floats(draw, T * k, H, dtype=dtype), *plan, weights, residual)


@st.composite
def unpermute_backward_calls(draw):
    rows, tokens, slots, weights, _ = draw(unpermute_calls())
    weights = torch.zeros(slots.shape) if weights is None else weights
    dy = floats(draw, slots.shape[0] if slots.dim() else 1, rows.shape[-1] if rows.dim() else 1, dtype=rows.dtype)
    return *some_changed(draw, dy), rows, tokens, slots, weights


@st.composite
def grouped_gemm_calls(draw):
    S, T, K, N, E = sizes(draw)
    dtype, transposed, gather = draw(st.sampled_from(FLOATS)), draw(st.booleans()), draw(st.booleans())
    ends = sorted(draw(st.lists(st.integers(0, S), min_size=E, max_size=E)))
    offsets = torch.tensor([0, *ends], dtype=torch.int32)
    tokens = integers(draw, S, low=0, high=max(T, 1)) if gather else None
    x = floats(draw, T if gather else S, K, dtype=dtype)
    w = floats(draw, E, *((K, N) if transposed else (N, K)), dtype=dtype)
    bias = floats(draw, E, N, dtype=dtype) if draw(st.booleans()) else None
    scale = floats(draw, S, dtype=torch.promote_types(dtype, torch.float32)) if draw(st.booleans()) else None
    tensors = some_changed(draw, x, w, offsets, bias, tokens, scale)
    return *tensors, draw(st.sampled_from(("output", "input", "output", "both"))), transposed


@st.composite
def fused_experts_calls(draw):
    T, k, H, I, E = sizes(draw)
    dtype, transposed, interleaved = draw(st.sampled_from(FLOATS)), draw(st.booleans()), draw(st.booleans())
    activation = draw(st.sampled_from(("swiglu", "geglu", "swiglu_oai", "relu2", "silu", "swish")))
    wide = 2 * I if "glu" in activation else I
    ids = integers(draw, T, k, low=-1, high=E + 1, dtype=draw(st.sampled_from(INTS)))
    weights = floats(draw, T, k, dtype=torch.promote_types(dtype, torch.float32)).abs()
    w1 = floats(draw, E, *((H, wide) if transposed else (wide, H)), dtype=dtype)
    w2 = floats(draw, E, *((I, H) if transposed else (H, I)), dtype=dtype)
    biased = draw(st.booleans())
    b1, b2 = (floats(draw, E, n, dtype=dtype) if biased else None for n in (wide, H))
    tensors = some_changed(draw, floats(draw, T, H, dtype=dtype), ids, weights, w1, w2, b1, b2)
    scale_on = draw(st.sampled_from(("output", "input")))
    call = *tensors, activation, 1.702, 7.0, transposed, interleaved, scale_on, draw(st.booleans())
    if tensors[1].dim() != 2 or draw(st.booleans()):
        return call
    try:
        whole = torch.ops.moert.permute_plan(tensors[1], E)
    except RuntimeError:
        return call  # ids that no plan is made of are refused by this operator too
    return *call, *some_changed(draw, *whole)


@st.composite
def union_experts_calls(draw):
    x, ids, _, w1, w2, b1, b2, *gate, transposed, interleaved, _, _ = draw(fused_experts_calls())[:14]
    gains = floats(draw, len(x) if x.dim() else 0, len(w1) if w1.dim() else 0, dtype=torch.float32)
    return *some_changed(draw, x, gains, ids.flatten(), w1, w2, b1, b2), *gate, transposed, interleaved


def plan(tokens, slots):
    return DispatchPlan(None, tokens, slots)


def check_expert_choice(got, scores, segments, capacity, *room):
    weights, ids, plan = expert_choice_ref(scores, segments.long(), capacity.long(), *room)
    assert all(map(torch.equal, got, (weights, ids, plan.offsets, plan.tokens, plan.slots)))


def check_topk_gating(got, logits, k, score, bias, renormalize, scale, *limit):
    def weights(logits, bias):
        return topk_gating_ref(logits, k, score, bias, renormalize, scale, GroupLimit(*limit))

    assert torch.equal(got[1], weights(logits, bias)[1])
    assert_rows_close(got[0], lambda *args: weights(*args)[0], logits, bias, floor=1e-5)


def check_permute_plan(got, ids, num_experts, capacity):
    ref = permute_plan_ref(ids, num_experts, capacity)
    assert all(map(torch.equal, got, (ref.offsets, ref.tokens, ref.slots)))


def check_dispatch_plan(got, ids, where, R):
    ref = dispatch_plan_ref(ids, where, R)
    assert all(map(torch.equal, got, (ref.offsets, ref.tokens, ref.slots)))


def check_dispatch_pack(got, *args):
    assert torch.equal(got, dispatch_pack_ref(*args))


def check_permute(got, x, tokens, slots):
    assert torch.equal(got, permute_ref(x, plan(tokens, slots)))


def check_unpermute(got, rows, tokens, slots, weights, residual):
    def ref(rows, weights, residual):
        return unpermute_ref(rows, plan(tokens, slots), weights, residual)

    assert_rows_close(got, ref, rows, weights, residual)


def check_unpermute_backward(got, dy, rows, tokens, slots, weights):
    """A changed plan may contradict itself (one slot for two tokens): then only its token's choices count."""
    drows, dweights = torch.zeros(rows.shape, dtype=torch.float64), torch.zeros(slots.shape, dtype=torch.float64)
    for t, choices in enumerate(slots.tolist()):
        for j, s in enumerate(choices):
            if s >= 0 and tokens[s] == t:
                drows[s] += weights[t, j].double() * dy[t].double()
                dweights[t, j] = (rows[s].double() * dy[t].double()).sum()
    for mine, ref in zip(got, (drows, dweights), strict=True):
        eps = torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine.double(), ref, rtol=4 * eps, atol=1e-5)


def check_grouped_gemm(got, x, w, offsets, bias, tokens, scale, scale_on, transposed):
    def ref(x, w, bias, scale):
        used = offsets[-1]
        # A slot that is not in use may hold any token.
        index = None if tokens is None else tokens.masked_fill(torch.arange(len(tokens)) >= used, 0)
        rows = x.new_zeros(1, x.shape[1]) if not len(x) and index is not None else x
        return grouped_gemm_ref(rows, w, offsets, bias, index, scale, scale_on, transposed)

    assert_rows_close(got, ref, x, w, bias, scale, floor=1e-5)


def check_fused_experts(
    got, x, ids, weights, w1, w2, b1, b2, activation, _, __, transposed, interleaved, on, save, *plan
):
    def ref(x, weights, w1, w2, b1, b2):
        layout = ExpertLayout(transposed, interleaved)
        return fused_experts_ref(x, Routing(ids, weights, len(w1)), w1, w2, (b1, b2), activation, layout, on)

    assert_rows_close(got[0], ref, x, weights, w1, w2, b1, b2, floor=1e-5)


def check_union_experts(got, x, gains, ids, w1, w2, b1, b2, activation, _, __, transposed, interleaved):
    def ref(x, gains, w1, w2, b1, b2):
        return union_experts_ref(x, gains, ids, w1, w2, (b1, b2), activation, ExpertLayout(transposed, interleaved))

    assert_rows_close(got, ref, x, gains, w1, w2, b1, b2, floor=1e-5)


CALLS = {
    "expert_choice": (expert_choice_calls(), check_expert_choice, 200),
    "topk_gating": (topk_gating_calls(), check_topk_gating, 300),
    "permute_plan": (permute_plan_calls(), check_permute_plan, 300),
    "dispatch_plan": (dispatch_plan_calls(), check_dispatch_plan, 200),
    "dispatch_pack": (dispatch_pack_calls(), check_dispatch_pack, 300),
    "permute": (permute_calls(), check_permute, 300),
    "unpermute": (unpermute_calls(), check_unpermute, 300),
    "unpermute_backward": (unpermute_backward_calls(), check_unpermute_backward, 200),
    "grouped_gemm": (grouped_gemm_calls(), check_grouped_gemm, 450),
    "fused_experts": (fused_experts_calls(), check_fused_experts, 450),
    "union_experts": (union_experts_calls(), check_union_experts, 450),
}


@pytest.mark.parametrize("times", (1, pytest.param(25, marks=pytest.mark.slow)))
@pytest.mark.parametrize("op", CALLS)
def test_fuzz(op, times):
    calls, check, examples = CALLS[op]
    results = []

    @settings(
        max_examples=examples * times,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls)
    def run(args):
        try:
            got = getattr(torch.ops.moert, op)(*args)
        except (RuntimeError, TypeError, ValueError) as error:
            assert FORM.search(str(error)), str(error)
            results.append("refused")
            return
        check(got, *args)
        results.append("right")

    run()
    # Neither side may be empty: a fuzz that is always refused tests one check.
    assert results.count("right") > examples * times / 10
    assert results.count("refused") > examples * times / 10
