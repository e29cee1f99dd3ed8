import contract
import numpy as np
import pytest
import torch

from moert import _C
from moert.quant import BitNested, PackedTensor
from moert.quant.bit_nested import pack_ref, unpack_ref
from moert.quant.format import flat

FORMATS = [BitNested(), BitNested(5, 4), BitNested(3, 1, 32), BitNested(1, 8, 64), BitNested(8, 1)]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", contract.SHAPES, ids=str)
def test_gives_the_reference_s_bits(fmt, shape):
    w = contract.weights(*shape)
    packed = fmt.pack(w)
    assert packed.shape == w.shape and packed.nbytes == fmt.nbytes(shape)
    tails = ((w, 2), (packed.codes, 3), (packed.scales, 3), (packed.zeros, 2), (fmt.unpack(packed), 2))
    for matrix, *got in zip(*(flat(x, dims).numpy() for x, dims in tails), strict=True):
        expected = pack_ref(matrix, fmt.base, fmt.levels, fmt.group)
        expected = (*expected, unpack_ref(*expected, shape[-1], fmt.base, fmt.group))
        for part, ref in zip(got, expected, strict=True):
            assert part.shape == ref.shape and part.dtype == ref.dtype
            np.testing.assert_array_equal(contract.bits(part), contract.bits(ref))


@pytest.mark.parametrize("fmt", [BitNested(), BitNested(5, 4)], ids=str)
def test_any_prefix_of_the_planes_is_a_tensor(fmt):
    w = torch.randn(3, 20, 300)
    packed = fmt.pack(w)
    for levels in range(1, fmt.levels + 1):
        lower = fmt.lower(packed, levels)
        alone = BitNested(fmt.base, levels, fmt.group).pack(w)
        assert lower.format == alone.format and lower.nbytes == alone.nbytes
        assert torch.equal(lower.codes, alone.codes) and torch.equal(lower.scales, alone.scales)
        assert torch.equal(lower.format.unpack(lower), alone.format.unpack(alone))
        assert lower.codes.data_ptr() == packed.codes.data_ptr()  # a view: nothing is copied


@pytest.mark.parametrize("fmt, most", [(BitNested(2, 3), [1, 1.4, 1.6]), (BitNested(5, 4), [1, 1.1, 1.3, 1.9])])
def test_error_beside_direct_quantisation(fmt, most):
    """Sheet d2moe: the squared error of a level over that of the same bits without nesting."""
    w = torch.randn(256, 1024)
    packed = fmt.pack(w)
    for level, ratio in enumerate(most, 1):
        lower, direct = fmt.lower(packed, level), BitNested(fmt.base + level - 1, 1)
        nested = (lower.format.unpack(lower) - w).square().mean()
        alone = (direct.unpack(direct.pack(w)) - w).square().mean()
        assert nested / alone <= ratio


def test_size():
    assert float(BitNested().bits_per_weight((4, 8, 1024))) == 4 + (3 * 16 + 8) / 128
    assert BitNested(5, 4).bits_per_weight((4, 8, 1024)) == 8 + (4 * 16 + 8) / 128
    shape = (4, 8, 2048)
    separate = sum(BitNested(bits, 1).nbytes(shape) for bits in (2, 3, 4))
    assert BitNested().nbytes(shape) <= 0.48 * separate


def test_equal_weights_and_zeros_are_near_exact():
    w = torch.full((2, 128), -0.37)
    w[1] = 0
    back = BitNested().unpack(BitNested().pack(w))
    assert (back[1] == 0).all()
    torch.testing.assert_close(back[0], w[0], rtol=2**-18, atol=0)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="group must be one of 32, 64, 128 for bit_nested, got 16"):
        BitNested(group=16)
    with pytest.raises(ValueError, match="base must be 1 to 8, got 0"):
        BitNested(0)
    with pytest.raises(ValueError, match="levels must be 1 to 7 over a base of 2, got 8"):
        BitNested(2, 8)
    packed = BitNested().pack(torch.randn(2, 64))
    with pytest.raises(ValueError, match="levels must be 1 to 3, got 4"):
        BitNested().lower(packed, 4)
    with pytest.raises(ValueError, match="packed must be in format"):
        BitNested(5, 4).unpack(packed)
    with pytest.raises(RuntimeError, match="w must be finite, got inf or nan in row 1"):
        BitNested().pack(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(RuntimeError, match=r"w must have scales within float16, got magnitudes up to 1e\+08 in row 1"):
        BitNested().pack(torch.tensor([[1.0], [1e8]]))
    with pytest.raises(RuntimeError, match="levels must be 1 to 7, got 9"):
        _C.bit_nested_quantize(np.ones((1, 1, 8), np.float32), 128, 2, 9)


def test_hostile_bytes():
    fmt = BitNested(2, 2, 32)
    packed = fmt.pack(torch.randn(2, 60))

    def broken(codes=packed.codes, scales=packed.scales, zeros=packed.zeros, columns=60):
        return fmt.unpack(PackedTensor(fmt, columns, codes, scales, zeros))

    codes = packed.codes.clone()
    codes[2, 1, 7] = 0x10  # column 60
    with pytest.raises(RuntimeError, match="codes must be 0 after column 60, got others in row 1"):
        broken(codes=codes)
    with pytest.raises(RuntimeError, match="zeros must be below 4, got 4 at index 0"):
        broken(zeros=torch.full_like(packed.zeros, 4))
    with pytest.raises(RuntimeError, match="scales must be finite, got inf or nan at index 0"):
        broken(scales=packed.scales * float("inf"))
    with pytest.raises(RuntimeError, match=r"scales must be \[1, 2, 2, 2\], got \[1, 2, 2, 1\]"):
        broken(scales=packed.scales[..., :1])
    with pytest.raises(RuntimeError, match=r"codes must be \[1, 3, 2, 16\], got \[1, 2, 2, 16\]"):
        broken(codes=packed.codes[:2])
    with pytest.raises(RuntimeError, match="columns must be what rows of 16 bytes hold, got 129"):
        broken(columns=129)


def test_threads_do_not_change_the_bits():
    w = np.random.default_rng(0).standard_normal((3, 30, 140)).astype(np.float32)
    one, two = (_C.bit_nested_quantize(w, 64, 2, 3, threads=n) for n in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
