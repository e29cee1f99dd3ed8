import numpy as np
import pytest
import torch

from moert import _C
from moert.quant import Fp8, PackedTensor
from moert.quant.format import flat
from moert.quant.fp8 import pack_ref, unpack_ref

SHAPES = [(2, 256, 384), (130, 129), (1, 1), (3, 128, 16), (2, 0, 64), (0, 3, 64), (2, 3, 0), (5, 300)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gives_the_reference_s_bits(shape):
    w = torch.randn(shape) * torch.randn(*shape[:-1], 1).mul(4).exp()
    packed = Fp8().pack(w)
    assert packed.shape == w.shape and packed.nbytes == Fp8().nbytes(shape)
    parts = (flat(x, 2) for x in (w, packed.codes, packed.scales, Fp8().unpack(packed)))
    for matrix, codes, scales, values in zip(*parts, strict=True):
        expected = pack_ref(matrix)
        assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
        assert torch.equal(values, unpack_ref(*expected, shape[-1]))


def test_every_byte_is_torch_s_float8():
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].reshape(1, 1, 254)
    w = _C.fp8_dequantize(np.pad(codes, ((0, 0), (0, 0), (0, 2))), np.ones((1, 1, 2), np.float32), 254)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    assert torch.equal(torch.from_numpy(w), expected) and np.array_equal(np.signbit(w), codes >= 128)


def test_size_and_error():
    assert Fp8().bits_per_weight((4, 256, 1024)) == 8 + 32 / 128**2
    w = torch.randn(256, 512)
    error = Fp8().unpack(Fp8().pack(w)) - w
    # Three bits of mantissa: half of 2^-3 of a normal number, half of 2^-9 of the scale below.
    step = (w.abs() * 2**-4).clamp(min=float(Fp8().pack(w).scales.max()) * 2**-10)
    assert (error.abs() <= step * (1 + 2**-20)).all()
    assert error.norm() / w.norm() < 0.03


def test_a_block_of_zeros():
    w = torch.zeros(200, 200)
    w[:128, :128] = 1
    packed = Fp8().pack(w)
    assert packed.scales.count_nonzero() == 1 and torch.equal(Fp8().unpack(packed), w)


def test_inputs_of_any_dtype_and_stride():
    w = torch.randn(3, 160, 200)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(Fp8().pack(w.to(dtype)).codes, Fp8().pack(w.to(dtype).float()).codes)
    turned = w.transpose(1, 2)
    assert torch.equal(Fp8().pack(turned).codes, Fp8().pack(turned.contiguous()).codes)


def test_what_is_refused():
    w = torch.randn(2, 4, 32)
    packed = Fp8().pack(w)
    w[1, 2, 7] = float("inf")
    with pytest.raises(RuntimeError, match="w must be finite, got inf or nan in row 6"):
        Fp8().pack(w)
    codes = packed.codes.clone()
    codes[1, 1, 3] = 0x7F
    with pytest.raises(RuntimeError, match="codes must be e4m3 without NaN and 0 after column 32, got others in row 5"):
        Fp8().unpack(PackedTensor(Fp8(), 32, codes, packed.scales))
    with pytest.raises(RuntimeError, match="got others in row 0"):
        _C.fp8_dequantize(np.ones((1, 1, 16), np.uint8), np.ones((1, 1, 1), np.float32), 15)
    with pytest.raises(RuntimeError, match="scales must be finite, got inf or nan at block 0"):
        Fp8().unpack(PackedTensor(Fp8(), 32, packed.codes, packed.scales * float("nan")))
    with pytest.raises(RuntimeError, match=r"scales must be \[2, 1, 1\], got \[1, 1, 1\]"):
        Fp8().unpack(PackedTensor(Fp8(), 32, packed.codes, packed.scales[:1]))
    for columns in (-1, 16, 33):
        with pytest.raises(RuntimeError, match=f"columns must be what rows of 32 bytes hold, got {columns}"):
            _C.fp8_dequantize(packed.codes.numpy(), packed.scales.numpy(), columns)


def test_threads_do_not_change_the_bits():
    w = np.random.default_rng(0).standard_normal((3, 300, 140)).astype(np.float32)
    for a, b in zip(_C.fp8_quantize(w, threads=1), _C.fp8_quantize(w, threads=2), strict=True):
        assert np.array_equal(a, b)
