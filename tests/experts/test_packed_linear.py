import pytest
import torch

from moert import permute_plan
from moert.experts import packed_linear as module
from moert.experts.packed_linear import packed_linear
from moert.ops.grouped_gemm import grouped_gemm_ref
from moert.quant import Int4, Int8, Mxfp4, Ternary5
from moert.testing import assert_grads_close, assert_rows_close, random_routing

E, N, K, T = 7, 40, 72, 30
FORMATS = [Int8(), Int4(64), Mxfp4(), Ternary5()]


@pytest.fixture(params=[1, 3 * 4 * N * K, 2**27], ids=["one", "three", "all"], autouse=True)
def experts_at_once(request, monkeypatch):
    monkeypatch.setattr(module, "_UNPACKED", request.param)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["uniform", "one_expert", "empty_experts", "sentinels"])
@pytest.mark.parametrize("gathered", [False, True], ids=["slots", "tokens"])
def test_as_grouped_gemm_on_the_unpacked_weights(fmt, kind, gathered):
    plan = permute_plan(random_routing(T, E, 2, kind).ids, E)
    packed, bias = fmt.pack(torch.randn(E, N, K)), torch.randn(E, N)
    x, tokens = torch.randn(T if gathered else 2 * T, K), plan.tokens if gathered else None
    for dtype in (torch.float32, torch.bfloat16):
        y = packed_linear(x.to(dtype), packed, plan.offsets, bias.to(dtype), tokens)
        w = fmt.unpack(packed).to(dtype)
        rows = slice(0, int(plan.offsets[-1]))
        args = x.to(dtype), w, bias.to(dtype)
        assert y.dtype == dtype and (y[rows.stop :] == 0).all()
        assert_rows_close(y, lambda x, w, bias: grouped_gemm_ref(x, w, plan.offsets, bias, tokens), *args)

    def mine(x, bias):
        return packed_linear(x, packed, plan.offsets, bias, tokens)

    def ref(x, bias):
        return grouped_gemm_ref(x, fmt.unpack(packed).to(x.dtype), plan.offsets, bias, tokens)

    assert_grads_close(mine, ref, torch.randn(len(plan.tokens), N), x, bias)


def test_autograd_keeps_no_float_weights():
    plan = permute_plan(random_routing(T, E, 2).ids, E)
    packed = Int4().pack(torch.randn(E, N, K))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = packed_linear(torch.randn(T, K, requires_grad=True), packed, plan.offsets, None, plan.tokens)
    y.sum().backward()
    assert sorted(map(tuple, saved)) == [(E + 1,), (2 * T,)]


def test_no_rows():
    packed = Int4().pack(torch.randn(E, N, K))
    offsets = torch.zeros(E + 1, dtype=torch.int32)
    assert packed_linear(torch.zeros(0, K), packed, offsets).shape == (0, N)
