from dataclasses import replace

import numpy as np
import pytest
import torch

from moert import _C
from moert.quant import SubOneBit
from moert.quant.sub1 import dictionary_hash, dictionary_ref, encode_ref

LENGTHS = [9, 65, 233, 577, 1161, 2049, 3305, 4993, 7177, 9921, 13289, 17345, 3843, 1569]  # sheet qmoe, D


@pytest.fixture(scope="module")
def sequences():
    return dictionary_ref()


def digits_of(entry, length):
    return [int(entry[t // 14]) >> (4 + 2 * (t % 14)) & 3 for t in range(2 * length)]


def random_digits(zeros, *shape):
    u = torch.rand(shape)
    return (u > zeros).to(torch.uint8) + (u > (1 + zeros) / 2).to(torch.uint8)


def test_dictionary(sequences):
    assert np.bincount([len(s) for s in sequences], minlength=15)[1:].tolist() == LENGTHS
    known = set(sequences)
    assert len(known) == 65536 and all((s,) in known for s in range(9))
    assert all(s[:-1] in known for s in sequences if len(s) > 1)
    table = _C.sub1_table()
    for code in [*range(3000), *range(3000, 65536, 97)]:
        length = int(table[code, 0]) & 15
        assert length == len(sequences[code]) == int(table[code, 1]) & 15
        digits = digits_of(table[code], length)
        assert digits == [d for s in sequences[code] for d in (s % 3, s // 3)]
    used = 4 + 2 * np.clip(2 * (table[:, :1] & 15).astype(np.int64) - np.array([0, 14]), 0, 14)
    assert (table.astype(np.int64) >> used == 0).all()


def test_the_dictionary_is_the_same_everywhere():
    assert dictionary_hash() == "5b9e34e02d4b8e808f2b769b15816e839d5483751e042cd09d5baf6465d45b14"


@pytest.mark.parametrize("zeros", [0.5, 0.885, 0.99])
@pytest.mark.parametrize("columns", [0, 1, 2, 27, 28, 29, 768, 3071])
def test_digits_round_trip(zeros, columns):
    digits = random_digits(zeros, 2, 5, columns)
    if columns:
        digits[0, 0], digits[0, 1], digits[1, 0] = 0, 2, 1
    minmax = torch.tensor([-1.0, 1.0], dtype=torch.bfloat16).expand(2, 5, 2)
    packed = SubOneBit().encode(digits, minmax)
    assert packed.shape == digits.shape and torch.equal(SubOneBit().decode(packed), digits)


def test_codewords_are_the_reference_s(sequences):
    known = {sequence: code for code, sequence in enumerate(sequences)}
    for columns in (1, 28, 63, 400):
        digits = random_digits(0.885, 3, columns)
        codes, row_ptr = _C.sub1_encode(digits.numpy())
        for row in range(3):
            assert codes[row_ptr[row] : row_ptr[row + 1]].tolist() == encode_ref(digits[row].tolist(), known)


@pytest.mark.parametrize(
    "shape, bits", [((768, 3072), 0.757), ((3072, 768), 0.827), ((2080, 6144), 0.746), ((6144, 2080), 0.768)], ids=str
)
def test_rate(shape, bits):
    packed = SubOneBit().encode(random_digits(0.885, *shape), torch.ones(shape[0], 2, dtype=torch.bfloat16))
    assert abs(packed.bits_per_weight - bits) < 0.003


def test_rounding():
    w = torch.tensor([[-1.0, -0.6, -0.4, 0.0, 0.9, 1.1, 2.0], [0, 0, 0, 0, 0, 0, 0], [0.1, 0.3, 0.4, 0.2, 0, 0, 0.25]])
    packed = SubOneBit().pack(w)
    expected = [[-1, -1, 0, 0, 0, 2, 2], [0] * 7, [0, 0.4, 0.4, 0, 0, 0, 0.4]]
    assert torch.equal(SubOneBit().unpack(packed), torch.tensor(expected).bfloat16().float())
    assert packed.minmax.tolist()[1] == [-1, 1]  # a row of zeros


def test_gaussian_rows_are_mostly_zero():
    packed = SubOneBit().pack(torch.randn(2, 64, 2048).bfloat16())
    zeros = (SubOneBit().decode(packed) == 0).float().mean()
    assert 0.90 < zeros < 0.92 and packed.bits_per_weight < 0.72


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (3, 8)], ids=str)
def test_empty_and_plain_shapes(shape):
    w = torch.randn(shape)
    packed = SubOneBit().pack(w)
    assert packed.shape == w.shape and SubOneBit().unpack(packed).shape == w.shape
    SubOneBit().check_values(packed)


def test_what_is_refused():
    with pytest.raises(ValueError, match="w must be finite, got inf or nan"):
        SubOneBit().pack(torch.tensor([[float("inf")]]))
    with pytest.raises(ValueError, match=r"minmax must be bfloat16 \[3, 2\], got torch.float32 \[3, 2\]"):
        SubOneBit().encode(torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(3, 2))
    with pytest.raises(RuntimeError, match="digits must be 0, 1 or 2, got 3 at index 5"):
        _C.sub1_encode(np.array([[0, 1, 2], [0, 1, 3]], np.uint8))
    packed = SubOneBit().pack(torch.randn(2, 6, 50))
    with pytest.raises(ValueError, match="matrix_base must rise from 0 to"):
        SubOneBit().decode(replace(packed, matrix_base=packed.matrix_base + 1))
    with pytest.raises(ValueError, match="minmax must be finite, got inf or nan"):
        SubOneBit().unpack(replace(packed, minmax=packed.minmax / 0))


def test_hostile_codes():
    codes, row_ptr = _C.sub1_encode(random_digits(0.8, 4, 100).numpy())
    for wrong, text in [
        (row_ptr + 1, "row_ptr must rise from 0 to"),
        (row_ptr[[0, 2, 1, 3, 4]], "row_ptr must rise, got"),
        (row_ptr[[0, 1, 2, 2, 4]], "codes must hold 100 columns a row, got others in row 2"),
        (row_ptr[:0], "row_ptr must have rows . 1 elements, got 0"),
        (row_ptr.astype(np.int64), "row_ptr must be int32, got int64"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            _C.sub1_decode(codes, wrong, 100)
    with pytest.raises(RuntimeError, match="codes must hold 98 columns a row, got others in row 0"):
        _C.sub1_decode(codes, row_ptr, 98)
    with pytest.raises(RuntimeError, match="columns must be 0 to"):
        _C.sub1_decode(codes, row_ptr, 2**40)
    random = np.random.default_rng(0)
    for _ in range(200):
        noise = random.integers(0, 65536, 12).astype(np.uint16)
        with pytest.raises(RuntimeError, match="codes must hold 9 columns a row, got others in row 0"):
            _C.sub1_decode(noise, np.array([0, 12], np.int32), 9)


def test_threads_do_not_change_the_bits():
    digits = random_digits(0.885, 33, 301).numpy()
    one, two = (_C.sub1_encode(digits, threads=n) for n in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert np.array_equal(_C.sub1_decode(*one, 301, threads=2), digits)


def test_parts_and_join():
    w = torch.randn(5, 6, 70)
    whole = SubOneBit().pack(w)
    pieces = [whole.part(0, 2), whole.part(2, 3), whole.part(3, 5)]
    assert torch.equal(SubOneBit().unpack(pieces[1]), SubOneBit().unpack(whole)[2:3])
    again = SubOneBit().join(pieces)
    for part in ("codes", "row_ptr", "matrix_base", "minmax"):
        assert torch.equal(getattr(again, part), getattr(whole, part))
