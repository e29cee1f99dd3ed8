import pytest
import torch
from torch.library import opcheck

from moert.ops.grouped_gemm import grouped_gemm, grouped_gemm_ref
from moert.testing import DTYPES, GROUPED_GEMM_SHAPES, LAYOUTS, assert_grads_close, assert_rows_close, strided

MIDDLE = GROUPED_GEMM_SHAPES[6]  # sentinels: rows beyond the last expert
LARGE = GROUPED_GEMM_SHAPES[7]


def case(shape, dtype=torch.float32, transposed=False):
    """x, w, offsets, bias, tokens, scale of a shape; x [T, K] is gathered by tokens [T*k]."""
    T, E, K, N = shape.T, shape.E, shape.H, shape.I
    ids = shape.routing().ids.long().flatten()
    order = torch.where((ids >= 0) & (ids < E), ids, E).sort(stable=True)
    offsets = torch.searchsorted(order.values, torch.arange(E + 1)).int()
    tokens = torch.where(order.values < E, order.indices // shape.k, -1).int()
    w = torch.randn((E, K, N) if transposed else (E, N, K)) / K**0.5
    x, bias, scale = torch.randn(T, K), torch.randn(E, N), torch.rand(T * shape.k) + 0.5
    return (
        x.to(dtype),
        w.to(dtype),
        offsets,
        bias.to(dtype),
        tokens,
        scale.to(torch.promote_types(dtype, torch.float32)),
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["ENK", "EKN"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GROUPED_GEMM_SHAPES, ids=str)
def test_forward(shape, dtype, transposed):
    x, w, offsets, bias, tokens, scale = case(shape, dtype, transposed)
    rows = x[tokens.clamp_min(0).long()]
    for bias_, scale_, on in (
        (None, None, "output"),
        (bias, None, "output"),
        (bias, scale, "output"),
        (bias, scale, "input"),
    ):

        def ref(x, w, bias, scale, on=on):
            return grouped_gemm_ref(x, w, offsets, bias, tokens, scale, on, transposed)

        gathered = grouped_gemm(x, w, offsets, bias_, tokens, scale_, on, transposed)
        assert_rows_close(gathered, ref, x, w, bias_, scale_)
        assert torch.equal(grouped_gemm(rows, w, offsets, bias_, None, scale_, on, transposed), gathered)
        assert not gathered[offsets[-1] :].any()


@pytest.mark.parametrize("on", ["output", "input"])
@pytest.mark.parametrize("transposed", [False, True], ids=["ENK", "EKN"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [MIDDLE, LARGE], ids=str)
def test_backward(shape, dtype, transposed, on):
    x, w, offsets, bias, tokens, scale = case(shape, dtype, transposed)
    dy = torch.randn(len(tokens), shape.I, dtype=dtype)

    def run(fn, x, w, bias, scale):
        return fn(x, w, offsets, bias, tokens, scale, on, transposed)

    # Factor 3: a bias gradient sums up to 300 rows, and one rounding of dy * scale in dtype is added to torch's own.
    assert_grads_close(
        lambda *a: run(grouped_gemm, *a), lambda *a: run(grouped_gemm_ref, *a), dy, x, w, bias, scale, factor=3
    )


@pytest.mark.parametrize("on", ["output", "input"])
@pytest.mark.parametrize("transposed", [False, True], ids=["ENK", "EKN"])
def test_gradcheck(transposed, on):
    x, w, offsets, bias, tokens, scale = case(GROUPED_GEMM_SHAPES[1], torch.float64, transposed)
    inputs = [t[..., :5].contiguous() if t.dim() == 2 and t is x else t for t in (x, w, bias, scale)]
    inputs[1] = w[:, :5, :7].contiguous() if transposed else w[:, :7, :5].contiguous()
    inputs[2] = bias[:, :7].contiguous()

    def run(x, w, bias, scale):
        return grouped_gemm(x, w, offsets, bias, tokens, scale, on, transposed)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("transposed", [False, True], ids=["ENK", "EKN"])
def test_gradgradcheck_of_rows(transposed):
    """The gradient of the rows is differentiable again; that of the weights says that it is not."""
    w = torch.randn((3, 4, 5) if transposed else (3, 5, 4), dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    offsets, tokens = torch.tensor([0, 2, 2, 5]).int(), torch.tensor([3, 0, 0, 5, 1, -1]).int()
    for index in (None, tokens):
        assert torch.autograd.gradgradcheck(
            lambda x, i=index: grouped_gemm(x, w, offsets, tokens=i, transposed=transposed), x
        )


def test_small_integers_are_exact():
    x, w, offsets, bias, tokens, _ = case(LARGE)
    x, w, bias = ((t * 4).round() for t in (x, w * LARGE.H**0.5, bias))
    out, ref = (fn(x, w, offsets, bias, tokens) for fn in (grouped_gemm, grouped_gemm_ref))
    assert torch.equal(out, ref)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_memory_layout(layout, dtype):
    x, w, offsets, bias, tokens, _ = case(LARGE, dtype)
    plain = grouped_gemm(x, w, offsets, bias, tokens)
    assert torch.equal(grouped_gemm(strided(x, layout), w, offsets, strided(bias, layout), tokens), plain)
    # A weight that lies the other way takes another path through the packing, in the same order of sums.
    out = grouped_gemm(x, strided(w, layout), offsets, bias, tokens)
    assert_rows_close(out, lambda x, w, b: grouped_gemm_ref(x, w, offsets, b, tokens), x, w, bias)


def test_same_bits_for_any_number_of_threads():
    x, w, offsets, bias, tokens, scale = case(LARGE, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            y = grouped_gemm(x, w, offsets, bias, tokens, scale)
            dw = torch.ops.moert.grouped_gemm_wgrad(y, x, offsets, tokens, False)
            results.append((y, dw))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for pair in results for a, b in zip(pair, results[0], strict=True))


def test_an_expert_without_rows_gets_a_zero_gradient():
    x, w, _, _, _, _ = case(LARGE)
    offsets = torch.tensor([0, 0, 10, 10, 10, 10, 10, 30, 30]).int()
    dw = torch.ops.moert.grouped_gemm_wgrad(torch.randn(30, LARGE.I), x[:30], offsets, None, False)
    assert dw[[0, 2, 3, 4, 5, 7]].abs().max() == 0 and dw[[1, 6]].abs().min() > 0


def test_frozen_weights_and_second_backward():
    x, w, offsets, *_ = case(LARGE)
    x = x[: offsets[-1]].requires_grad_()
    offsets = (offsets.clamp_max(len(x))).int()
    y = grouped_gemm(x, w, offsets)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert dx.requires_grad  # dx is a grouped GEMM itself, and differentiable: see test_gradgradcheck_of_rows
    w.requires_grad_()
    (dw,) = torch.autograd.grad(grouped_gemm(x, w, offsets).square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_gemm must be differentiated at most once"):
        dw.sum().backward()


@pytest.mark.parametrize("transposed", [False, True], ids=["ENK", "EKN"])
def test_opcheck(transposed):
    for shape in GROUPED_GEMM_SHAPES[:4] + (MIDDLE,):
        x, w, offsets, bias, tokens, scale = case(shape, transposed=transposed)
        x, w, bias, scale = (t.requires_grad_() for t in (x, w, bias, scale))
        opcheck(torch.ops.moert.grouped_gemm.default, (x, w, offsets, bias, tokens, scale, "output", transposed))
        dy = torch.randn(len(tokens), shape.I)
        opcheck(torch.ops.moert.grouped_gemm_wgrad.default, (dy, x.detach(), offsets, tokens, transposed))
    args = (x, w, offsets, bias, tokens, scale, "output", transposed, True)  # tf32: no different on a CPU
    opcheck(torch.ops.moert.grouped_gemm.default, args)
    assert torch.equal(torch.ops.moert.grouped_gemm(*args), torch.ops.moert.grouped_gemm(*args[:-1]))
    opcheck(torch.ops.moert.grouped_gemm_wgrad.default, (dy, x.detach(), offsets, tokens, transposed, True))


def test_compile_with_any_number_of_tokens():
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(grouped_gemm, fullgraph=True, dynamic=True, backend=count)
    x, w, offsets, bias, tokens, scale = case(LARGE)
    w.requires_grad_()
    for T in range(1, 65):
        ends = offsets.clamp_max(T).int()
        args = (x[:T], w, ends, bias)
        out, expected = compiled(*args), grouped_gemm(*args)
        assert torch.equal(out, expected)
        assert torch.equal(*(torch.autograd.grad(y.square().sum(), w)[0] for y in (out, expected)))
    assert count.frame_count <= 2


def good():
    x, w, offsets, bias, tokens, scale = case(GROUPED_GEMM_SHAPES[1])  # T=1, E=8, k=4, K=64, N=48
    return {"x": x, "w": w, "offsets": offsets, "bias": bias, "tokens": tokens, "scale": scale, "scale_on": "output"}


ERRORS = [
    ({"x": torch.zeros(3)}, r"x must be \[S, K\], got shape \[3\]"),
    ({"x": torch.zeros(1, 64, dtype=torch.int32)}, "x must have dtype Float, BFloat16, Half or Double, got Int"),
    ({"x": torch.zeros(1, 63)}, r"w must have shape \[E, N, K=63\], got \[8, 48, 64\]"),
    ({"w": torch.zeros(48, 64)}, r"w must be \[E, N, K\], got shape \[48, 64\]"),
    ({"w": torch.zeros(8, 48, 64).half()}, "w must have the dtype of x, Float, got Half"),
    ({"offsets": torch.zeros(9)}, "offsets must have dtype Int, got Float"),
    ({"offsets": torch.zeros(9, 1).int()}, r"offsets must be \[E\+1\], got shape \[9, 1\]"),
    ({"offsets": torch.zeros(7).int()}, r"offsets must have shape \[E\+1=9\], got \[7\]"),
    ({"offsets": torch.arange(9).int()}, "offsets must end at or below S=4, got 8"),
    ({"offsets": torch.tensor([0, 2, 1, 1, 1, 1, 1, 1, 1]).int()}, "offsets must ascend from 0"),
    ({"offsets": torch.tensor([-1, 0, 1, 1, 1, 1, 1, 1, 1]).int()}, "offsets must ascend from 0"),
    ({"bias": torch.zeros(8, 47)}, r"bias must have shape \[E=8, N=48\], got \[8, 47\]"),
    ({"bias": torch.zeros(8, 48).double()}, "bias must have the dtype of x, Float, got Double"),
    ({"tokens": torch.full((4,), 9).int()}, r"tokens must be in \[0, T=1\) for every slot in use, got 9"),
    ({"tokens": torch.zeros(4)}, "tokens must have dtype Int, got Float"),
    ({"scale": torch.zeros(3)}, r"scale must have shape \[S=4\], got \[3\]"),
    ({"scale": torch.zeros(4).double()}, "scale must have dtype Float or that of x, got Double"),
    ({"scale_on": "both"}, "scale_on must be output or input, got both"),
]


@pytest.mark.parametrize("wrong,message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(wrong, message):
    with pytest.raises(RuntimeError, match=message):
        grouped_gemm(**(good() | wrong))
