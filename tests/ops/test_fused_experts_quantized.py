import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck

from moert import _C, Activation, Routing, batch_invariant
from moert.ops.fused_experts import fused_experts_ref
from moert.ops.fused_experts_quantized import default_precision, fused_experts_quantized, fused_experts_quantized_ref
from moert.quant import (
    BitNested,
    Fp8,
    Int4,
    Int4Asymmetric,
    Int8,
    Mxfp4,
    SubOneBit,
    Ternary2,
    Ternary5,
)
from moert.quant.format import PackedTensor
from moert.testing import (
    DTYPES,
    FUSED_EXPERTS_SHAPES,
    ID_DTYPES,
    LAYOUTS,
    Shape,
    assert_grads_close,
    assert_rows_close,
    row_error,
    strided,
)
from moert.types import ACTIVATIONS

FORMATS = [
    *(Int8(), Int8(32), Int8(64), Int8(128)),
    *(Int4(32), Int4(64), Int4(128), Int4Asymmetric(32), Int4Asymmetric(128), Mxfp4()),
    *(Ternary2(), Ternary2(32), Ternary2(128), Ternary5(), Ternary5(64)),
    *(BitNested(1, 1), BitNested(2, 1, 64), BitNested(3, 1, 128), BitNested(), BitNested(2, 3, 128)),
    *(BitNested(5, 1), BitNested(5, 2, 64), BitNested(5, 3), BitNested(5, 4), BitNested(8, 1, 128)),
]
ONE_OF_EACH = [Int8(), Int4(), Int4Asymmetric(), Mxfp4(), Ternary2(), Ternary5(), BitNested()]
FULL_ONLY = [Fp8(), SubOneBit()]
FLOATS, INT8 = ("full", "bfloat16"), ("int8", "int8_group32", "int8_group160")
PRECISIONS = FLOATS + INT8
INT8_WEIGHTS = "int8_weights"  # of the formats below
HAVE_INT8_WEIGHTS = ("int8", "int4", "int4_asymmetric", "mxfp4")
ODD = Shape("nothing is a multiple of anything, experts with 0 to 20 rows", 61, 7, 3, 37, 21, "sentinels")
LONG = Shape("rows of more than one block of a panel and of many steps", 40, 3, 2, 1110, 650)
FEW = Shape("one to four rows an expert", 9, 7, 2, 300, 140)
LARGE = FUSED_EXPERTS_SHAPES[-1]


def precisions_of(fmt):
    weights = (INT8_WEIGHTS,) if fmt.name in HAVE_INT8_WEIGHTS else ()
    return FLOATS if fmt in FULL_ONLY else PRECISIONS + weights


def case(shape, fmt, dtype=torch.float32, activation="swiglu", bias=False):
    """x, weights [T, k], b1, b2 and the function (fn, those) -> y."""
    E, H, I = shape.E, shape.H, shape.I
    width = 2 * I if Activation(activation).gated else I
    routing = shape.routing(dtype=torch.promote_types(dtype, torch.float32))
    first, second = fmt if isinstance(fmt, tuple) else (fmt, fmt)
    w1, w2 = first.pack(torch.randn(E, width, H) / H**0.5), second.pack(torch.randn(E, H, I) / I**0.5)
    b1, b2 = (torch.randn(E, width).to(dtype), torch.randn(E, H).to(dtype)) if bias else (None, None)
    x = torch.randn(shape.T, H).to(dtype)

    def run(fn, x, weights, b1=None, b2=None, precision="full", scale_on="output"):
        return fn(x, Routing(routing.ids, weights, E), w1, w2, (b1, b2), activation, precision, scale_on)

    return [x, routing.weights, b1, b2], run


def assert_rounded_close(y, run, args, precision, **options):
    """By the rule for most rows.  Between the products a value may lie so near the middle of two codes that float32 and
    float64 round it to different ones: one code is 1/254 of the largest value of its group at most, and one bfloat16
    1/256 of its own.
    """
    exact = run(fused_experts_quantized_ref, *(a if a is None else a.double() for a in args), precision, **options)
    rows = [row_error(y[t : t + 1], exact[t : t + 1]) for t in range(len(y))]
    assert row_error(y, exact) < 8e-3
    unit = torch.finfo(y.dtype).eps if y.dtype != torch.float32 else 0
    assert sorted(rows)[len(rows) // 2] < 1e-5 + unit


@pytest.mark.parametrize("fmt", [*FORMATS, *FULL_ONLY], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(fmt, dtype):
    wide = dtype == torch.float32
    every = wide and fmt in [*ONE_OF_EACH, *FULL_ONLY]
    for shape in [*FUSED_EXPERTS_SHAPES, FEW] if every else (ODD, LONG, FEW) if wide else (ODD, FEW):
        args, run = case(shape, fmt, dtype)
        assert_rows_close(
            run(fused_experts_quantized, *args), lambda *a, f=run: f(fused_experts_quantized_ref, *a), *args
        )


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("precision", INT8)
def test_forward_int8(fmt, precision):
    for shape in (*FUSED_EXPERTS_SHAPES[1:], LONG) if fmt in ONE_OF_EACH else (ODD, LONG):
        args, run = case(shape, fmt, bias=True)
        args[0][:, ::5] *= 20  # scales differ from group to group
        y = run(fused_experts_quantized, *args, precision)
        assert_rounded_close(y, run, args, precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_fp8_rows(dtype):
    """A value between two codes may become either: a step of 1 / 14 of it at most, of one of I terms."""
    for shape in (*FUSED_EXPERTS_SHAPES[1:], LONG) if dtype == torch.float32 else (ODD, LONG):
        args, run = case(shape, Fp8(), dtype, bias=True)
        args[0][:, ::5] *= 20
        y = run(fused_experts_quantized, *args, "fp8_group128")
        exact = run(fused_experts_quantized_ref, *(a.double() for a in args), "fp8_group128")
        rows = sorted(row_error(y[t : t + 1], exact[t : t + 1]) for t in range(len(y)))
        unit = torch.finfo(dtype).eps if dtype != torch.float32 else 0
        assert rows[len(rows) // 2] < 1e-5 + unit and rows[-1] < 0.05
        assert len(y) < 4 or row_error(y, run(fused_experts_quantized_ref, *args, "full")) > 5e-3  # they are rounded
        assert torch.equal(y, run(fused_experts_quantized, *args, "fp8_group128"))


def test_fp8_rows_at_the_ends_of_numbers():
    args, run = case(Shape("one choice", 6, 2, 1, 150, 40), Fp8())
    x = args[0]
    x[0, 140], x[1, 3], x[2], x[3] = torch.nan, torch.inf, x[2] * 2.0**-125, 0
    y = run(fused_experts_quantized, *args, precision="fp8_group128")
    assert y[:2].isnan().all() and (y[2:4] == 0).all() and y[4:].isfinite().all() and (y[4:] != 0).any()


@pytest.mark.parametrize("fmt", [*FULL_ONLY, *(f for f in FORMATS if isinstance(f, BitNested))], ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 40])
@pytest.mark.parametrize("K", [1, 31, 129, 720])
def test_formats_with_kernels_for_few_rows_of_floats_hold_their_numbers(fmt, T, K):
    """Times the identity, once as weights and once as rows: what comes out are sums of one product each."""
    w = fmt.pack(torch.randn(1, K, K) * torch.rand(1, K, 1).exp())
    eye = Int8().pack(torch.eye(K)[None] * 127)
    eye = PackedTensor(eye.format, K, (eye.codes == 127).byte(), eye.scales)
    routing = Routing(torch.zeros(T, 1).int(), torch.ones(T, 1), 1)
    expected = fmt.unpack(w)[0]
    rows = torch.arange(T) * (K - 1) // max(T - 1, 1)
    x = torch.eye(K)[rows]
    for pair in ((w, eye), (eye, w)):
        y = fused_experts_quantized(x, routing, *pair, activation="identity", precision="full")
        assert torch.equal(y, expected[:, rows].T) or row_error(y, expected[:, rows].T) < 3e-7


@pytest.mark.parametrize("scale_on", ["output", "input"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_of_every_variant(activation, scale_on):
    for i, precision in enumerate(PRECISIONS):
        fmt = ONE_OF_EACH[(ACTIVATIONS.index(activation) + i) % 7], ONE_OF_EACH[i]
        args, run = case(ODD, fmt, activation=activation, bias=True)
        y = run(fused_experts_quantized, *args, precision, scale_on)
        if precision == "full":
            assert_rows_close(y, lambda *a, f=run: f(fused_experts_quantized_ref, *a, "full", scale_on), *args)
        else:
            assert_rounded_close(y, run, args, precision, scale_on=scale_on)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_narrow_rows_are_quantized_as_their_values(dtype):
    args, run = case(LONG, Int4(), dtype)
    for precision in PRECISIONS[1:]:
        assert_rounded_close(run(fused_experts_quantized, *args, precision), run, args, precision)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 40])
def test_integer_sums_are_exact(fmt, T):
    """Rows whose scale is 1 and weights of small integers: every instruction set gives the integers of int64."""
    K, N = 720, 19
    x = torch.randint(-127, 128, (T, K)).float()
    x[:, ::32] = 127  # the largest of every group
    eye = Int8().pack(torch.eye(K)[None] * 127)  # code 127, scale 1
    eye = PackedTensor(eye.format, K, (eye.codes == 127).byte()[...], eye.scales)
    packed = fmt.pack(torch.randn(1, N, K))
    # 2 and 2: e2m1 has halves.  bit_nested has fractions of 2^-5 at most.
    scale = 128 if isinstance(fmt, Mxfp4) else 32 if isinstance(fmt, BitNested) else 2
    w2 = PackedTensor(fmt, K, packed.codes, torch.full_like(packed.scales, scale), packed.zeros)
    routing = Routing(torch.zeros(T, 1).int(), torch.ones(T, 1), 1)
    w = fmt.unpack(w2)
    expected = (x.long() @ w[0].long().T).float()
    more = w2.codes.new_zeros(*w2.codes.shape[:-2], K - N, w2.codes.shape[-1])
    w2 = PackedTensor(fmt, K, torch.cat([w2.codes, more], -2), *[
        None if s is None else torch.cat([s, s[:, :1].expand(1, K - N, -1)], 1) for s in (w2.scales, w2.zeros)
    ])  # fmt: skip
    for precision in PRECISIONS[1:] if torch.equal(w.bfloat16().float(), w) else INT8:
        y = fused_experts_quantized(x, routing, eye, w2, activation="identity", precision=precision)
        assert torch.equal(y[:, :N], expected)


@pytest.mark.parametrize("fmt", [*ONE_OF_EACH, *FULL_ONLY], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(fmt, dtype):
    for shape in FUSED_EXPERTS_SHAPES[::3] if dtype == torch.float32 else (ODD,):
        args, run = case(shape, fmt, dtype, bias=True)
        b1, b2 = args[2:]
        dy = torch.randn_like(args[0])

        def of(fn, b1=b1, b2=b2, run=run):
            return lambda x, weights: run(fn, x, weights, *(b.to(x.dtype) for b in (b1, b2)))

        assert_grads_close(of(fused_experts_quantized), of(fused_experts_quantized_ref), dy, *args[:2])


@pytest.mark.parametrize("scale_on", ["output", "input"])
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai", "gelu"])
def test_gradcheck(activation, scale_on):
    args, run = case(Shape("small", 5, 3, 2, 4, 3), Int8(), torch.float64, activation, bias=True)
    x, weights = (a.requires_grad_() for a in args[:2])
    assert torch.autograd.gradcheck(
        lambda x, w: run(fused_experts_quantized, x, w, *args[2:], scale_on=scale_on), (x, weights)
    )


@pytest.mark.parametrize("precision", ["int8_group32", "bfloat16", INT8_WEIGHTS])
def test_gradients_are_those_of_full_precision(precision):
    args, run = case(LARGE, Int4())
    x, weights = (a.requires_grad_() for a in args[:2])
    dy = torch.randn_like(x)
    full, rounded = (
        torch.autograd.grad(run(fused_experts_quantized, x, weights, precision=p), (x, weights), dy)
        for p in ("full", precision)
    )
    assert all(map(torch.equal, full, rounded))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_error_rule_of_the_default(fmt):
    """Gaussian rows: int8 where the whole error is at most 1.5 times that of the weights alone, else full.  With
    channels whose sizes spread by a factor of e it stays so but for weights of 8 bits, which are nearly exact: 2.
    """
    w1, w2 = torch.randn(8, 768, 512) / 512**0.5, torch.randn(8, 512, 384) / 384**0.5
    routing, packed = Shape("wide", 64, 8, 2, 512, 384).routing(), (fmt.pack(w1), fmt.pack(w2))
    x = torch.randn(64, 512)

    def ratio(x, precision):
        exact = fused_experts_ref(x, routing, w1, w2)
        weights_only = error(fused_experts_quantized(x, routing, *packed, precision="full"), exact)
        return error(fused_experts_quantized(x, routing, *packed, precision=precision), exact) / weights_only

    assert ratio(x, "auto") <= 1.5
    if fmt in (Int8(32), BitNested(5, 4)):  # groups of 64 are at 1.5
        assert ratio(x, "int8_group32") > 1.5
    assert ratio(x * torch.exp(torch.randn(512)), "auto") <= (
        2 if isinstance(fmt, Int8) or fmt == BitNested(8, 1, 128) else 1.5
    )


def error(y, exact):
    return ((y - exact).norm() / exact.norm()).item()


def test_default_precision_is_what_auto_runs():
    groups = {fmt: fmt.group or 0 for fmt in FORMATS}
    planes = {fmt: getattr(fmt, "planes", 0) for fmt in FORMATS}
    by_rule = {fmt: _C.default_precision(fmt.name, group, planes[fmt]) for fmt, group in groups.items()}
    assert {fmt for fmt, p in by_rule.items() if p == "full"} == {Int8(32), Int8(64), BitNested(5, 4)}
    assert {fmt for fmt, p in by_rule.items() if p == "int8_group160"} == {Ternary5()}
    assert {fmt for fmt, p in by_rule.items() if p == "int8_group32"} > {Ternary2(), Ternary2(32), Ternary5(64), Int4()}
    assert {_C.default_precision(fmt.name, fmt.group or 0) for fmt in FULL_ONLY} == {"full"}
    shape = Shape("no choice is dropped", 61, 7, 3, 37, 21)
    kinds = Int8(), Int8(32), Ternary2(), Ternary5(), Fp8(), BitNested(2, 4)
    for first, second in itertools.product(kinds, repeat=2):
        args, run = case(shape, (first, second))
        w1, w2 = first.pack(torch.ones(7, 1, 1)), second.pack(torch.ones(7, 1, 1))
        expected = run(fused_experts_quantized, *args, precision=default_precision(w1, w2, shape.T * shape.k))
        assert torch.equal(run(fused_experts_quantized, *args, precision="auto"), expected)
    x, weights, *_ = case(ODD, Int8(), torch.float64)[0]
    args, run = case(ODD, Int8(), torch.float64)
    assert torch.equal(run(fused_experts_quantized, *args, precision="auto"), run(fused_experts_quantized, *args))


@pytest.mark.parametrize("id_dtype", ID_DTYPES, ids=str)
def test_ids_of_any_integer_type(id_dtype):
    (x, weights, *_), _ = case(ODD, Int4())
    w1, w2 = Int4().pack(torch.randn(7, 42, 37)), Int4().pack(torch.randn(7, 37, 21))
    ids = ODD.routing().ids
    wide = torch.where(ids < 0, torch.iinfo(id_dtype).max, ids.long()).to(id_dtype)
    out = fused_experts_quantized(x, Routing(wide, weights, ODD.E), w1, w2)
    assert torch.equal(out, fused_experts_quantized(x, Routing(ids, weights, ODD.E), w1, w2))


@pytest.mark.parametrize("precision", [*PRECISIONS, INT8_WEIGHTS])
def test_dropped_choices_add_nothing_and_get_no_gradient(precision):
    (x, weights, *_), _ = case(ODD, Int8(32))
    w1, w2 = Int8(32).pack(torch.randn(7, 42, 37)), Int8(32).pack(torch.randn(7, 37, 21))
    ids = ODD.routing(id_dtype=torch.int64).ids
    ids[::3] = torch.tensor([-1, 2**63 - 1, -(2**63)])
    dropped = (ids < 0) | (ids >= ODD.E)
    x, weights = x.requires_grad_(), torch.where(dropped, torch.nan, weights).requires_grad_()
    y = fused_experts_quantized(x, Routing(ids, weights, ODD.E), w1, w2, precision=precision)
    y.sum().backward()
    assert not y[::3].any() and not x.grad[::3].any() and y[1].any()
    assert not weights.grad[dropped].any() and weights.grad[~dropped].all()


@pytest.mark.parametrize(
    "fmt,precision", [(f, p) for f in (Int8(), Int4(), *FULL_ONLY) for p in precisions_of(f)], ids=str
)
@pytest.mark.parametrize("shape", [ODD, LARGE], ids=str)
def test_nan_stays_in_the_tokens_that_hold_it(shape, fmt, precision):
    args, run = case(shape, fmt)
    clean, dirty = run(fused_experts_quantized, *args, precision=precision), args[0].clone()
    dirty[4, 3], dirty[17] = torch.nan, torch.inf
    out = run(fused_experts_quantized, dirty, *args[1:], precision=precision)
    others = [t for t in range(shape.T) if t not in (4, 17)]
    assert torch.equal(out[others], clean[others]) and not out[4].isfinite().any()
    assert precision in FLOATS or out[17].isnan().all()


def test_rows_of_zeros_and_of_tiny_values():
    args, run = case(ODD, Int4())
    args[0][0], args[0][1] = 0, 1e-40
    for precision in (*INT8, INT8_WEIGHTS):
        y = run(fused_experts_quantized, *args, precision=precision)
        assert not y[:2].any() and y.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout):
    w1, w2 = Int4Asymmetric().pack(torch.randn(7, 42, 37)), Int4Asymmetric().pack(torch.randn(7, 37, 21))
    x, routing = torch.randn(61, 37), ODD.routing()
    moved = [
        PackedTensor(w.format, w.columns, *(strided(part, layout) for part in (w.codes, w.scales, w.zeros)))
        for w in (w1, w2)
    ]
    y = fused_experts_quantized(strided(x, layout), Routing(routing.ids, strided(routing.weights, layout), 7), *moved)
    assert torch.equal(y, fused_experts_quantized(x, routing, w1, w2))


@pytest.mark.parametrize("fmt", [*ONE_OF_EACH, *FULL_ONLY], ids=str)
def test_same_bits_for_any_number_of_threads(fmt):
    before, results = torch.get_num_threads(), []
    args, run = case(LARGE, fmt, torch.bfloat16, bias=True)
    try:
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            leaves = [a.detach().requires_grad_() for a in args[:2]]
            ys = [run(fused_experts_quantized, *leaves, *args[2:], precision=p) for p in precisions_of(fmt)]
            results.append((*ys, *torch.autograd.grad(ys[0].float().square().sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("fmt", [*FORMATS, *FULL_ONLY], ids=str)
def test_batch_invariant(fmt):
    """A token has the same bits alone, with three others, and among all: 110 rows of one expert and few of others."""
    T, E, k, H, I = 130, 4, 2, 200, 96
    ids = torch.stack([torch.zeros(T), 1 + torch.arange(T) % 3], 1).int()
    ids[::13, 0] = 3
    weights, x = torch.rand(T, k), torch.randn(T, H)
    w1, w2 = fmt.pack(torch.randn(E, 2 * I, H) / H**0.5), fmt.pack(torch.randn(E, H, I) / I**0.5)

    def run(rows, precision):
        routing = Routing(ids[rows], weights[rows], E)
        return fused_experts_quantized(x[rows], routing, w1, w2, precision=precision)

    for precision in precisions_of(fmt):
        with batch_invariant(True):
            whole = run(slice(None), precision)
            for rows in (slice(7, 8), slice(20, 24), slice(60, 100)):
                assert torch.equal(run(rows, precision), whole[rows])
        assert row_error(run(slice(None), precision), whole) < 1e-2


def test_every_isa_gives_the_same_sums():
    code = (
        "import torch\n"
        "from moert import Routing, fused_experts_quantized as f\n"
        "from moert.quant import *\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x = torch.randn(9, 200, generator=g)\n"
        "w1, w2 = torch.randn(1, 200, 200, generator=g), torch.randn(1, 200, 200, generator=g)\n"
        "r = Routing(torch.zeros(9, 1).int(), torch.ones(9, 1), 1)\n"
        "for fmt in (Int8(), Ternary2(), Ternary5()):\n"
        "    y = f(x, r, fmt.pack(w1), fmt.pack(w2), activation='relu', precision='int8')\n"
        "    print(y.numpy().tobytes().hex())\n"
        "for fmt in (Int8(32), Int4(), Int4(64), Int4Asymmetric(), Int4Asymmetric(128), Mxfp4()):\n"
        "    y = f(x, r, fmt.pack(w1), fmt.pack(w2), activation='relu', precision='int8_weights')\n"
        "    print(y.numpy().tobytes().hex())\n"
    )
    outputs = [
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "MOERT_ISA": isa}) for isa in _C.isas()
    ]
    assert len(set(outputs)) == 1 and len(outputs[0]) > 9 * 200 * 8


def test_autocast():
    args, run = case(LARGE, Int4())
    with torch.autocast("cpu", torch.bfloat16):
        y = run(fused_experts_quantized, *args)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, run(fused_experts_quantized, args[0].bfloat16(), args[1]))


def test_a_second_backward_is_an_error():
    args, run = case(ODD, Int4())
    x = args[0].requires_grad_()
    (dx,) = torch.autograd.grad(run(fused_experts_quantized, *args).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_experts_quantized must be differentiated at most once"):
        dx.sum().backward()


def op_args(shape, fmt):
    (x, weights, b1, b2), _ = case(shape, fmt, bias=True)
    w1, w2 = fmt.pack(torch.randn(shape.E, 2 * shape.I, shape.H)), fmt.pack(torch.randn(shape.E, shape.H, shape.I))
    parts = (*w1.operands, *w2.operands)
    tensors = (x.requires_grad_(), shape.routing().ids, weights.requires_grad_(), *parts, b1, b2)
    return tensors, (*(fmt.name, fmt.group or 0) * 2, "swiglu", 1.7, 7.0)


@pytest.mark.parametrize("i,shape", [*enumerate([*FUSED_EXPERTS_SHAPES[:6], *[ODD] * 3])], ids=str)
def test_opcheck(i, shape):
    tensors, options = op_args(shape, [*ONE_OF_EACH, *FULL_ONLY][i])
    for precision in FLOATS:
        opcheck(torch.ops.moert.fused_experts_quantized.default, (*tensors, *options, precision, "output"))
    tensors = [t if t is None else t.detach() for t in tensors]
    dy = torch.randn(shape.T, shape.H)
    for needs in (1, 2, 3):
        args = (dy, *tensors, *options, "output", needs)
        opcheck(torch.ops.moert.fused_experts_quantized_backward.default, args)


@pytest.mark.parametrize("fmt", [Int4(), *FULL_ONLY], ids=str)
def test_compile_with_any_number_of_tokens(fmt):
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    (x, weights, *_), _ = case(LARGE, fmt)
    w1, w2 = fmt.pack(torch.randn(8, 288, 136)), fmt.pack(torch.randn(8, 136, 144))
    ids, x, weights = LARGE.routing().ids, x.requires_grad_(), weights.requires_grad_()

    def layer(x, ids, weights):
        return fused_experts_quantized(x, Routing(ids, weights, LARGE.E), w1, w2)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for T in range(1, 65):
        inputs = x[:T], ids[:T], weights[:T]
        out, expected = compiled(*inputs), layer(*inputs)
        assert torch.equal(out, expected)
    grads = [torch.autograd.grad(y.square().sum(), (x, weights)) for y in (out, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert count.frame_count <= 2


def test_errors():
    w1, w2 = Int4().pack(torch.randn(4, 10, 40)), Int4().pack(torch.randn(4, 40, 5))
    x, routing = torch.randn(3, 40), Routing(torch.zeros(3, 2).int(), torch.ones(3, 2), 4)
    with pytest.raises(ValueError, match="w1 must have E=routing.num_experts=5 experts, got 4"):
        fused_experts_quantized(x, Routing(routing.ids, routing.weights, 5), w1, w2)
    with pytest.raises(
        RuntimeError,
        match="precision must be one of auto, full, bfloat16, int8, int8_group32, fp8_group128, int8_weights, "
        "int8_group160, got i",
    ):
        fused_experts_quantized(x, routing, w1, w2, precision="int4")
    with pytest.raises(ValueError, match="x must have H=40 columns, as w1 has, got 41"):
        fused_experts_quantized(torch.randn(3, 41), routing, w1, w2)
    wanted = r"codes1 must have shape \[E=4, rows=10, bytes=48\] for 70 columns of int4, got \[4, 10, 16\]"
    with pytest.raises(RuntimeError, match=wanted):
        fused_experts_quantized(
            torch.randn(3, 70), routing, PackedTensor(Int4(), 70, w1.codes[..., :16], w1.scales), w2
        )
    with pytest.raises(RuntimeError, match="x must have dtype Float, BFloat16 or Half for int8 rows, got Double"):
        fused_experts_quantized(x.double(), Routing(routing.ids, routing.weights.double(), 4), w1, w2, precision="int8")
    with pytest.raises(RuntimeError, match="bias must not require gradients over packed weights"):
        bias = torch.zeros(4, 10, requires_grad=True), None
        fused_experts_quantized(x, routing, w1, w2, bias).sum().backward()
    with pytest.raises(ValueError, match="w1 must not require gradients: packed weights have none"):
        scales = w1.scales.clone().requires_grad_()
        fused_experts_quantized(x, routing, PackedTensor(w1.format, 40, w1.codes, scales), w2)
    with pytest.raises(TypeError, match="w2 must be of type PackedTensor or SubOneBitTensor, got Tensor"):
        fused_experts_quantized(x, routing, w1, w2.codes)
    long = Int8().pack(torch.zeros(1, 2, 2**17 + 1))
    with pytest.raises(RuntimeError, match="H and I must be at most 131072 for int8_group32 rows, got 131073"):
        down = Int8().pack(torch.zeros(1, 2**17 + 1, 1))
        fused_experts_quantized(
            torch.zeros(1, 2**17 + 1), Routing(torch.zeros(1, 1).int(), torch.ones(1, 1), 1), long, down
        )
