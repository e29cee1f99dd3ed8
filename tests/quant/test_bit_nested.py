import contract
import numpy as np
import pytest
import torch

from moert import _C
from moert.quant import BitNested, Int4, PackedTensor
from moert.quant.bit_nested import pack_ref, unpack_ref
from moert.quant.format import flat

FORMATS = [
    BitNested(),
    BitNested(5, 4, 128),
    BitNested(3, 1, 32),
    BitNested(1, 8, 64),
    BitNested(1, 1, 128),
    BitNested(2, 4),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", contract.SHAPES, ids=str)
def test_gives_the_reference_s_bits(fmt, shape):
    w = contract.weights(*shape)
    packed = fmt.pack(w)
    assert packed.shape == w.shape and packed.nbytes == fmt.nbytes(shape) and packed.zeros is None
    tails = ((w, 2), (packed.codes, 3), (packed.scales, 2), (fmt.unpack(packed), 2))
    for matrix, *got in zip(*(flat(x, dims).numpy() for x, dims in tails), strict=True):
        codes, scales = pack_ref(matrix, fmt.planes, fmt.group)
        expected = (codes, scales, unpack_ref(codes, scales, shape[-1], fmt.group))
        for part, ref in zip(got, expected, strict=True):
            assert part.shape == ref.shape and part.dtype == ref.dtype
            np.testing.assert_array_equal(contract.bits(part), contract.bits(ref))


@pytest.mark.parametrize("fmt", [BitNested(), BitNested(5, 4), BitNested(1, 8)], ids=str)
def test_any_prefix_of_the_planes_is_a_tensor(fmt):
    """Its weights are the middles of the cells that hold those of the whole tensor."""
    w = torch.randn(3, 20, 300)
    packed = fmt.pack(w)
    last = None
    for levels in range(fmt.levels, 0, -1):
        lower = fmt.lower(packed, levels)
        assert lower.format == BitNested(fmt.base, levels, fmt.group) and lower.nbytes == lower.format.nbytes(w.shape)
        assert lower.codes.data_ptr() == packed.codes.data_ptr()  # a view: nothing is copied
        values = lower.format.unpack(lower)
        if last is not None:
            scale = packed.scales.float().abs().repeat_interleave(fmt.group, -1)[..., :300]
            cell = scale * 2.0 ** (4 - lower.format.planes)
            assert torch.equal((values - last).abs(), cell / 4)
        last = values


@pytest.mark.parametrize("fmt", [BitNested(2, 3, 128), BitNested(5, 4)], ids=str)
def test_four_bits_are_int4_s_grid(fmt):
    """With any number of planes: what int4 would make of the code of the first four."""
    w = torch.randn(20, 256)
    packed = fmt.pack(w)
    value = BitNested(1, 4, fmt.group).unpack(
        PackedTensor(BitNested(1, 4, fmt.group), 256, packed.codes[:4].contiguous(), packed.scales)
    )
    units = value / packed.scales.float().repeat_interleave(fmt.group, -1)
    assert torch.equal(units, units.round()) and units.min() == -8 and units.max() == 7
    within = (value - w).abs() <= 0.5 * packed.scales.float().abs().repeat_interleave(fmt.group, -1)
    assert within.float().mean() > 0.97  # the others are cut off


@pytest.mark.parametrize("fmt, most", [(BitNested(2, 3), [1.2, 1.12, 1]), (BitNested(5, 4), [1.2, 1.2, 1.1, 1])])
def test_error_beside_direct_quantisation(fmt, most):
    """The squared error of a level over that of the same bits without nesting."""
    w = torch.randn(256, 1024)
    packed = fmt.pack(w)
    for level, ratio in enumerate(most, 1):
        lower, direct = fmt.lower(packed, level), BitNested(fmt.base + level - 1, 1, fmt.group)
        nested = (lower.format.unpack(lower) - w).square().mean()
        alone = (direct.unpack(direct.pack(w)) - w).square().mean()
        assert nested / alone <= ratio


def test_error_is_not_above_that_of_int4():
    w = torch.randn(256, 1024)
    for group in (32, 64, 128):
        of_int4, of_nested = (
            (fmt.unpack(fmt.pack(w)) - w).square().mean() for fmt in (Int4(group), BitNested(2, 3, group))
        )
        assert of_nested < of_int4
        assert BitNested(2, 3, group).bits_per_weight(w.shape) == Int4(group).bits_per_weight(w.shape)


def test_size():
    assert float(BitNested().bits_per_weight((4, 8, 1024))) == 4.5
    assert BitNested(5, 4, 128).bits_per_weight((4, 8, 1024)) == 8 + 16 / 128
    shape = (4, 8, 2048)
    separate = sum(BitNested(bits, 1).nbytes(shape) for bits in (2, 3, 4))
    assert BitNested().nbytes(shape) <= 0.43 * separate


def test_equal_weights_and_zeros_are_near_exact():
    w = torch.full((2, 128), -0.37)
    w[1] = 0
    back = BitNested().unpack(BitNested().pack(w))
    assert (back[1] == 0).all()
    torch.testing.assert_close(back[0], w[0], rtol=2**-11, atol=0)


def test_scales_beyond_float16_are_not_taken_where_another_is_not():
    """17 sixteenths of what cuts nothing off are beyond float16 here, 16 are not."""
    w = torch.zeros(1, 32)
    w[0, 0] = -8.5 * 65000
    packed = BitNested().pack(w)
    assert packed.scales.isfinite().all() and packed.scales[0, 0].abs() >= 60000
    codes, scales = pack_ref(w.numpy(), 4, 32)
    assert np.array_equal(packed.codes, codes) and np.array_equal(packed.scales, scales)


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
    with pytest.raises(RuntimeError, match="planes must be 1 to 8, got 9"):
        _C.bit_nested_quantize(np.ones((1, 1, 8), np.float32), 128, 9)


def test_hostile_bytes():
    fmt = BitNested(2, 2, 32)
    packed = fmt.pack(torch.randn(2, 60))

    def broken(codes=packed.codes, scales=packed.scales, columns=60):
        return fmt.unpack(PackedTensor(fmt, columns, codes, scales))

    codes = packed.codes.clone()
    codes[2, 1, 7] = 0x10  # column 60
    with pytest.raises(RuntimeError, match="codes must be 0 after column 60, got others in row 1"):
        broken(codes=codes)
    with pytest.raises(RuntimeError, match="scales must be finite, got inf or nan at index 0"):
        broken(scales=packed.scales * float("inf"))
    with pytest.raises(RuntimeError, match=r"scales must be \[1, 2, 2\], got \[1, 2, 1\]"):
        broken(scales=packed.scales[..., :1])
    with pytest.raises(ValueError, match="codes must have 3 planes for BitNested.*, got 2"):
        broken(codes=packed.codes[:2])
    with pytest.raises(RuntimeError, match="columns must be what rows of 16 bytes hold, got 129"):
        broken(columns=129)


def test_threads_do_not_change_the_bits():
    w = np.random.default_rng(0).standard_normal((3, 30, 140)).astype(np.float32)
    one, two = (_C.bit_nested_quantize(w, 64, 4, threads=n) for n in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
