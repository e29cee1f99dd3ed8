import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from moert import _C, GroupLimit, topk_gating
from moert.ops.gating import topk_gating_ref
from moert.testing import DTYPES, GATING_SHAPES, LAYOUTS, Shape, assert_rows_close, strided

ISAS = ("generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")  # gating kernels: the first three
OPS = torch.ops.moert
SCORES = ("softmax", "softmax_over_topk", "sigmoid", "relu", "identity")
SHAPES = (
    *GATING_SHAPES,
    Shape("no choice", 5, 8, 0),
    Shape("a choice of one", 1, 257, 1),
    Shape("more experts than the first cache holds", 33, 1024, 8),
    Shape("enough tokens for several threads", 1030, 128, 8),
)
BIAS = torch.Generator().manual_seed(7)


def options(E):
    """Name -> keyword arguments of topk_gating that suit E experts: each score, and what is put around it."""
    bias = torch.randn(E, generator=BIAS)
    cases = {score: {"score": score} for score in SCORES}
    cases["mixtral"] = {"renormalize": True}
    cases["biased"] = {"score": "softmax", "bias": bias * 0.1, "renormalize": True, "scale": 2.5}
    cases["biased_topk"] = {"score": "softmax_over_topk", "bias": bias, "scale": 0.5}
    if E % 4 == 0 and E >= 8:
        cases["deepseek_v2"] = {"groups": GroupLimit(4, 2, "max"), "scale": 16.0}
        cases["deepseek_v3"] = {"score": "sigmoid", "bias": bias * 0.1, "renormalize": True, "scale": 2.5}
        cases["deepseek_v3"]["groups"] = GroupLimit(4, 2)
        cases["relu_groups"] = {"score": "relu", "groups": GroupLimit(4, 3)}
    return cases


def all_cases():
    cases = []
    for shape in SHAPES:
        for name, kwargs in options(shape.E).items():
            groups = kwargs.get("groups")
            if groups is None or shape.k <= groups.topk_groups * shape.E // groups.num_groups:
                cases.append(pytest.param(shape, kwargs, id=f"{shape}-{name}"))
    return cases


def grad_of(fn, k, dweights, kwargs):
    def grad(logits):
        logits = logits.detach().requires_grad_()
        weights = fn(logits, k, **kwargs)[0]
        return torch.autograd.grad(weights, logits, dweights.to(weights.dtype))[0]

    return grad


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("shape,kwargs", all_cases())
def test_forward(shape, kwargs, dtype):
    logits = torch.randn(shape.T, shape.E).to(dtype)
    weights, ids = topk_gating(logits, shape.k, **kwargs)
    assert ids.dtype == torch.int32
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(ids, topk_gating_ref(logits, shape.k, **kwargs)[1])
    assert_rows_close(weights, lambda x: topk_gating_ref(x, shape.k, **kwargs)[0], logits)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("shape,kwargs", all_cases())
def test_backward(shape, kwargs, dtype):
    logits, dweights = torch.randn(shape.T, shape.E).to(dtype), torch.randn(shape.T, shape.k)
    dlogits = grad_of(topk_gating, shape.k, dweights, kwargs)(logits)
    assert dlogits.dtype == dtype
    if shape.k == 1 and kwargs.get("renormalize"):
        assert (dlogits == 0).all()  # a weight of 1 whatever the logits; plain torch leaves rounding errors
    else:
        assert_rows_close(dlogits, grad_of(topk_gating_ref, shape.k, dweights, kwargs), logits)


@pytest.mark.parametrize("renormalize", (False, True))
@pytest.mark.parametrize("score", SCORES)
def test_gradcheck(score, renormalize):
    # Far from ties and from the kink of ReLU, so that no difference quotient changes a choice.
    logits = torch.linspace(-2, 3, 60, dtype=torch.float64)[torch.randperm(60)].view(6, 10).requires_grad_()
    bias = torch.randn(10) * 1e-3
    for groups in (None, GroupLimit(5, 3, "max")):
        assert torch.autograd.gradcheck(
            lambda x, g=groups: topk_gating(x, 4, score, bias, renormalize, 2.5, g)[0], logits, fast_mode=False
        )


def test_second_backward_is_refused():
    logits = torch.randn(3, 8, requires_grad=True)
    (dlogits,) = torch.autograd.grad(topk_gating(logits, 2)[0].square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="create_graph must be False, got True: .* topk_gating has no gradient"):
        dlogits.sum().backward()


def test_choices_are_no_gradient_path():
    logits = torch.randn(3, 8, requires_grad=True)
    weights, ids = topk_gating(logits, 2, bias=torch.zeros(8))
    assert weights.requires_grad and not ids.requires_grad


@pytest.mark.parametrize("score", SCORES)
def test_ties_go_to_the_lower_id(score):
    for E, k in ((4, 2), (61, 7), (64, 64)):
        assert topk_gating(torch.zeros(5, E), k, score)[1].tolist() == [list(range(k))] * 5
    # Few values, many ties; -0.0 is 0.0.
    logits = torch.randint(-2, 3, (200, 40)) * torch.tensor([1.0, -1.0]).repeat(20)
    assert torch.equal(topk_gating(logits, 9, score)[1], topk_gating_ref(logits, 9, score)[1])
    assert topk_gating(torch.tensor([[-0.0, 0.0]]), 2, score)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("k", (3, 8, 12, 16))
def test_last_bits_decide(k):
    # Pairs of experts that differ in the last seven bits at most, also the last chosen one and the first left out.
    logits = torch.randn(600, 64).repeat(1, 2)
    bits = logits.view(torch.int32) + torch.randint(-60, 60, logits.shape, dtype=torch.int32)
    order = torch.randperm(128)
    for logits in (bits.view(torch.float32)[:, order], 1 + torch.randint(90, (600, 128)) * 2.0**-23):
        assert torch.equal(topk_gating(logits, k)[1], topk_gating_ref(logits, k)[1])


def test_ties_of_groups_go_to_the_lower_group():
    for groups in (GroupLimit(4, 2, "max"), GroupLimit(4, 2, "top2")):
        assert topk_gating(torch.zeros(1, 16), 8, groups=groups)[1].tolist() == [list(range(8))]


def test_logits_decide_where_their_scores_round_to_the_same():
    assert topk_gating(torch.tensor([[30.0, 40.0, 20.0]]), 2, "sigmoid")[1].tolist() == [[1, 0]]
    weights, ids = topk_gating(torch.tensor([[0.0, -300.0, -200.0]]), 3)
    assert ids.tolist() == [[0, 2, 1]] and weights.tolist() == [[1, 0, 0]]


def test_limited_groups_by_hand():
    logits = torch.tensor([[5.0, 0.0, 3.0, 3.0, 4.0, 1.0]])
    assert topk_gating(logits, 2, "relu", groups=GroupLimit(3, 1, "max"))[1].tolist() == [[0, 1]]
    assert topk_gating(logits, 2, "relu", groups=GroupLimit(3, 1, "top2"))[1].tolist() == [[2, 3]]
    # The bias counts in the selection, of groups and of experts, and not in the weights.
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 9.0])
    weights, ids = topk_gating(logits, 2, "relu", bias=bias, groups=GroupLimit(3, 1, "top2"))
    assert ids.tolist() == [[5, 4]] and weights.tolist() == [[1, 4]]


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("kwargs", [pytest.param(c, id=name) for name, c in options(16).items()])
def test_nan_and_inf_stay_in_their_rows(kwargs, value):
    clean = torch.randn(37, 16)
    logits = clean.clone()
    logits[3] = value
    logits[5, 2:4] = value
    logits[20, :15] = value
    weights, ids = topk_gating(logits, 6, **kwargs)
    assert torch.equal(ids, topk_gating_ref(logits, 6, **kwargs)[1])
    assert all(len(set(row)) == 6 and min(row) >= 0 and max(row) < 16 for row in ids.tolist())
    good = torch.tensor([t not in (3, 5, 20) for t in range(37)])
    clean_weights, clean_ids = topk_gating(clean, 6, **kwargs)
    assert torch.equal(weights[good], clean_weights[good]) and torch.equal(ids[good], clean_ids[good])
    assert torch.allclose(weights, topk_gating_ref(logits, 6, **kwargs)[0], equal_nan=True)
    dlogits = grad_of(topk_gating, 6, torch.ones(37, 6), kwargs)
    assert torch.equal(dlogits(logits)[good], dlogits(clean)[good])
    if value != value and kwargs.get("score", "softmax") == "softmax":
        assert weights[5].isnan().all()
    # With a bias the softmax is what selects, and all of it is NaN.
    if value != value and "groups" not in kwargs and kwargs.get("scale") != 2.5:
        assert not set(ids[5].tolist()) & {2, 3}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_a_nan_in_a_good_group_comes_before_what_other_groups_have(dtype, score):
    groups = GroupLimit(4, 2, "max")
    logits = torch.randn(64, 16).masked_fill(torch.rand(64, 16) < 0.4, float("nan")).to(dtype)
    for k in (2, 6, 8):
        ids = topk_gating(logits, k, score, groups=groups)[1]
        assert torch.equal(ids, topk_gating_ref(logits, k, score, groups=groups)[1])


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_same_bits_for_every_number_of_threads(threads):
    logits, dweights = torch.randn(3001, 67), torch.randn(3001, 6)

    def run():
        weights, ids = topk_gating(logits, 6, renormalize=True)
        return weights, ids, OPS.topk_gating_backward(dweights, logits, ids, "softmax", True, 1.0)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        torch.set_num_threads(threads)
        for _ in range(5):
            assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("T", (2, 3, 7, 16, 64, 257, 1024))
@pytest.mark.parametrize("score", SCORES)
def test_a_row_does_not_depend_on_the_batch(score, T):
    logits = torch.randn(T, 60)
    weights, ids = topk_gating(logits, 4, score)
    for t in (0, T // 2, T - 1):
        alone = topk_gating(logits[t : t + 1], 4, score)
        assert torch.equal(alone[0][0], weights[t]) and torch.equal(alone[1][0], ids[t])


def test_every_isa_gives_the_same_bits(tmp_path):
    program = """
import sys, torch
from moert import GroupLimit, _C, topk_gating
torch.manual_seed(3)
out = []
for E, k in ((1, 1), (8, 2), (60, 4), (256, 8), (257, 30)):
    logits = torch.randn(67, E) * 5
    logits[7, :2] = float("nan")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = logits.to(dtype).requires_grad_()
        for score in ("softmax", "softmax_over_topk", "sigmoid", "relu", "identity"):
            groups = GroupLimit(4, 3) if E % 4 == 0 else None
            bias = torch.linspace(-0.1, 0.1, E)
            for kwargs in ({}, {"renormalize": True, "bias": bias, "groups": groups, "scale": 2.5}):
                weights, ids = topk_gating(x, k, score, **kwargs)
                (dlogits,) = torch.autograd.grad(weights, x, torch.ones_like(weights))
                out += [weights.detach().nan_to_num(7), ids, dlogits.nan_to_num(7)]
torch.save(out, sys.argv[1])
print(_C.isa())
"""
    here = [isa for isa in ISAS[:3] if ISAS.index(isa) <= ISAS.index(_C.best_isa())]
    results = []
    for isa in here:
        path = tmp_path / isa
        command = [sys.executable, "-c", program, path]
        run = subprocess.run(command, env={**os.environ, "MOERT_ISA": isa}, capture_output=True)
        assert run.stdout.decode().strip() == isa, run.stderr.decode()
        results.append(torch.load(path))
    for isa, result in zip(here, results, strict=True):
        assert all(map(torch.equal, result, results[0])), isa


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_any_strides(layout, dtype):
    logits, dweights, bias = torch.randn(7, 19).to(dtype), torch.randn(7, 3), torch.randn(19)
    far = strided(logits, layout)
    weights, ids = topk_gating(logits, 3, bias=bias)
    got = topk_gating(far, 3, bias=strided(bias[None], layout)[0])
    assert torch.equal(got[0], weights) and torch.equal(got[1], ids)
    dweights = dweights.to(weights.dtype)
    expected = OPS.topk_gating_backward(dweights, logits, ids, "softmax", True, 1.0)
    got = OPS.topk_gating_backward(strided(dweights, layout), far, strided(ids, layout), "softmax", True, 1.0)
    assert torch.equal(got, expected)


def test_expanded_logits_and_gradients():
    row = torch.randn(1, 12)
    weights, ids = topk_gating(row.expand(20, 12), 3)
    assert torch.equal(weights, topk_gating(row, 3)[0].expand(20, 3))
    logits = torch.randn(5, 12, requires_grad=True)
    topk_gating(logits, 3, "sigmoid")[0].sum().backward()
    assert_rows_close(logits.grad, grad_of(topk_gating_ref, 3, torch.ones(5, 3), {"score": "sigmoid"}), logits)


@pytest.mark.parametrize("score", SCORES)
def test_dropped_choices_get_no_gradient(score):
    logits, dweights = torch.randn(3, 8), torch.tensor([[1.0, 2.0, 3.0]] * 3)
    ids = torch.tensor([[1, -1, 5], [8, 2**31 - 1, -(2**31)], [0, 3, 7]], dtype=torch.int32)
    dlogits = OPS.topk_gating_backward(dweights, logits, ids, score, False, 1.0)
    kept = OPS.topk_gating_backward(dweights[:1, ::2], logits[:1], ids[:1, ::2].contiguous(), score, False, 1.0)
    assert torch.equal(dlogits[:1], kept)
    assert (dlogits[1] == 0).all()


@pytest.mark.parametrize("T,E,k", ((0, 8, 2), (3, 8, 0), (0, 0, 0), (3, 0, 0)))
def test_empty(T, E, k):
    logits = torch.randn(T, E, requires_grad=True)
    weights, ids = topk_gating(logits, k, renormalize=True)
    assert weights.shape == ids.shape == (T, k)
    weights.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(T, E))


@settings(max_examples=200, deadline=None)
@given(
    T=st.integers(0, 40),
    size=st.integers(1, 40),
    num_groups=st.integers(1, 6),
    data=st.data(),
    score=st.sampled_from(SCORES),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    renormalize=st.booleans(),
    group_score=st.sampled_from(("max", "top2")),
)
def test_any_input_against_the_reference(T, size, num_groups, data, score, dtype, renormalize, group_score):
    size += group_score == "top2"
    topk_groups = data.draw(st.integers(1, num_groups))
    k = data.draw(st.integers(0, topk_groups * size))
    E = size * num_groups
    # Multiples of 1/4: scores that are equal are equal to the bit, and any others are far apart.
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = (torch.randint(-9, 10, (T, E), generator=generator) / 4).to(dtype)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]).to(dtype)
    lot = torch.randint(0, data.draw(st.sampled_from((8, 10**6))), (T, E), generator=generator)
    logits = torch.where(lot < 4, special[lot.clamp_max(3)], logits)
    bias = torch.randint(-3, 4, (E,), generator=generator).float() if score == "relu" else None
    groups = GroupLimit(num_groups, topk_groups, "max" if score != "relu" else group_score)
    weights, ids = topk_gating(logits, k, score, bias, renormalize, 2.0, groups)
    ref_weights, ref_ids = topk_gating_ref(logits, k, score, bias, renormalize, 2.0, groups)
    assert torch.equal(ids, ref_ids)
    torch.testing.assert_close(weights, ref_weights, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_is_above_what_is_barred(dtype):
    logits = torch.tensor([[0.0, 0.0, 1.0, torch.nan, torch.nan, 2.0]]).to(dtype)
    groups = GroupLimit(3, 2, "max")
    _, ids = topk_gating(logits, 4, groups=groups)
    assert torch.equal(ids, topk_gating_ref(logits, 4, groups=groups)[1]) and ids.tolist() == [[5, 2, 3, 4]]


def test_compile():
    counter = CompileCounterWithBackend("aot_eager")

    def gate(logits, bias):
        weights, ids = topk_gating(logits, 2, "sigmoid", bias, True, 2.5, GroupLimit(4, 2))
        return weights * 2, ids

    compiled = torch.compile(gate, backend=counter, fullgraph=True, dynamic=True)
    for T in range(1, 65):
        logits, bias = torch.randn(T, 16, requires_grad=True), torch.randn(16)
        got, expected = compiled(logits, bias), gate(logits, bias)
        assert all(map(torch.equal, got, expected))
        grads = [torch.autograd.grad(weights.square().sum(), logits)[0] for weights, _ in (got, expected)]
        assert torch.equal(*grads)
    assert counter.frame_count <= 2


def opcheck_samples():
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    for i, shape in enumerate(SHAPES[:10]):
        score = SCORES[i % 5]
        logits = torch.randn(shape.T, shape.E).to(dtypes[i % 3]).requires_grad_()
        args = (shape.k, score, torch.randn(shape.E) if i % 2 else None, True, 2.5, 1, 1, "max")
        yield "topk_gating", (logits, *args)
        weights, ids = OPS.topk_gating(logits.detach(), *args)
        yield "topk_gating_backward", (weights, logits.detach(), ids, score, True, 2.5)


@pytest.mark.parametrize("op", ("topk_gating", "topk_gating_backward"))
def test_opcheck(op):
    samples = [args for name, args in opcheck_samples() if name == op]
    assert len(samples) >= 8
    for args in samples:
        opcheck(getattr(OPS, op).default, args)


def test_meta():
    weights, ids = topk_gating(torch.empty(5, 8, dtype=torch.bfloat16, device="meta"), 2)
    assert (weights.shape, weights.dtype, ids.shape, ids.dtype) == ((5, 2), torch.float32, (5, 2), torch.int32)


X = torch.zeros(3, 8)
META = torch.zeros(8, device="meta")


@pytest.mark.parametrize(
    "logits,k,kwargs,message",
    [
        (torch.zeros(3), 1, {}, r"logits must be \[T, E\], got shape \[3\]"),
        (torch.zeros(2, 3, 4), 1, {}, r"logits must be \[T, E\], got shape \[2, 3, 4\]"),
        (X.int(), 1, {}, "logits must have dtype Float, BFloat16, Half or Double, got Int"),
        (X.bool(), 1, {}, "logits must have dtype Float, BFloat16, Half or Double, got Bool"),
        (X, 9, {}, r"k must be in \[0, E=8\], got 9"),
        (X, -1, {}, r"k must be in \[0, E=8\], got -1"),
        (torch.zeros(0, 8), 9, {}, r"k must be in \[0, E=8\], got 9"),
        (X, 1, {"score": "tanh"}, "score must be softmax, softmax_over_topk, sigmoid, relu or identity, got tanh"),
        (X, 1, {"score": ""}, "score must be softmax, softmax_over_topk, sigmoid, relu or identity, got "),
        (X, 1, {"bias": torch.zeros(7)}, r"bias must have shape \[E=8\], got \[7\]"),
        (X, 1, {"bias": torch.zeros(1, 8)}, r"bias must have shape \[E=8\], got \[1, 8\]"),
        (
            X,
            1,
            {"bias": torch.zeros(8).half()},
            r"bias must have dtype Float \(or Double for Double logits\), got Half",
        ),
        (X, 1, {"bias": torch.zeros(8).double()}, r"bias must have dtype Float \(or Double for Double lo.*got Double"),
        (X, 1, {"bias": META}, "bias must be on cpu, got meta"),
        (X.to("meta"), 1, {"bias": torch.zeros(8)}, "bias must be on meta, got cpu"),
        (X.to("meta"), 9, {}, r"k must be in \[0, E=8\], got 9"),
        (META, 9, {}, r"logits must be \[T, E\], got shape \[8\]"),
        (X, 1, {"groups": GroupLimit(3, 1)}, "num_groups must divide E=8, got 3"),
        (X, 1, {"groups": GroupLimit(0, 1)}, "num_groups must divide E=8, got 0"),
        (X, 1, {"groups": GroupLimit(-2, 1)}, "num_groups must divide E=8, got -2"),
        (X, 1, {"groups": GroupLimit(4, 5)}, r"topk_groups must be in \[1, num_groups=4\], got 5"),
        (X, 1, {"groups": GroupLimit(4, 0)}, r"topk_groups must be in \[1, num_groups=4\], got 0"),
        (X, 1, {"groups": GroupLimit(4, 2, "mean")}, "group_score must be top2 or max, got mean"),
        (
            X,
            1,
            {"groups": GroupLimit(8, 2)},
            "num_groups must leave two experts to a group for group_score top2, got 8",
        ),
        (X, 5, {"groups": GroupLimit(4, 2)}, "k must be at most the 4 experts of 2 groups, got 5"),
    ],
)
def test_errors(logits, k, kwargs, message):
    with pytest.raises(RuntimeError, match=message):
        topk_gating(logits, k, **kwargs)


IDS = torch.zeros(3, 2, dtype=torch.int32)
DWEIGHTS = torch.zeros(3, 2)


@pytest.mark.parametrize(
    "dweights,logits,ids,score,message",
    [
        (DWEIGHTS, X[0], IDS, "relu", r"logits must be \[T, E\], got shape \[8\]"),
        (DWEIGHTS, X.long(), IDS, "relu", "logits must have dtype Float, BFloat16, Half or Double, got Long"),
        (DWEIGHTS, X, IDS[:2], "relu", r"ids must have shape \[T=3, k\], got \[2, 2\]"),
        (DWEIGHTS, X, IDS[0], "relu", r"ids must have shape \[T=3, k\], got \[2\]"),
        (DWEIGHTS, X, IDS.long(), "relu", "ids must have dtype Int, got Long"),
        (DWEIGHTS.t(), X, IDS, "relu", r"dweights must have shape \[T=3, k=2\], got \[2, 3\]"),
        (DWEIGHTS.half(), X.half(), IDS, "relu", "dweights must have dtype Float, got Half"),
        (DWEIGHTS, X.double(), IDS, "relu", "dweights must have dtype Double, got Float"),
        (DWEIGHTS, X, IDS, "max", "score must be softmax, softmax_over_topk, sigmoid, relu or identity, got max"),
        (DWEIGHTS, X, IDS.to("meta"), "relu", "ids must be on cpu, got meta"),
        (DWEIGHTS.to("meta"), X, IDS, "relu", "dweights must be on cpu, got meta"),
    ],
)
def test_errors_of_the_backward(dweights, logits, ids, score, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.topk_gating_backward(dweights, logits, ids, score, False, 1.0)
