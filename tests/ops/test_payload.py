import pytest
import torch
import torch.distributed as dist

from moert import Routing
from moert.ops.dispatch import combine, dispatch, record_bytes
from moert.ops.expert_map import ExpertMap
from moert.ops.payload import PAYLOADS, WORD, decode, encode, rounded_ref
from moert.testing import DTYPES, random_routing
from ranks import ranks

E, k = 5, 2


def rows(T: int, H: int, dtype=torch.float32) -> torch.Tensor:
    """Of very different sizes, one of zeros, some with what is not finite."""
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(H)) * torch.logspace(-6, 4, T)[:, None]
    x[1:2], x[2:3, -1:], x[3:4, :1], x[4:5, 0:1] = 0, torch.inf, torch.nan, -torch.inf
    return x.to(dtype)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("H", [0, 1, 3, 4, 10, 33])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rounds_as_the_reference_does(payload, H, dtype):
    x = rows(9, H, dtype)
    words = encode(x, payload)
    assert words.shape == (9, -(-H // 4) + 1) and words.dtype == WORD
    for arrived in (words, words.repeat(1, 2)[:, : words.shape[1]]):
        got = decode(arrived, H, dtype, payload)
        assert got.dtype == dtype
        torch.testing.assert_close(got, rounded_ref(x, payload), rtol=0, atol=0, equal_nan=True)
    if H:
        assert (got[1] == 0).all() and got[2:5].isnan().all() and got[5:].isfinite().all()
    assert decode(encode(x[:0], payload), H, dtype, payload).shape == (0, H)


def test_error():
    """Of Gaussian rows, relative: 3.7 standard deviations over 127 steps, or 8 steps an octave; bytes of a row."""
    x = torch.randn(64, 2048)
    error = {p: ((decode(encode(x, p), 2048, x.dtype, p) - x).norm() / x.norm()).item() for p in PAYLOADS}
    assert error["int8"] < 0.01 and error["float8_e4m3"] < 0.03
    sizes = [record_bytes(torch.bfloat16, torch.float32, 2048, 8), record_bytes(WORD, torch.float32, 2048 // 4 + 1, 8)]
    assert sizes[1] < 0.52 * sizes[0]


def arrives(payload: str) -> None:
    rank, R = dist.get_rank(), dist.get_world_size()
    experts = ExpertMap.of(None, E, R)
    for T, H, dtype in ((6, 10, torch.float32), (0, 4, torch.bfloat16), (3, 7, torch.float16)):
        T += rank
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
        routing = random_routing(T, E, k, "sentinels", generator)
        weights = routing.weights.requires_grad_()
        whole, got = dispatch(x, routing, experts), dispatch(x, routing, experts, payload=payload)
        later = dispatch(x, routing, experts, asynchronous=True, payload=payload).wait()
        expected = rounded_ref(whole.x.detach(), payload)
        for there in (got, later):
            assert torch.equal(there.x, expected) and there.x.dtype == dtype
            assert torch.equal(there.routing.ids, whole.routing.ids)
            assert torch.equal(there.routing.weights, whole.routing.weights)
        dy = torch.randn(whole.x.shape, generator=generator).to(dtype), torch.rand(whole.routing.weights.shape)
        plain = torch.autograd.grad((whole.x, whole.routing.weights), (x, weights), dy)
        squares = later.x.square()
        assert torch.equal(combine(later.wait().x, later), combine(expected, whole))  # a second wait changes nothing
        squares.sum().backward(inputs=[x], retain_graph=True)
        for there in (got, later):
            grads = torch.autograd.grad((there.x, there.routing.weights), (x, weights), dy, retain_graph=True)
            assert all(map(torch.equal, grads, plain))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_ends_of_float32(payload):
    """Where a scale is not normal, and where the largest value times its scale rounds up: no sign turns, no inf."""
    tiny = torch.arange(1, 4000, dtype=torch.int32).view(torch.float32)[:, None] * torch.tensor([1, -1])
    most = torch.finfo(torch.float32).max
    for x in (tiny, torch.tensor([[3.4e38, -most], [most, 1.0]])):
        got = decode(encode(x, payload), 2, x.dtype, payload)
        assert torch.equal(got, rounded_ref(x, payload).clamp(-most, most))
        assert ((got == 0) | (got.sign() == x.sign())).all() and got.isfinite().all()
    assert decode(encode(torch.tensor([[1e39, 1]], dtype=torch.float64), payload), 2, x.dtype, payload).isnan().all()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_arrives_rounded_and_gradients_travel_whole(payload):
    assert ranks(3, arrives, payload) == [None] * 3


def differs() -> str:
    x, routing = torch.randn(2, 4), random_routing(2, E, k)
    experts = ExpertMap.of(None, E, 2)
    with pytest.raises(ValueError, match="payload must be None or one of int8, float8_e4m3, got int4"):
        dispatch(x, routing, experts, payload="int4")
    with pytest.raises(ValueError, match="routing.weights must be float32 beside a payload, got torch.float16"):
        dispatch(x.half(), Routing(routing.ids, routing.weights.half(), E), experts, payload="int8")
    with pytest.raises(RuntimeError) as error:
        dispatch(x, routing, experts, payload="int8" if dist.get_rank() else None)
    return str(error.value)


def test_errors():
    assert ranks(2, differs) == ["the payload must be the same on every rank, got none on rank 0, int8 on rank 1"] * 2
