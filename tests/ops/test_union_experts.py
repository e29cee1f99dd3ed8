import pytest
import torch
from torch.library import opcheck

from moert import Activation, ExpertLayout
from moert.ops.union_experts import experts_in_use, union_experts, union_experts_ref
from moert.testing import DTYPES, ID_DTYPES, LAYOUTS, Shape, assert_grads_close, assert_rows_close, strided
from moert.types import ACTIVATIONS

SHAPES = (
    Shape("no tokens", 0, 4, 2, 16, 24),
    Shape("decode: one token", 1, 8, 3, 64, 48),
    Shape("one expert is a plain FFN", 17, 1, 1, 32, 64),
    Shape("every expert listed: dense", 6, 5, 5, 24, 16),
    Shape("nothing is a multiple of the vector or the tile", 7, 60, 9, 33, 19),
    Shape("several tiles of each size", 140, 6, 4, 136, 300),
    Shape("nothing between the products", 9, 5, 3, 33, 0),
)
ODD, LARGE = SHAPES[4], SHAPES[5]


def case(shape, dtype=torch.float32, activation="silu", layout=ExpertLayout(), bias=True):
    """x, gains, w1, w2, b1, b2 and the function (fn, those) -> y; k experts are listed among sentinels."""
    T, E, k, H, I = shape.T, shape.E, shape.k, shape.H, shape.I
    width = 2 * I if Activation(activation).gated else I
    ids = torch.cat([torch.randperm(E)[:k], torch.tensor([E, -1, E + 7])])[torch.randperm(k + 3)].int()
    gains = (torch.rand(T, E) + 0.1) * (torch.rand(T, E) < 0.7)
    w1, w2 = torch.randn(E, width, H) / H**0.5, torch.randn(E, H, I) / I**0.5
    if layout.transposed:
        w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
    b1, b2 = (torch.randn(E, width).to(dtype), torch.randn(E, H).to(dtype)) if bias else (None, None)
    gains = gains.to(torch.promote_types(dtype, torch.float32))

    def run(fn, x, gains, w1, w2, b1=None, b2=None, ids=ids):
        return fn(x, gains, ids, w1, w2, (b1, b2), activation, layout)

    return [torch.randn(T, H).to(dtype), gains, w1.to(dtype), w2.to(dtype), b1, b2], run


def assert_forward(args, run):
    assert_rows_close(run(union_experts, *args), lambda *a: run(union_experts_ref, *a), *args)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, dtype, bias):
    assert_forward(*case(shape, dtype, bias=bias))


@pytest.mark.parametrize("layout", [ExpertLayout(), ExpertLayout(True, True)], ids=["ENK", "EKN-interleaved"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_of_every_variant(activation, layout):
    for dtype in (torch.float32, torch.bfloat16):
        assert_forward(*case(ODD, dtype, activation, layout))


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_backward(shape, dtype, activation):
    args, run = case(shape, dtype, activation)
    dy = torch.randn_like(args[0])
    # Factor 3: a bias gradient sums up to 140 rows, and the order differs from torch's.
    assert_grads_close(lambda *a: run(union_experts, *a), lambda *a: run(union_experts_ref, *a), dy, *args, factor=3)


def test_gradcheck():
    args, run = case(Shape("small", 3, 4, 2, 5, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda *a: run(union_experts, *a), [a.requires_grad_() for a in args])


def test_experts_in_use():
    gains = torch.tensor([[0, 0.5, 0, 0], [0, 0, 0, -1.0]])
    assert experts_in_use(gains).tolist() == [1, 3, 4, 4]
    assert experts_in_use(gains[:0]).tolist() == [4] * 4


def test_the_experts_in_use_are_enough():
    args, run = case(LARGE)
    args[1][:, 2:4] = 0
    every, some = torch.arange(6), experts_in_use(args[1])
    assert some.tolist() == [0, 1, 4, 5, 6, 6]
    torch.testing.assert_close(run(union_experts, *args, ids=some), run(union_experts, *args, ids=every))


def test_same_bits_for_any_number_of_threads_and_padding():
    args, run = case(LARGE, torch.bfloat16)
    ids, before, results = torch.tensor([4, 0, 3]), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            results.append(run(union_experts, *args, ids=ids))
    finally:
        torch.set_num_threads(before)
    results.append(run(union_experts, *args, ids=torch.tensor([-1, 4, 99, 0, 3, 6])))
    assert all(torch.equal(y, results[0]) for y in results)


def test_nothing_listed_and_listed_twice():
    args, run = case(ODD)
    assert not run(union_experts, *args, ids=torch.tensor([60, -3])).any()
    assert not run(union_experts, *args, ids=torch.zeros(0, dtype=torch.int32)).any()
    once, twice = (run(union_experts, *args, ids=torch.tensor(ids)) for ids in ([5], [5, 5]))
    torch.testing.assert_close(twice, 2 * once)
    leaves = [a.requires_grad_() for a in args]
    zero = torch.autograd.grad(run(union_experts, *leaves, ids=torch.tensor([60])).sum(), leaves)
    assert not any(g.any() for g in zero)


def test_ids_of_any_integer_dtype():
    args, run = case(ODD)
    expected = run(union_experts, *args, ids=torch.tensor([7, 0, 44]))
    for dtype in ID_DTYPES:
        assert torch.equal(run(union_experts, *args, ids=torch.tensor([7, 0, 44, 100]).to(dtype)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout):
    args, run = case(LARGE)
    plain = run(union_experts, *args)
    for i in range(len(args)):
        odd = [strided(a, layout) if j == i else a for j, a in enumerate(args)]
        torch.testing.assert_close(run(union_experts, *odd), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(union_experts, *args, ids=strided(torch.arange(6)[None], layout)[0]),
                       run(union_experts, *args, ids=torch.arange(6)))  # fmt: skip


def test_frozen_weights_and_second_backward():
    args, run = case(ODD)
    x = args[0].requires_grad_()
    (dx,) = torch.autograd.grad(run(union_experts, *args).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_experts must be differentiated at most once"):
        dx.sum().backward()


def test_opcheck():
    for shape in SHAPES[:5]:
        for layout, activation in ((ExpertLayout(), "silu"), (ExpertLayout(True, True), "swiglu")):
            args, _ = case(shape, activation=activation, layout=layout)
            x, gains, w1, w2, b1, b2 = (a.requires_grad_() for a in args)
            ids = torch.tensor([0, shape.E, shape.E - 1], dtype=torch.int32)
            flags = (activation, 1.7, 7.0, layout.transposed, layout.interleaved)
            opcheck(torch.ops.moert.union_experts.default, (x, gains, ids, w1, w2, b1, b2, *flags))


def test_compile_with_any_number_of_tokens():
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    args, run = case(LARGE)
    compiled = torch.compile(lambda *a: run(union_experts, *a, ids=experts_in_use(a[1])), fullgraph=True, dynamic=True,
                             backend=count)  # fmt: skip
    for T in (3, 64, 140):
        some = [args[0][:T], args[1][:T], *args[2:]]
        assert torch.equal(compiled(*some), run(union_experts, *some, ids=experts_in_use(some[1])))
    assert count.frame_count <= 2


def test_autocast():
    args, run = case(ODD)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(union_experts, *args)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), run(union_experts, *args), rtol=0.05, atol=0.05)


ERRORS = [
    ({"x": torch.zeros(3)}, r"x must be \[T, H\], got shape \[3\]"),
    ({"x": torch.zeros(2, 4).int()}, "x must have dtype Float, BFloat16, Half or Double, got Int"),
    ({"gains": torch.zeros(2, 2)}, r"gains must have shape \[T=2, E=3\], got \[2, 2\]"),
    ({"gains": torch.zeros(2, 3).half()}, "gains must have dtype Float or that of x, got Half"),
    ({"ids": torch.zeros(2, 2).int()}, r"ids must be \[n\], got shape \[2, 2\]"),
    ({"ids": torch.zeros(2)}, "ids must have an integer dtype, got Float"),
    ({"w1": torch.zeros(3, 5, 6)}, r"w1 must have shape \[E, 2I, H=4\], got \[3, 5, 6\]"),
    ({"w2": torch.zeros(3, 4, 6)}, r"w2 must have shape \[E=3, H=4, I=5\], got \[3, 4, 6\]"),
    ({"w2": torch.zeros(3, 4, 5).half()}, "w2 must have the dtype of x, Float, got Half"),
    ({"bias": (torch.zeros(3, 4), None)}, r"b1 must have shape \[E=3, I=5\], got \[3, 4\]"),
    ({"bias": (None, torch.zeros(3, 5))}, r"b2 must have shape \[E=3, H=4\], got \[3, 5\]"),
    ({"activation": "swiglu"}, r"w1 must have an even 2I for the gated activation swiglu, got \[3, 5, 4\]"),
]


@pytest.mark.parametrize("wrong,message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(wrong, message):
    good = {"x": torch.zeros(2, 4), "gains": torch.zeros(2, 3), "ids": torch.tensor([0]), "w1": torch.zeros(3, 5, 4),
            "w2": torch.zeros(3, 4, 5)}  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        union_experts(**(good | wrong))
