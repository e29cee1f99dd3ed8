"""Sizes, layouts and threads that hypothesis draws, small ones and those where kernels and tiles change, for every
operator that moves rows or multiplies them; gradients of fused_experts are in its own file."""

from contextlib import contextmanager

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.ops import test_expert_choice as choosing
from tests.ops import test_fused_experts as experts
from tests.ops import test_fused_experts_quantized as packed
from tests.ops import test_grouped_gemm as products
from tests.ops import test_permute as moving
from tests.ops import test_union_experts as union

from moert import expert_choice, fused_experts, grouped_gemm, permute, permute_plan, unpermute
from moert.ops.expert_choice import expert_choice_ref
from moert.ops.fused_experts import fused_experts_ref
from moert.ops.fused_experts_quantized import fused_experts_quantized, fused_experts_quantized_ref
from moert.ops.grouped_gemm import grouped_gemm_ref
from moert.ops.permute import permute_plan_ref, permute_ref, unpermute_ref
from moert.testing import DTYPES, LAYOUTS, ROUTINGS, Shape, assert_rows_close, row_error, strided
from moert.types import ACTIVATIONS

WIDTHS = st.integers(1, 70) | st.integers(250, 330) | st.sampled_from((512, 700, 1030))
TOKENS = st.integers(0, 20) | st.integers(36, 48) | st.integers(90, 110) | st.integers(250, 300)
SHAPES = st.builds(
    lambda T, E, k, H, I, kind: Shape("drawn", T, E, min(k, E), H, I, kind),
    *(TOKENS, st.sampled_from((1, 1, 2, 5, 64)), st.integers(1, 4), WIDTHS, WIDTHS, st.sampled_from(ROUTINGS)),
)
THREADS = st.integers(1, 3)
MOST = 2e7  # multiplications, or the reference takes seconds
drawn = settings(max_examples=60, deadline=None, derandomize=True)


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_reach(shape):
    assume(shape.T * shape.k * shape.H * shape.I <= MOST)


@given(SHAPES, THREADS, st.sampled_from(DTYPES), st.sampled_from(experts.EXPERT_LAYOUTS), st.sampled_from(LAYOUTS))
@drawn
def test_fused_experts(shape, n, dtype, layout, memory):
    in_reach(shape)
    args, run = experts.case(shape, dtype, layout=layout, bias=True)
    with threads(n):
        y = run(fused_experts, *(strided(a, memory) for a in args))
    assert_rows_close(y, lambda *a: run(fused_experts_ref, *a), *args)


@given(SHAPES, THREADS, st.sampled_from(DTYPES), st.data())
@drawn
def test_fused_experts_quantized(shape, n, dtype, data):
    in_reach(shape)
    fmt = data.draw(st.sampled_from([*packed.FORMATS, *packed.FULL_ONLY]))
    precision = data.draw(st.sampled_from(packed.precisions_of(fmt)))
    args, run = packed.case(shape, fmt, dtype, data.draw(st.sampled_from(ACTIVATIONS)), bias=True)
    with threads(n):
        y = run(fused_experts_quantized, *args, precision)
    if precision == "full":
        assert_rows_close(y, lambda *a: run(fused_experts_quantized_ref, *a), *args)
    else:  # by the rule for most rows, of which a value in the middle of two codes may become either
        exact = run(fused_experts_quantized_ref, *(a.double() for a in args), precision)
        rows = sorted(row_error(y[t : t + 1], exact[t : t + 1]) for t in range(len(y)))
        assert row_error(y, exact) < 3e-2  # few columns: a code is a larger part of them
        assert len(y) < 8 or rows[len(rows) // 2] < 1e-5 + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)


@given(SHAPES, THREADS, st.sampled_from(DTYPES), st.booleans(), st.sampled_from(("output", "input")))
@drawn
def test_grouped_gemm(shape, n, dtype, transposed, on):
    in_reach(shape)
    x, w, offsets, bias, tokens, scale = products.case(shape, dtype, transposed)

    def ref(x, w, bias, scale):
        return grouped_gemm_ref(x, w, offsets, bias, tokens, scale, on, transposed)

    with threads(n):
        y = grouped_gemm(x, w, offsets, bias, tokens, scale, on, transposed)
    assert_rows_close(y, ref, x, w, bias, scale)


@given(SHAPES, THREADS, st.sampled_from(DTYPES), st.sampled_from(ACTIVATIONS), st.sampled_from(experts.EXPERT_LAYOUTS))
@drawn
def test_union_experts(shape, n, dtype, activation, layout):
    in_reach(shape)
    args, run = union.case(shape, dtype, activation, layout)
    with threads(n):
        union.assert_forward(args, run)


@given(SHAPES, THREADS, st.sampled_from(DTYPES), st.sampled_from(LAYOUTS))
@drawn
def test_permute(shape, n, dtype, memory):
    routing = shape.routing(dtype=torch.promote_types(dtype, torch.float32))
    _, x, rows, weights = moving.case(shape, dtype)
    with threads(n):
        plan = permute_plan(routing.ids, shape.E)
        there, back = permute(strided(x, memory), plan), unpermute(strided(rows, memory), plan, weights)
    moving.assert_plan_equal(plan, permute_plan_ref(routing.ids, shape.E))
    assert torch.equal(there, permute_ref(x, plan))
    assert_rows_close(back, lambda rows, weights: unpermute_ref(rows, plan, weights), rows, weights)


@given(TOKENS, st.integers(1, 70), st.integers(0, 5), st.integers(0, 300), THREADS, st.sampled_from(DTYPES))
@drawn
def test_expert_choice(T, E, segments, most, n, dtype):
    scores, where, capacity = choosing.problem(T, E, segments, most, dtype)
    with threads(n):
        weights, ids, plan = expert_choice(scores, where, capacity)
    ref_weights, ref_ids, ref_plan = expert_choice_ref(scores, where, capacity)
    assert torch.equal(ids, ref_ids) and torch.equal(weights, ref_weights) and choosing.same(plan, ref_plan)
