import functools
import itertools
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from moert import Activation, ExpertLayout, Routing, permute_plan
from moert.ops.fused_experts import (
    fused_experts,
    fused_experts_onto,
    fused_experts_onto_ref,
    fused_experts_ref,
)
from moert.testing import (
    DTYPES,
    FUSED_EXPERTS_SHAPES,
    ID_DTYPES,
    LAYOUTS,
    ROUTINGS,
    Shape,
    assert_grads_close,
    assert_rows_close,
    random_routing,
    row_error,
    strided,
)
from moert.types import ACTIVATIONS, DispatchPlan, Onto

EXPERT_LAYOUTS = [ExpertLayout(t, i) for t, i in itertools.product((False, True), repeat=2)]
ODD = Shape("nothing is a multiple of anything, experts with 0 to 20 rows", 61, 7, 3, 37, 21, "sentinels")
LARGE = FUSED_EXPERTS_SHAPES[-1]


def name_of(layout):
    return ("EKN" if layout.transposed else "ENK") + ("-interleaved" if layout.interleaved else "")


def case(shape, dtype=torch.float32, activation="swiglu", layout=ExpertLayout(), bias=False):
    """x, weights [T, k], w1, w2, b1, b2 and the function (fn, those) -> y."""
    E, H, I = shape.E, shape.H, shape.I
    width = 2 * I if Activation(activation).gated else I
    routing = shape.routing(dtype=torch.promote_types(dtype, torch.float32))
    w1, w2 = torch.randn(E, width, H) / H**0.5, torch.randn(E, H, I) / I**0.5
    if layout.transposed:
        w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
    b1, b2 = (torch.randn(E, width).to(dtype), torch.randn(E, H).to(dtype)) if bias else (None, None)
    x = torch.randn(shape.T, H).to(dtype)

    def run(fn, x, weights, w1, w2, b1=None, b2=None, scale_on="output"):
        return fn(x, Routing(routing.ids, weights, E), w1, w2, (b1, b2), activation, layout, scale_on)

    return [x, routing.weights, w1.to(dtype), w2.to(dtype), b1, b2], run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FUSED_EXPERTS_SHAPES, ids=str)
def test_forward(shape, dtype):
    args, run = case(shape, dtype)
    assert_rows_close(run(fused_experts, *args), lambda *a: run(fused_experts_ref, *a), *args)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("scale_on", ["output", "input"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_of_every_variant(activation, scale_on, layout):
    for dtype in (torch.float32, torch.bfloat16):
        args, run = case(ODD, dtype, activation, layout, bias=True)
        y = run(fused_experts, *args, scale_on)
        assert_rows_close(y, lambda *a: run(fused_experts_ref, *a, scale_on), *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FUSED_EXPERTS_SHAPES, ids=str)
def test_backward(shape, dtype):
    args, run = case(shape, dtype, bias=True)
    dy = torch.randn_like(args[0])
    assert_grads_close(lambda *a: run(fused_experts, *a), lambda *a: run(fused_experts_ref, *a), dy, *args)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("scale_on", ["output", "input"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, scale_on, layout):
    args, run = case(Shape("small", 5, 3, 2, 4, 3), torch.float64, activation, layout, bias=True)
    args = [a.requires_grad_() for a in args]
    assert torch.autograd.gradcheck(lambda *a: run(fused_experts, *a, scale_on), args)


@given(
    sizes=st.tuples(st.integers(0, 130), st.sampled_from((1, 2, 5, 64, 1024)), st.integers(1, 70), st.integers(1, 70)),
    k=st.integers(1, 8),
    kind=st.sampled_from(ROUTINGS),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(EXPERT_LAYOUTS),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_sizes(sizes, k, kind, dtype, layout):
    T, E, H, I = sizes
    args, run = case(Shape("drawn", T, E, min(k, E), H, I, kind), dtype, layout=layout)
    fn, ref = (functools.partial(run, f) for f in (fused_experts, fused_experts_ref))
    assert_rows_close(fn(*args), ref, *args)
    if E < 1024:  # the reference's backward takes seconds of as many experts
        assert_grads_close(fn, ref, torch.randn_like(args[0]), *args)


def test_small_integers_are_exact():
    args, run = case(LARGE, activation="relu")
    args = [None if a is None else (a * 3).round() for a in args]
    assert torch.equal(run(fused_experts, *args), run(fused_experts_ref, *args))


@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=str)
def test_ids_of_any_integer_type(id_dtype):
    (x, weights, w1, w2, *_), _ = case(ODD)
    ids = ODD.routing().ids
    wide = torch.where(ids < 0, torch.iinfo(id_dtype).max, ids.long()).to(id_dtype)
    expected = fused_experts_ref(x, Routing(ids, weights, ODD.E), w1, w2)
    out = fused_experts(x, Routing(wide, weights, ODD.E), w1, w2)
    assert row_error(out, expected) < 1e-5


def test_dropped_choices_add_nothing_and_get_no_gradient():
    (x, weights, w1, w2, *_), _ = case(ODD)
    ids = ODD.routing(id_dtype=torch.int64).ids
    ids[::3] = torch.tensor([-1, 2**63 - 1, -(2**63)])
    dropped = (ids < 0) | (ids >= ODD.E)
    x, weights = x.requires_grad_(), torch.where(dropped, torch.nan, weights).requires_grad_()
    y = fused_experts(x, Routing(ids, weights, ODD.E), w1, w2)
    y.sum().backward()
    assert not y[::3].any() and not x.grad[::3].any() and y[1].any()
    assert not weights.grad[dropped].any() and weights.grad[~dropped].all()


def test_nan_stays_in_the_tokens_that_hold_it():
    args, run = case(ODD)
    clean, dirty = run(fused_experts, *args), args[0].clone()
    dirty[[4, 17]] = torch.tensor([[torch.nan], [torch.inf]])
    out = run(fused_experts, dirty, *args[1:])
    others = [t for t in range(ODD.T) if t not in (4, 17)]
    assert torch.equal(out[others], clean[others]) and not out[4].isfinite().any()


def test_nan_in_one_expert_stays_with_its_tokens():
    args, run = case(ODD)
    clean, w1 = run(fused_experts, *args), args[2].clone()
    w1[2] = torch.nan
    out = run(fused_experts, args[0], args[1], w1, args[3])
    touched = out.isnan().any(-1)
    assert touched.any() and not touched.all() and torch.equal(out[~touched], clean[~touched])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_memory_layout(layout, dtype):
    args, run = case(LARGE, dtype, bias=True)
    moved = [a if a is None else strided(a, layout) for a in args]
    assert_rows_close(run(fused_experts, *moved), lambda *a: run(fused_experts_ref, *a), *args)
    dy = torch.ones(1, 1, dtype=dtype).expand(LARGE.T, LARGE.H)
    assert_grads_close(
        lambda *a: run(fused_experts, *[strided(x, layout) for x in a]),
        lambda *a: run(fused_experts_ref, *a),
        dy,
        *args,
    )


def test_same_bits_for_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    args, run = case(LARGE, torch.bfloat16, bias=True)
    try:
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            leaves = [a.detach().requires_grad_() for a in args]
            y = run(fused_experts, *leaves)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_gradients_without_saved_pre_activations():
    args, run = case(LARGE)
    leaves = [a.requires_grad_() for a in args if a is not None]
    saved = torch.autograd.grad(run(fused_experts, *leaves).square().sum(), leaves)
    again = torch.autograd.grad(
        checkpoint(lambda *a: run(fused_experts, *a), *leaves, use_reentrant=False).square().sum(), leaves
    )
    assert all(torch.equal(a, b) for a, b in zip(saved, again, strict=True))
    ids = torch.zeros(LARGE.T, LARGE.k).int()
    options = ("swiglu", 0.0, 0.0, False, False, "output", False)
    y, h = torch.ops.moert.fused_experts(leaves[0], ids, *leaves[1:], None, None, *options)
    assert h.shape == (0, 2 * LARGE.I)
    recomputed = torch.autograd.grad(y.square().sum(), leaves)
    y, h = torch.ops.moert.fused_experts(leaves[0], ids, *leaves[1:], None, None, *options[:-1], True)
    assert h.shape == (LARGE.T * LARGE.k, 2 * LARGE.I)
    assert all(
        torch.equal(a, b) for a, b in zip(recomputed, torch.autograd.grad(y.square().sum(), leaves), strict=True)
    )


def bytes_of(*tensors):
    """Of the memory that they hold, each piece once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


# the activation, whether there are biases and a plan, what is added: rows, scale, mix, constants
KEPT = (
    pytest.param("swiglu", False, False, (0, 0, 0, 0), id="swiglu"),
    pytest.param("swiglu", True, False, (0, 0, 0, 0), id="bias"),
    pytest.param("relu2", False, False, (0, 0, 0, 0), id="ungated"),
    pytest.param("swiglu", False, True, (0, 0, 0, 0), id="plan"),
    pytest.param("swiglu", False, False, (1, 0, 0, 0), id="onto-rows"),
    pytest.param("swiglu", True, True, (1, 1, 1, 1), id="all"),
)


@pytest.mark.parametrize("activation,biased,planned,given", KEPT)
@pytest.mark.parametrize("shape", FUSED_EXPERTS_SHAPES, ids=str)
def test_kept_for_backward_are_x_pre_activations_and_routing_only(shape, activation, biased, planned, given):
    (x, weights, *parameters), _ = case(shape, torch.bfloat16, activation, bias=biased)
    w1, w2, *bias = parameters
    ids, kept = shape.routing().ids, []
    plan = permute_plan(ids, shape.E) if planned else None
    parts = [t if here else None for t, here in zip(added(shape, torch.bfloat16), given, strict=True)]
    leaves = [t.requires_grad_() for t in (x, weights, *parameters, *parts) if t is not None]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fused_experts_onto(x, Routing(ids, weights, shape.E, plan=plan), w1, w2, Onto(*parts), bias, activation)
    own = {t.data_ptr() for t in parameters if t is not None}
    kept = [t for t in kept if t.data_ptr() not in own]  # parameters are there in any case
    routing = (ids, weights) if plan is None else (ids, weights, plan.offsets, plan.tokens, plan.slots)
    factors = parts if given[1] else parts[1:]  # rows that nothing scales are in no product
    rule = 2 * (shape.T * shape.H + shape.T * shape.k * w1.shape[1]) + bytes_of(*routing, *factors)
    assert bytes_of(*kept) <= 1.02 * rule
    y.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_only_what_is_needed_is_computed():
    args, run = case(LARGE, bias=True)
    calls = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "fused_experts_backward" in str(func):
                calls.append([t.numel() for t in out])
            return out

    x = args[0].requires_grad_()
    with Spy():
        run(fused_experts, *args).sum().backward()
    assert calls == [[x.numel(), 0, 0, 0, 0, 0]]


def test_whether_tf32_may_be_used_goes_with_the_call(monkeypatch):
    """Forward and backward are told the same; a CPU does not round."""
    args, run = case(ODD)
    expected, told = run(fused_experts, *args), []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "fused_experts" in str(func):
                told.append(args[-1])
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(sys.modules[fused_experts.__module__], "rounds_to_tf32", lambda x: True)
    args[0].requires_grad_()
    with Spy():
        y = run(fused_experts, *args)
        y.sum().backward()
    assert told == [True, True] and torch.equal(y, expected)


def test_a_second_backward_is_an_error():
    args, run = case(ODD)
    x = args[0].requires_grad_()
    (dx,) = torch.autograd.grad(run(fused_experts, *args).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_experts must be differentiated at most once"):
        dx.sum().backward()


def test_autocast():
    args, run = case(LARGE)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(fused_experts, *args)
    assert y.dtype == torch.bfloat16
    x, weights, w1, w2 = args[:4]
    assert torch.equal(y, run(fused_experts, x.bfloat16(), weights, w1.bfloat16(), w2.bfloat16()))


def op_args(shape, layout, activation):
    (x, weights, w1, w2, b1, b2), _ = case(shape, activation=activation, layout=layout, bias=True)
    x, weights, w1, w2, b1, b2 = (t.requires_grad_() for t in (x, weights, w1, w2, b1, b2))
    options = (activation, 1.7, 7.0, layout.transposed, layout.interleaved, "output")
    return (x, shape.routing().ids, weights, w1, w2, b1, b2), options


@pytest.mark.parametrize("i,shape", [*enumerate(FUSED_EXPERTS_SHAPES[:8])], ids=str)
def test_opcheck(i, shape):
    tensors, options = op_args(shape, EXPERT_LAYOUTS[i % 4], ACTIVATIONS[(3 * i) % len(ACTIVATIONS)])
    opcheck(torch.ops.moert.fused_experts.default, (*tensors, *options, True))
    tensors = [t.detach() for t in tensors]
    _, h = torch.ops.moert.fused_experts(*tensors, *options, True)
    dy = torch.randn(shape.T, shape.H)
    opcheck(torch.ops.moert.fused_experts_backward.default, (dy, *tensors, h, *options, 0b111111))
    opcheck(torch.ops.moert.fused_experts_backward.default, (dy, *tensors, h, *options, 0b000101))
    plan = torch.ops.moert.permute_plan(tensors[1], shape.E)
    opcheck(torch.ops.moert.fused_experts.default, (*tensors, *options, True, *plan))
    opcheck(torch.ops.moert.fused_experts_backward.default, (dy, *tensors, h, *options, 0b111111, *plan))
    without_biases = (*tensors[:5], None, None, h, *options, 0b111111)
    opcheck(torch.ops.moert.fused_experts_backward.default, (dy, *without_biases))
    assert [g.numel() for g in torch.ops.moert.fused_experts_backward(dy, *without_biases)[4:]] == [0, 0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", FUSED_EXPERTS_SHAPES, ids=str)
def test_a_given_plan_changes_no_bit_and_bounds_what_is_kept(shape, dtype):
    (x, weights, w1, w2, *_), _ = case(shape, dtype)
    ids, leaves = shape.routing().ids, [t.requires_grad_() for t in (x, weights, w1, w2)]
    offsets, tokens, slots = torch.ops.moert.permute_plan(ids, shape.E)
    used = int(offsets[-1])
    results = []
    for plan in (None, DispatchPlan(offsets, tokens, slots), DispatchPlan(offsets, tokens[:used], slots)):
        routing = Routing(ids, weights, shape.E, plan=plan)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = fused_experts(x, routing, w1, w2)
        assert kept[5].shape == (len(tokens) if plan is None else len(plan.tokens), w1.shape[1])
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def added(shape, dtype, C=3):
    wide = torch.promote_types(dtype, torch.float32)
    rows, constants = torch.randn(shape.T, shape.H).to(dtype), torch.randn(C, shape.H).to(dtype)
    return rows, torch.randn(shape.T, dtype=wide), torch.randn(shape.T, C, dtype=wide), constants


# rows, scale, mix and constants: which of them are given
ADDED = (
    pytest.param((1, 0, 0, 0), id="rows"),
    pytest.param((1, 1, 0, 0), id="scaled-rows"),
    pytest.param((0, 0, 1, 1), id="constants"),
    pytest.param((1, 1, 1, 1), id="both"),
)


@pytest.mark.parametrize("given", ADDED)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("shape", FUSED_EXPERTS_SHAPES[:8], ids=str)
def test_rows_and_constants_are_added(shape, dtype, given):
    (x, weights, w1, w2, *_), _ = case(shape, dtype)
    parts = [t if here else None for t, here in zip(added(shape, dtype), given, strict=True)]
    ids = shape.routing().ids

    def run(fn, x, weights, w1, w2, *parts):
        return fn(x, Routing(ids, weights, shape.E), w1, w2, Onto(*parts))

    args = (x, weights, w1, w2, *parts)
    assert_rows_close(run(fused_experts_onto, *args), lambda *a: run(fused_experts_onto_ref, *a), *args)
    dy = torch.randn(shape.T, shape.H)
    assert_grads_close(partial(run, fused_experts_onto), partial(run, fused_experts_onto_ref), dy, *args)


def test_what_is_added_has_any_strides_under_autocast_and_compiled():
    (x, weights, w1, w2, *_), _ = case(ODD)
    rows, scale, mix, constants = added(ODD, torch.float32)
    routing = Routing(ODD.routing().ids, weights, ODD.E)
    expected = fused_experts_onto(x, routing, w1, w2, Onto(rows, scale, mix, constants))
    for layout in LAYOUTS:
        parts = (
            strided(rows, layout),
            strided(scale[None], layout)[0],
            strided(mix, layout),
            strided(constants, layout),
        )
        assert torch.equal(fused_experts_onto(x, routing, w1, w2, Onto(*parts)), expected)
    compiled = torch.compile(fused_experts_onto, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, routing, w1, w2, Onto(rows, scale, mix, constants)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        half = fused_experts_onto(x, routing, w1, w2, Onto(rows, scale, mix, constants))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.2)


def test_opcheck_of_what_is_added():
    shape = FUSED_EXPERTS_SHAPES[2]
    tensors, options = op_args(shape, ExpertLayout(), "swiglu")
    parts = [t.requires_grad_() for t in added(shape, torch.float32)]
    opcheck(torch.ops.moert.fused_experts.default, (*tensors, *options, True, None, None, None, *parts))


def test_a_plan_of_other_ids_is_an_error():
    routing = random_routing(6, 4, 2)
    plan = permute_plan(routing.ids.flip(0), 4)
    with pytest.raises(RuntimeError, match=r"slots must be those of the plan of ids \(permute_plan\), got others"):
        fused_experts(torch.randn(6, 8), replace(routing, plan=plan), torch.randn(4, 10, 8), torch.randn(4, 8, 5))


def test_compile_with_any_number_of_tokens():
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    args, _ = case(LARGE)
    x, weights, w1, w2 = (a.requires_grad_() for a in args[:4])
    ids = LARGE.routing().ids

    def layer(x, ids, weights, w1, w2):
        return fused_experts(x, Routing(ids, weights, LARGE.E), w1, w2)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for T in range(1, 65):
        inputs = x[:T], ids[:T], weights[:T], w1, w2
        out, expected = compiled(*inputs), layer(*inputs)
        assert torch.equal(out, expected)
        grads = [torch.autograd.grad(y.square().sum(), (x, weights, w1, w2)) for y in (out, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert count.frame_count <= 2


E, H, I = 4, 6, 5
GOOD = {
    "x": torch.zeros(3, H),
    "ids": torch.zeros(3, 2, dtype=torch.int32),
    "weights": torch.zeros(3, 2),
    "w1": torch.zeros(E, 2 * I, H),
    "w2": torch.zeros(E, H, I),
    "b1": torch.zeros(E, 2 * I),
    "b2": torch.zeros(E, H),
    "activation": "swiglu",
    "layout": ExpertLayout(),
    "scale_on": "output",
}
ERRORS = [
    ({"x": torch.zeros(H)}, r"x must be \[T, H\], got shape \[6\]"),
    ({"x": torch.zeros(3, H).long()}, "x must have dtype Float, BFloat16, Half or Double, got Long"),
    ({"w1": torch.zeros(E, 2 * I, H + 1)}, r"w1 must have shape \[E, 2I, H=6\], got \[4, 10, 7\]"),
    ({"x": torch.zeros(2, H)}, r"ids must have shape \[T=2, k\], got \[3, 2\]"),
    ({"ids": torch.zeros(3, 2)}, "ids must have an integer dtype, got Float"),
    ({"ids": torch.zeros(6).int()}, r"ids must be \[T, k\], got shape \[6\]"),
    ({"weights": torch.zeros(3, 1)}, r"weights must have the shape of ids, \[3, 2\], got \[3, 1\]"),
    ({"weights": torch.zeros(3, 2).double()}, "weights must have dtype Float or that of x, got Double"),
    ({"w1": torch.zeros(E, 2 * I + 1, H)}, r"w1 must have an even 2I for .* swiglu, got \[4, 11, 6\]"),
    ({"w1": torch.zeros(E, 2 * I)}, r"w1 must be \[E, 2I, H\], got shape \[4, 10\]"),
    ({"w1": torch.zeros(E, 2 * I, H).bfloat16()}, "w1 must have the dtype of x, Float, got BFloat16"),
    ({"w2": torch.zeros(E, H, I + 1)}, r"w2 must have shape \[E=4, H=6, I=5\], got \[4, 6, 6\]"),
    ({"w2": torch.zeros(E, H, I).half()}, "w2 must have the dtype of x, Float, got Half"),
    ({"layout": ExpertLayout(transposed=True)}, r"w1 must have shape \[E, H=6, 2I\], got \[4, 10, 6\]"),
    ({"b1": torch.zeros(E, I)}, r"b1 must have shape \[E=4, 2I=10\], got \[4, 5\]"),
    ({"b2": torch.zeros(E, H).half()}, "b2 must have the dtype of x, Float, got Half"),
    ({"scale_on": "none"}, "scale_on must be output or input, got none"),
]


@pytest.mark.parametrize("wrong,message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(wrong, message):
    a = GOOD | wrong
    routing = Routing(a["ids"], a["weights"], E)
    with pytest.raises(RuntimeError, match=message):
        fused_experts(
            a["x"], routing, a["w1"], a["w2"], (a["b1"], a["b2"]), a["activation"], a["layout"], a["scale_on"]
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_that_no_weight_has_are_an_error_of_x(transposed):
    w1, w2 = (w.mT if transposed else w for w in (GOOD["w1"], GOOD["w2"]))
    routing, layout = Routing(GOOD["ids"], GOOD["weights"], E), ExpertLayout(transposed)
    with pytest.raises(ValueError, match="x must have H=6 columns, as w1 and w2 have, got 7"):
        fused_experts(torch.zeros(3, H + 1), routing, w1, w2, layout=layout)


def test_routing_for_another_number_of_experts():
    with pytest.raises(ValueError, match="w1 must have E=routing.num_experts=5 experts, got 4"):
        fused_experts(GOOD["x"], Routing(GOOD["ids"], GOOD["weights"], 5), GOOD["w1"], GOOD["w2"])


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation must be one of swiglu, .*, got swish"):
        fused_experts(GOOD["x"], Routing(GOOD["ids"], GOOD["weights"], E), GOOD["w1"], GOOD["w2"], activation="swish")
    tensors = (GOOD[name] for name in ("x", "ids", "weights", "w1", "w2", "b1", "b2"))
    with pytest.raises(RuntimeError, match="activation must be one of identity, silu, .*, got swish"):
        torch.ops.moert.fused_experts(*tensors, "swish", 1.0, 1.0, False, False, "output", False)
