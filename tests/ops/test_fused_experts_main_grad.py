"""Gradients of weights and biases that are added to the parameters' main_grad."""

import itertools

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moert import Activation, ExpertLayout, Routing
from moert.ops.fused_experts import fused_experts, fused_experts_onto, fused_experts_ref
from moert.runtime import add_to_main_grad_
from moert.testing import DTYPES, FUSED_EXPERTS_SHAPES, Shape
from moert.types import ACTIVATIONS, Onto

EXPERT_LAYOUTS = [ExpertLayout(t, i) for t, i in itertools.product((False, True), repeat=2)]
ODD = Shape("nothing is a multiple of anything, experts with 0 to 20 rows", 61, 7, 3, 37, 21, "sentinels")
NAMES = ("w1", "w2", "b1", "b2")


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


class Case:
    """x, weights and parameters that want gradients; run(...) -> y, gradients of all that has none in a main_grad."""

    def __init__(self, shape, dtype=torch.float32, activation="swiglu", layout=ExpertLayout(), draw=torch.randn):
        E, H, I = shape.E, shape.H, shape.I
        width = 2 * I if Activation(activation).gated else I
        w1, w2 = draw(E, width, H), draw(E, H, I)
        if layout.transposed:
            w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
        self.parameters = [torch.nn.Parameter(p.to(dtype)) for p in (w1, w2, draw(E, width), draw(E, H))]
        add_to_main_grad_(torch.nn.ParameterList(self.parameters))
        self.x, self.dy = draw(shape.T, H).to(dtype).requires_grad_(), draw(shape.T, H).to(dtype)
        routing = shape.routing(dtype=wide(dtype))
        self.ids, self.weights = routing.ids, routing.weights.requires_grad_()
        self.shape, self.activation, self.layout = shape, activation, layout

    def give_main_grads(self, value=0.0, dtype=torch.float32):
        for p in self.parameters:
            p.main_grad = torch.full_like(p, value, dtype=dtype)
        return self.main_grads

    @property
    def main_grads(self):
        return [p.main_grad for p in self.parameters]

    def forward(self, fn=fused_experts, scale_on="output", x=None):
        w1, w2, *bias = self.parameters
        routing = Routing(self.ids, self.weights, self.shape.E)
        x = self.x if x is None else x
        return fn(x, routing, w1, w2, tuple(bias), self.activation, self.layout, scale_on)

    def step(self, **options):
        self.forward(**options).backward(self.dy)

    def gradients(self, **options):
        """Those that autograd gives where nothing has a main_grad: of x, weights and the parameters."""
        kept = [p.__dict__.pop("main_grad", None) for p in self.parameters]
        out = torch.autograd.grad(self.forward(**options), (self.x, self.weights, *self.parameters), self.dy)
        for p, grad in zip(self.parameters, kept, strict=True):
            if grad is not None:
                p.main_grad = grad
        return out

    def is_without_grads(self):
        return all(p.grad is None for p in self.parameters)


def small_integers(*shape):
    return torch.randint(-1, 3, shape).float()


def equal(some, others):
    return all(map(torch.equal, some, others))


def test_three_steps_are_added_without_rounding():
    """Every factor is a small integer, exact in bfloat16; the sums need more bits than it has."""
    shape = Shape("experts with hundreds of rows", 700, 3, 2, 20, 12)
    for dtype, layout in itertools.product((torch.bfloat16, torch.float16), EXPERT_LAYOUTS):
        case = Case(shape, dtype, "relu", layout, small_integers)
        with torch.no_grad():
            case.weights.fill_(1)
            case.x.clamp_(min=0)
        exact = [p.detach().double().requires_grad_() for p in case.parameters]
        routing = Routing(case.ids, case.weights.detach().double(), shape.E)
        y = fused_experts_ref(case.x.detach().double(), routing, *exact[:2], exact[2:], "relu", layout)
        grads = torch.autograd.grad(y, exact, case.dy.double())
        assert all((g != g.to(dtype)).any() for g in grads[:2])  # rounding would show
        case.give_main_grads(1000.5)
        for _ in range(3):
            case.step()
        assert equal(case.main_grads, [(1000.5 + 3 * g).float() for g in grads])
        assert case.is_without_grads()


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=str)
@pytest.mark.parametrize("scale_on", ["output", "input"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_sums_are_those_that_gradients_are_rounded_from(activation, scale_on, layout):
    for dtype in (*DTYPES, torch.float64):
        case = Case(ODD, dtype, activation, layout)
        expected = case.gradients(scale_on=scale_on)
        case.give_main_grads(dtype=wide(dtype))
        case.step(scale_on=scale_on)
        assert equal([g.to(dtype) for g in case.main_grads], expected[2:])
        assert equal((case.x.grad, case.weights.grad), expected[:2])
        assert case.is_without_grads()


@pytest.mark.parametrize("shape", FUSED_EXPERTS_SHAPES, ids=str)
def test_steps_are_added_in_their_order(shape):
    case = Case(shape)
    start = [torch.randn_like(p) for p in case.parameters]
    sums = [s.clone() for s in start]
    for p, s in zip(case.parameters, start, strict=True):
        p.main_grad = s
    for _ in range(3):
        for s, g in zip(sums, case.gradients()[2:], strict=True):
            s += g
        case.step()
        case.dy = torch.randn_like(case.dy)
    assert equal(case.main_grads, sums)


def test_an_expert_without_rows_keeps_its_bits():
    case = Case(ODD, torch.bfloat16)
    case.ids[case.ids == 2] = ODD.E
    case.give_main_grads(-0.0)
    for p in case.parameters:
        p.main_grad[2, ::2] = torch.nan
    before = [g.clone() for g in case.main_grads]
    case.step()
    assert equal((g[2].view(torch.int32) for g in case.main_grads), (b[2].view(torch.int32) for b in before))
    assert all(g[3].any() for g in case.main_grads)


def test_no_tokens_and_only_sentinels_add_nothing():
    for shape in (Shape("no tokens", 0, 4, 2, 8, 8), ODD):
        case = Case(shape)
        case.ids.fill_(-1)
        case.give_main_grads(-0.0)
        case.step()
        assert all(g.signbit().all() and not g.any() for g in case.main_grads) and case.is_without_grads()


def test_same_bits_for_any_number_of_threads():
    case = Case(FUSED_EXPERTS_SHAPES[-1], torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            case.give_main_grads(0.3)
            case.step()
            results.append([g.clone() for g in case.main_grads])
    finally:
        torch.set_num_threads(before)
    assert all(equal(result, results[0]) for result in results)


def test_every_way_of_running_backward_again_adds_again():
    case = Case(ODD)
    once = case.gradients()[2:]
    twice = [g + g for g in once]

    case.give_main_grads()
    y = case.forward()
    y.backward(case.dy, retain_graph=True)
    assert equal(case.main_grads, once)
    y.backward(case.dy)
    assert equal(case.main_grads, twice)

    case.give_main_grads()  # for the gradient of something else
    torch.autograd.grad(case.forward(), case.x, case.dy)
    assert equal(case.main_grads, once)

    case.give_main_grads()  # used twice in one graph
    (case.forward() + case.forward()).backward(case.dy)
    assert equal(case.main_grads, twice)

    case.give_main_grads()  # two batches under way, as in a pipeline
    first, second = case.forward(), case.forward()
    first.backward(case.dy)
    second.backward(case.dy)
    assert equal(case.main_grads, twice)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_adds_once(reentrant):
    case = Case(ODD, torch.bfloat16)
    case.give_main_grads()
    case.step()
    expected = [g.clone() for g in case.main_grads]
    case.give_main_grads()
    checkpoint(lambda x: case.forward(x=x), case.x, use_reentrant=reentrant).backward(case.dy)
    assert equal(case.main_grads, expected) and case.is_without_grads()


def test_each_parameter_for_itself():
    case = Case(ODD, torch.bfloat16)
    expected = case.gradients()[2:]
    w1, w2, b1, b2 = case.parameters
    w2.main_grad, b1.main_grad = torch.zeros(w2.shape), torch.zeros(b1.shape)
    case.step()
    assert equal((w1.grad, w2.main_grad.bfloat16(), b1.main_grad.bfloat16(), b2.grad), expected)
    assert w2.grad is None and b1.grad is None


def test_what_is_frozen_and_what_runs_without_gradients_adds_nothing():
    case = Case(ODD)
    case.give_main_grads()
    case.parameters[0].requires_grad_(False)
    version = case.parameters[0].main_grad._version
    case.step()
    assert case.parameters[0].main_grad._version == version
    assert [bool(g.any()) for g in case.main_grads] == [False, True, True, True]
    case.give_main_grads()
    with torch.no_grad():
        case.forward()
    assert not any(g.any() for g in case.main_grads)


def test_a_view_of_a_parameter_has_its_gradient_as_ever():
    case = Case(ODD)
    expected = case.gradients()[2:]
    case.give_main_grads()
    w1, w2, b1, b2 = case.parameters
    y = fused_experts(case.x, Routing(case.ids, case.weights, ODD.E), w1.view_as(w1), w2, (b1, b2))
    y.backward(case.dy)
    assert torch.equal(w1.grad, expected[0]) and not w1.main_grad.any()
    assert equal(case.main_grads[1:], expected[1:])


def test_hooks_run_and_find_no_gradient():
    """Megatron-LM's data parallelism waits for those of the gradient accumulator."""
    case, seen = Case(ODD), []
    case.give_main_grads()
    accumulators = [p.view_as(p).grad_fn.next_functions[0][0] for p in case.parameters]
    for name, p, node in zip(NAMES, case.parameters, accumulators, strict=True):
        p.register_hook(lambda grad, name=name: seen.append((name, grad)))
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad)))
        node.register_hook(lambda *_, name=name, p=p: seen.append((name, p.grad if p.main_grad.any() else "too early")))
    case.step()
    assert sorted(name for name, _ in seen) == sorted(3 * NAMES) and {grad for _, grad in seen} == {None}


def test_a_graph_that_saved_the_main_grad_notices():
    case, factor = Case(ODD), torch.ones((), requires_grad=True)
    case.give_main_grads()
    saved = (factor * case.main_grads[0]).sum()
    case.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_autocast_adds_to_the_main_grad_of_what_it_casts():
    case = Case(ODD)
    with torch.autocast("cpu", torch.bfloat16):
        expected = case.gradients()[2:]
        case.give_main_grads()
        case.step()
    assert equal([g.bfloat16() for g in case.main_grads], [g.bfloat16() for g in expected])
    assert case.is_without_grads()


def test_beside_rows_and_constants():
    case = Case(ODD)
    w1, w2, *bias = case.parameters
    expected = case.gradients()[2:]
    case.give_main_grads()
    mix, constants = torch.randn(ODD.T, 2, requires_grad=True), torch.randn(2, ODD.H, requires_grad=True)
    rows, scale = torch.randn(ODD.T, ODD.H, requires_grad=True), torch.randn(ODD.T, requires_grad=True)
    routing = Routing(case.ids, case.weights, ODD.E)
    fused_experts_onto(case.x, routing, w1, w2, Onto(rows, scale, mix, constants), bias).backward(case.dy)
    assert equal(case.main_grads, expected)
    assert torch.equal(rows.grad, case.dy * scale[:, None]) and all(t.grad.any() for t in (scale, mix, constants))


def test_no_gradient_is_made_beside_the_main_grad():
    case, sizes = Case(Shape("few tokens, large experts", 4, 8, 2, 64, 48), torch.bfloat16), []
    case.give_main_grads()

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.untyped_storage().nbytes() for t in (out if isinstance(out, tuple) else (out,)))
            return out

    y = case.forward()
    with Sizes():
        y.backward(case.dy)
    largest_needed = max(t.nbytes for t in (case.x, case.weights, case.dy))
    assert sizes and max(sizes) <= largest_needed < min(p.nbytes for p in case.parameters[:2])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_compile_with_any_number_of_tokens(dtype):
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    case = Case(ODD, dtype)
    w1, w2, b1, b2 = case.parameters

    def layer(x, ids, weights):
        return fused_experts(x, Routing(ids, weights, ODD.E), w1, w2, (b1, b2))

    compiled, results = torch.compile(layer, fullgraph=True, dynamic=True, backend=count), []
    compiled(case.x[:3], case.ids[:3], case.weights[:3])  # before there is a main_grad
    count.frame_count = 0
    for run in (layer, compiled):
        case.give_main_grads(0.3)
        for T in range(2, 40, 7):
            y = run(case.x[:T], case.ids[:T], case.weights[:T])
            y.backward(case.dy[:T])
        results.append(case.main_grads)
    assert equal(*results) and case.is_without_grads() and results[0][0].any()
    assert count.frame_count == 1


def test_inductor_adds_in_place_with_batches_under_way():
    torch._dynamo.reset()
    case = Case(ODD)
    once, (w1, w2, *bias) = case.gradients()[2:], case.parameters
    main_grads, routing = case.give_main_grads(), Routing(case.ids, case.weights, ODD.E)
    compiled = torch.compile(lambda x: fused_experts(x, routing, w1, w2, bias), fullgraph=True)
    first, second = compiled(case.x), compiled(case.x)
    first.backward(case.dy)
    second.backward(case.dy)
    assert equal(main_grads, [g + g for g in once]) and case.is_without_grads()


def op_args(case):
    with torch.no_grad():
        tensors = (case.x.detach(), case.ids, case.weights.detach(), *(p.detach() for p in case.parameters))
        gate = (case.activation, 1.7, 7.0, case.layout.transposed, case.layout.interleaved, "output")
        _, h = torch.ops.moert.fused_experts(*tensors, *gate, True)
    return (case.dy, *tensors, h), gate


@pytest.mark.parametrize("i,shape", [*enumerate(FUSED_EXPERTS_SHAPES[:8])], ids=str)
def test_opcheck(i, shape):
    case = Case(shape, activation=ACTIVATIONS[(3 * i) % len(ACTIVATIONS)], layout=EXPERT_LAYOUTS[i % 4])
    tensors, gate = op_args(case)
    main_grads = [torch.randn_like(p).detach() for p in case.parameters]
    backward = torch.ops.moert.fused_experts_backward_.default
    opcheck(backward, (*tensors, *main_grads, *gate, 0b111111))
    opcheck(backward, (*tensors, None, main_grads[1], None, None, *gate, 0b000101))
    _, x, ids, weights, *parameters, _ = tensors
    leaves = [t.requires_grad_() for t in (x, weights, *parameters)]
    absent = (None,) * 7
    opcheck(
        torch.ops.moert.fused_experts.default,
        (leaves[0], ids, *leaves[1:], *gate, True, *absent, *main_grads),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


ERRORS = [
    ("w1", lambda p: torch.zeros(p.shape).bfloat16(), "w1_main_grad must have dtype Float, got BFloat16"),
    ("w1", lambda p: torch.zeros(p.shape).double(), "w1_main_grad must have dtype Float, got Double"),
    (
        "w2",
        lambda p: torch.zeros(7, 21, 37),
        r"w2_main_grad must have the shape of w2, \[7, 37, 21\], got \[7, 21, 37\]",
    ),
    ("w2", lambda p: torch.zeros(7, 21, 37).mT, "w2_main_grad must be contiguous, got other strides"),
    ("b1", lambda p: torch.zeros(1, 1).expand(7, 42), "b1_main_grad must be contiguous, got other strides"),
    ("b2", lambda p: torch.zeros(7), r"b2_main_grad must have the shape of b2, \[7, 37\], got \[7\]"),
    ("b2", lambda p: torch.zeros(p.shape, device="meta"), "b2_main_grad must be on the device of x, cpu, got meta"),
    ("w1", lambda p: 0.0, "w1_main_grad must be of type Tensor or None, got float"),
]


@pytest.mark.parametrize("name,wrong,message", ERRORS, ids=[m for *_, m in ERRORS])
def test_errors(name, wrong, message):
    case = Case(ODD)
    case.give_main_grads(0.5)
    p = case.parameters[NAMES.index(name)]
    others = [q.main_grad for q in case.parameters if q is not p]
    p.main_grad = wrong(p)
    with pytest.raises((RuntimeError, TypeError), match=message):
        case.forward()
    if not torch.is_tensor(p.main_grad):
        return
    tensors, gate = op_args(case)
    with pytest.raises(RuntimeError, match="main_grad must"):
        torch.ops.moert.fused_experts_backward_(*tensors, *case.main_grads, *gate, 0b111111)
    assert all((g == 0.5).all() for g in others)


def test_a_main_grad_of_a_bias_that_is_not_there():
    case = Case(ODD)
    (dy, x, ids, weights, w1, w2, b1, _, h), gate = op_args(case)
    main_grads = case.give_main_grads()
    with pytest.raises(RuntimeError, match="b2_main_grad must be None where b2 is, got a tensor"):
        torch.ops.moert.fused_experts_backward_(dy, x, ids, weights, w1, w2, b1, None, h, *main_grads, *gate, 0b011111)
    assert not any(g.any() for g in main_grads)


def test_gradients_of_gradients_are_an_error():
    case = Case(ODD)
    case.give_main_grads()
    with pytest.raises(RuntimeError, match="create_graph must be False where .* added to a main_grad, got True"):
        case.forward().backward(case.dy, create_graph=True)
    assert not any(g.any() for g in case.main_grads)
