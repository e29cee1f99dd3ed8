"""What holds for every format: the kernels give the reference's bits, sizes are exact, the ways back lose nothing."""

from math import prod

import numpy as np
import torch

from moert import _C

SHAPES = [(2, 48, 256), (3, 5, 100), (2, 0, 64), (0, 3, 64), (2, 3, 0), (2, 1, 1), (7, 161), (1, 2, 2880)]


def weights(*shape):
    """Rows of many magnitudes, with groups of zeros, tiny ones, ties and one-sided ones."""
    w = torch.randn(shape) * torch.randn(*shape[:-1], 1).mul(4).exp()
    rows = w.view(-1, shape[-1]) if w.numel() else w.new_zeros(0, 1)
    if len(rows) > 4:
        rows[0] = 0
        rows[1] *= 1e-7
        rows[2, : shape[-1] // 2] = 0
        rows[3] = rows[3].sign()
        rows[4] = rows[4].abs()
    return w


def matrix(x):
    return x.reshape(prod(x.shape[:-1]), x.shape[-1]).numpy()


def bits(x):
    """Arrays compare by bits: -0 is not 0 here."""
    return x.view(f"u{x.dtype.itemsize}")


def check_against_reference(fmt, pack_ref, unpack_ref):
    for shape in SHAPES:
        w = weights(*shape)
        packed = fmt.pack(w)
        assert packed.shape == w.shape and packed.nbytes == fmt.nbytes(shape)
        parts = [packed.codes, packed.scales] + ([packed.zeros] if packed.zeros is not None else [])
        expected = [part for part in pack_ref(matrix(w), fmt.group) if part is not None]
        assert len(parts) == len(expected)
        for part, ref in zip(parts, expected, strict=True):
            part = matrix(part)
            assert part.shape == ref.shape and part.dtype == ref.dtype
            np.testing.assert_array_equal(bits(part), bits(ref))
        zeros = expected[2] if len(expected) == 3 else None
        back = matrix(fmt.unpack(packed))
        np.testing.assert_array_equal(bits(back), bits(unpack_ref(*expected[:2], zeros, shape[-1], fmt.group)))


def check_codes_round_trip(code, valid, codes_per_byte):
    """Every length of row up to three blocks: unpack(pack(codes)) == codes, and the packed size."""
    for columns in (0, 1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 80, 81, 160, 161, 239):
        codes = np.random.default_rng(columns).choice(np.array(valid, np.uint8), (3, columns))
        packed = _C.pack_codes(code, codes)
        assert packed.shape == (3, 16 * -(-columns // (16 * codes_per_byte)))
        np.testing.assert_array_equal(_C.unpack_codes(code, packed, columns), codes)
        np.testing.assert_array_equal(packed, _C.pack_codes(code, codes, threads=2))


def check_inputs(fmt):
    """bfloat16 and float16 are widened exactly; strides do not matter; packing what was unpacked changes no weight."""
    w = torch.randn(3, 6, 256)
    for dtype in (torch.bfloat16, torch.float16):
        a, b = fmt.pack(w.to(dtype)), fmt.pack(w.to(dtype).float())
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
    turned = w.transpose(0, 1)
    assert torch.equal(fmt.unpack(fmt.pack(turned)), fmt.unpack(fmt.pack(w)).transpose(0, 1))


def groups_of(x, group):
    """[rows * groups, group] of a matrix whose columns the group divides."""
    return x.reshape(-1, group or x.shape[-1])
