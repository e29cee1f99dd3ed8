import pytest
import torch
import torch.distributed as dist

from moert import Routing
from moert.ops.dispatch import combine, dispatch, dispatch_pack_ref
from moert.ops.expert_map import ExpertMap
from moert.ops.payload import PAYLOADS, WORD, decode_ref, encode_ref, rounded_ref, rounded_width
from moert.ops.records import record_bytes
from moert.testing import DTYPES, random_routing
from ranks import ranks

E, k = 5, 2


def rows(T: int, H: int, dtype=torch.float32) -> torch.Tensor:
    """Of very different sizes, one of zeros, some with what is not finite."""
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(H)) * torch.logspace(-6, 4, T)[:, None]
    x[1:2], x[2:3, -1:], x[3:4, :1], x[4:5, 0:1] = 0, torch.inf, torch.nan, -torch.inf
    return x.to(dtype)


def encode(x: torch.Tensor, payload: str) -> torch.Tensor:
    """By dispatch_pack: every row to the one rank there is."""
    T, ids = len(x), torch.zeros(len(x), 1, dtype=torch.int32)
    nowhere, plan = torch.zeros(1, dtype=torch.int32), (torch.tensor([0, T]).int(), torch.arange(T).int())
    args = x, torch.ones(T, 1), ids, nowhere, nowhere, *plan, payload
    records = torch.ops.moert.dispatch_pack(*args)
    assert torch.equal(records, dispatch_pack_ref(*args))
    return records


def decode(records: torch.Tensor, H: int, dtype: torch.dtype, payload: str) -> torch.Tensor:
    rows = records.new_empty(len(records), H, dtype=dtype)
    torch.ops.moert.dispatch_unpack_(rows, records, payload)
    words = records[:, : 4 * rounded_width(H)].view(WORD)
    torch.testing.assert_close(rows, decode_ref(words, H, dtype, payload), rtol=0, atol=0, equal_nan=True)
    return rows


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("H", [0, 1, 3, 4, 10, 33, 64, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_as_the_reference_does(payload, H, dtype):
    x = rows(9, H, dtype)
    assert encode_ref(x, payload).shape == (9, rounded_width(H))
    records = encode(x, payload)
    for arrived in (records, records.repeat(1, 2)[:, : records.shape[1]]):
        got = decode(arrived, H, dtype, payload)
        assert got.dtype == dtype
        torch.testing.assert_close(got, rounded_ref(x, payload), rtol=0, atol=0, equal_nan=True)
    if H:
        assert (got[1] == 0).all() and got[2:5].isnan().all() and got[5:].isfinite().all()
    assert torch.equal(encode(x.mT.contiguous().mT, payload), records)
    assert decode(encode(x[:0], payload), H, dtype, payload).shape == (0, H)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_value(payload):
    """Of bfloat16 and of float16, each as a row of its own, and beside a largest one: so that all codes occur."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
        most = 448.0 if payload == "float8_e4m3" else 127.0
        beside = torch.cat([x.clamp(-most, most), torch.full_like(x, most)], 1)
        for each in (x, beside):
            records = encode(each, payload)
            decode(records, each.shape[1], dtype, payload)
        assert len(records[:, 0].unique()) == (254 if payload == "float8_e4m3" else 255)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code(dtype):
    """Also those that no row is rounded to: 0x80 of int8, and the NaN of float8_e4m3."""
    codes, scale = torch.arange(256).to(torch.uint8), torch.ones(1).view(torch.uint8)
    records = torch.cat([codes, scale])[None]
    for payload, kind in (("int8", torch.int8), ("float8_e4m3", torch.float8_e4m3fn)):
        expected = codes.view(kind).to(dtype)[None]
        torch.testing.assert_close(decode(records, 256, dtype, payload), expected, rtol=0, atol=0, equal_nan=True)


def test_error():
    """Of Gaussian rows, relative: 3.7 standard deviations over 127 steps, or 8 steps an octave; bytes of a row."""
    x = torch.randn(64, 2048)
    error = {p: ((decode(encode(x, p), 2048, x.dtype, p) - x).norm() / x.norm()).item() for p in PAYLOADS}
    assert error["int8"] < 0.01 and error["float8_e4m3"] < 0.03
    sizes = [record_bytes(*kind, torch.float32, width, 8) for *kind, width in ((torch.bfloat16, 2048), (WORD, 513))]
    assert rounded_width(2048) == 513 and sizes[1] < 0.52 * sizes[0]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_ends_of_float32(payload):
    """Where a scale is not normal, and where the largest value times its scale rounds up: no sign turns, no inf."""
    tiny = torch.arange(1, 4000, dtype=torch.int32).view(torch.float32)[:, None] * torch.tensor([1, -1])
    most = torch.finfo(torch.float32).max
    for x in (tiny, torch.tensor([[3.4e38, -most], [most, 1.0]])):
        got = decode(encode(x, payload), 2, x.dtype, payload)
        assert torch.equal(got, rounded_ref(x, payload).clamp(-most, most))
        assert ((got == 0) | (got.sign() == x.sign())).all() and got.isfinite().all()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_same_bits_for_every_number_of_threads(payload):
    before, x = torch.get_num_threads(), torch.randn(3001, 200)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((encode(x, payload), decode(encode(x, payload), 200, x.dtype, payload)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


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
