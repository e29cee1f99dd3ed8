"""Nibbles and quarters against plain Python."""

import torch

from moert.quant.readers.bits import nibbles, pack_nibbles, pack_quarters, rows_of_bytes


def test_nibbles():
    words = torch.tensor([[0x76543210, -0x789ABCDF - 1 + 0]], dtype=torch.int32)
    expected = [int(word) >> (4 * i) & 15 for word in words[0] for i in range(8)]
    assert nibbles(words).tolist() == [expected]


def test_packing():
    codes = torch.randint(0, 16, (3, 35), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (3, 32) and torch.equal(nibbles(packed)[:, :35], codes) and not nibbles(packed)[:, 35:].any()
    quarters = pack_quarters(codes & 3)
    back = torch.stack([quarters >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    assert quarters.shape == (3, 16) and torch.equal(back[:, :35], codes & 3) and not back[:, 35:].any()
    assert rows_of_bytes(codes).shape == (3, 48)
