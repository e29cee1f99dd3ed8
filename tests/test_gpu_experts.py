"""What fused_experts is given, refuses and starts on the GPU, and its choices of kernels.  `make test-gpu` runs it."""

import pytest
import torch
import torch._dynamo.testing
from tests.test_gpu import DEVICE, LAYOUTS, NEEDS_GPU, by_gpu, experts_case, persistent_tiles, there

import moert
from moert import Routing
from moert.ops.fused_experts import fused_experts_onto, fused_experts_onto_ref, fused_experts_ref
from moert.testing import DTYPES, assert_grads_close, assert_rows_close
from moert.types import Onto

pytestmark = NEEDS_GPU


def kernels_of(fn):
    """Names of moert's kernels that fn starts, after a first call; torch's fill what tests leave uninitialised."""
    fn()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fn()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if "moert::cuda::" in event.name]


@pytest.mark.parametrize("planned", (False, True), ids=("", "plan"))
@pytest.mark.parametrize("T", (3, 150), ids=("few", "many"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_added_and_a_known_plan(dtype, T, planned):
    (x, weights, w1, w2, *bias), _ = experts_case(dtype=dtype)
    E, H, C = w1.shape[0], x.shape[1], 3
    ids = torch.randint(-1, E + 1, weights[:T].shape).int()
    rows, scale, mix, constants = torch.randn(T, H), torch.rand(T), torch.rand(T, C), torch.randn(C, H)

    def run(fn, x, weights, w1, w2, b1, b2, *parts):
        plan = moert.permute_plan(ids.to(x.device), E) if planned and fn is fused_experts_onto else None
        return fn(x, Routing(ids.to(x.device), weights, E, plan=plan), w1, w2, Onto(*parts), (b1, b2))

    args = (x[:T], weights[:T], w1, w2, *bias, rows.to(dtype), scale, mix, constants.to(dtype))
    op, ref = by_gpu(lambda *a: run(fused_experts_onto, *a)), lambda *a: run(fused_experts_onto_ref, *a)
    assert_rows_close(op(*args), ref, *args)
    # What lies between the products is rounded to dtype, four times on the way to dx.
    assert_grads_close(op, ref, torch.randn(T, H).to(dtype), *args, factor=4)


@pytest.mark.parametrize("scale_on", ("output", "input"))
@pytest.mark.parametrize("layout", LAYOUTS, ids=("ENK", "EKN", "EKN-interleaved"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_within_the_second_product(dtype, layout, scale_on, monkeypatch):
    monkeypatch.setenv("MOERT_FUSED_COMBINE", "1")
    args, run = experts_case(layout=layout, dtype=dtype)
    with torch.no_grad():
        y = by_gpu(lambda *a: run(moert.fused_experts, *a, scale_on))(*args)
        names = kernels_of(lambda: run(moert.fused_experts, *map(there, args), scale_on))
    assert_rows_close(y, lambda *a: run(fused_experts_ref, *a, scale_on), *args)
    assert any("start_sums" in name for name in names) and not any("unpermute" in name for name in names), names


@pytest.mark.parametrize("layout", LAYOUTS, ids=("ENK", "EKN", "EKN-interleaved"))
@pytest.mark.parametrize("T,tile", ((9, (8, 128)), (60, (32, 128)), (600, (128, 128)), (9000, (128, 256))))
def test_both_products_are_persistent(T, tile, layout, monkeypatch):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setenv("MOERT_PERSISTENT_GEMM", "1")
    E, k, H, I = 8, 2, 256, 512
    w1, w2 = torch.randn(E, 2 * I, H) / H**0.5, torch.randn(E, H, I) / I**0.5
    if layout.transposed:
        w1, w2 = w1.mT.contiguous(), w2.mT.contiguous()
    ids, x = torch.rand(T, E).argsort(1)[:, :k].int(), torch.randn(T, H).bfloat16()
    args = x, torch.rand(T, k), w1.bfloat16(), w2.bfloat16()

    def run(fn, x, weights, w1, w2):
        return fn(x, Routing(ids.to(x.device), weights, E), w1, w2, activation="swiglu_oai", layout=layout)

    with torch.no_grad():
        names = kernels_of(lambda: run(moert.fused_experts, *map(there, args)))
        y = by_gpu(lambda *a: run(moert.fused_experts, *a))(*args)
    first, second = persistent_tiles(names)
    assert first == tile and second[0] == tile[0], names
    assert_rows_close(y, lambda *a: run(fused_experts_ref, *a), *args)


@pytest.mark.parametrize("T", (1, 2, 3, 4))
def test_few_tokens_start_two_kernels(T):
    (x, weights, w1, w2, *bias), _ = experts_case()
    args, ids = [there(a) for a in (x[:T], weights[:T], w1, w2)], torch.zeros(T, 3).int().to(DEVICE)

    def decode():
        with torch.inference_mode():
            return moert.fused_experts(args[0], Routing(ids, args[1], w1.shape[0]), *args[2:])

    assert len(kernels_of(decode)) == 2


@pytest.mark.parametrize("T,most", ((1, 1), (200, 1), (30000, 3)))
def test_a_plan_starts_few_kernels(T, most):
    ids = torch.randint(0, 64, (T, 8), device=DEVICE, dtype=torch.int32)
    assert len(kernels_of(lambda: moert.permute_plan(ids, 64))) == most
    logits = torch.randn(T, 64, device=DEVICE)
    assert len(kernels_of(lambda: moert.topk_gating(logits, 8))) == 1


def test_compile_with_any_number_of_tokens():
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    args, _ = experts_case()
    x, weights, w1, w2 = (there(a).requires_grad_() for a in args[:4])
    E = w1.shape[0]
    ids = torch.randint(-1, E + 1, weights.shape).int().to(DEVICE)

    def layer(x, ids, weights, w1, w2):
        return moert.fused_experts(x, Routing(ids, weights, E), w1, w2)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for T in (*range(1, 8), 33, 64, 150):
        inputs = x[:T], ids[:T], weights[:T], w1, w2
        out, expected = compiled(*inputs), layer(*inputs)
        assert torch.equal(out, expected)
        grads = [torch.autograd.grad(y.square().sum(), (x, weights, w1, w2)) for y in (out, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert count.frame_count <= 2


@pytest.mark.parametrize("T", (2, 150), ids=("few", "many"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, T):
    """Views of every argument: rows between 16-byte pieces, columns apart, weights turned and cut out."""
    (x, weights, w1, w2, b1, b2), _ = experts_case(dtype=dtype)
    x, weights = x[:T], weights[:T]
    E, wide, bias = w1.shape[0], lambda t: torch.cat((t, t), -1), (b1, b2)
    ids = torch.randint(-1, E + 1, weights.shape).int()

    def run(fn, x, ids, weights, w1, w2, bias):
        return fn(x, Routing(ids, weights, E), w1, w2, bias)

    ref = lambda x, weights, w1, w2, b1, b2: run(fused_experts_ref, x, ids, weights, w1, w2, (b1, b2))  # noqa: E731
    for cut in (lambda t: wide(t)[..., 1 : t.shape[-1] + 1], lambda t: wide(t)[..., : 2 * t.shape[-1] : 2]):
        views = [cut(there(t)) for t in (x, weights, w1, w2, *bias)]
        args = [view.cpu().contiguous() for view in views]
        y = run(moert.fused_experts, views[0], there(ids.T.contiguous()).T, *views[1:4], tuple(views[4:]))
        assert_rows_close(y.cpu(), ref, *args)
    turned = [there(w.mT.contiguous()).mT for w in (w1, w2)]
    y = run(moert.fused_experts, there(x), there(ids), there(weights), *turned, tuple(map(there, bias)))
    assert_rows_close(y.cpu(), ref, x, weights, w1, w2, *bias)
