"""Wrong arguments, hostile bytes, and what all formats share."""

import numpy as np
import pytest
import torch

from moert import _C
from moert.quant import BitNested, Fp8, Int4, Int4Asymmetric, Int8, Mxfp4, PackedTensor, Ternary2, Ternary5

FORMATS = [Int8(), Int8(32), Int4(), Int4Asymmetric(), Mxfp4(), Ternary2(), Ternary5()]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_weights_that_are_not_finite_are_refused(fmt):
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = torch.randn(4, 64)
        w[2, 40] = bad
        with pytest.raises(RuntimeError, match="w must be finite, got inf or nan in row 2"):
            fmt.pack(w)


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not isinstance(f, Mxfp4)], ids=str)
def test_weights_whose_scale_is_no_float16_are_refused(fmt):
    with pytest.raises(RuntimeError, match="w must have scales within float16, got magnitudes up to 1e[+]08 in row 1"):
        fmt.pack(torch.stack([torch.ones(64), torch.full((64,), 1e8)]))


def test_python_s_errors():
    with pytest.raises(TypeError, match="w must be float32, bfloat16 or float16, got torch.float64"):
        Int8().pack(torch.zeros(2, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="w must have at least 2 dimensions, got 1"):
        Int8().pack(torch.zeros(32))
    with pytest.raises(ValueError, match="w must be on the CPU, got meta"):
        Int8().pack(torch.zeros(2, 32, device="meta"))
    with pytest.raises(ValueError, match=r"packed must be in format Int4\(group=64\), got Int4\(group=32\)"):
        Int4(64).unpack(Int4(32).pack(torch.zeros(2, 64)))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_scales_that_are_not_finite_are_refused(fmt):
    packed = fmt.pack(torch.randn(3, 64))
    for bad in (255,) if fmt.name == "mxfp4" else (float("nan"), float("inf"), -float("inf")):
        scales = packed.scales.clone()
        scales[1, -1] = bad
        with pytest.raises(RuntimeError, match="scales must be finite, got inf or nan at row 1, group"):
            fmt.unpack(PackedTensor(fmt, 64, packed.codes, scales, packed.zeros))


def test_codes_out_of_range_are_refused():
    for name, limit in (("int4", 16), ("mxfp4", 16), ("ternary2", 3), ("ternary5", 3)):
        codes = np.zeros((2, 40), np.uint8)
        codes[1, 7] = limit
        with pytest.raises(RuntimeError, match=f"codes must be {name} codes.*, got {limit} at row 1, byte 7"):
            _C.pack_codes(name, codes)
    packed = np.full((1, 16), 0b00000011, np.uint8)
    with pytest.raises(RuntimeError, match="packed must be ternary2 codes .*, got 3 at row 0, byte 0"):
        _C.unpack_codes("ternary2", packed, 64)
    with pytest.raises(RuntimeError, match="zeros must be at most 15, got 16 at row 0, group 1"):
        zeros, scales = np.array([[3, 16]], np.uint8), np.ones((1, 2), np.float16)
        _C.dequantize("int4_asymmetric", np.zeros((1, 32), np.uint8), scales, zeros, 64, 32)


@pytest.mark.parametrize("name, per_byte", [("int8", 1), ("int4", 2), ("ternary2", 4), ("ternary5", 5)])
def test_bits_after_the_last_column_are_refused(name, per_byte):
    packed = _C.pack_codes(name, np.zeros((2, 3 * per_byte), np.uint8))
    packed[1, 3] = 1
    with pytest.raises(RuntimeError, match=f"packed must be {name} codes and 0 after .*, got 1 at row 1, byte 3"):
        _C.unpack_codes(name, packed, 3 * per_byte)


@pytest.mark.parametrize("fmt", [Int4(), Ternary2(), Ternary5()], ids=str)
def test_the_check_of_values_refuses_the_bytes_that_unpacking_does(fmt):
    for columns in range(1, fmt.codes_per_byte + 1):
        for byte in range(256):
            codes = np.zeros((1, 16), np.uint8)
            codes[0, 0] = byte
            try:
                _C.unpack_codes(fmt.name, codes, columns)
            except RuntimeError:
                with pytest.raises(ValueError, match="codes must be (those of|0 after column)"):
                    fmt.check_codes(torch.from_numpy(codes), columns)
            else:
                fmt.check_codes(torch.from_numpy(codes), columns)


@pytest.mark.parametrize("fmt", [*FORMATS, Fp8(), BitNested()], ids=str)
def test_the_check_of_values_sees_every_byte(fmt):
    w = torch.randn(3, 40, 1001)
    packed = fmt.pack(w)
    fmt.check_values(packed)
    packed.codes.view(-1)[-1] = 1  # of the last row, after its columns
    with pytest.raises(ValueError, match="codes must be 0 after column 1001 for"):
        fmt.check_values(packed)
    if (bad := {"ternary2": 0xC0, "ternary5": 20, "fp8": 0xFF}.get(fmt.name)) is not None:
        packed = fmt.pack(w)
        packed.codes[2, 39, 5] = bad  # beyond the first piece that is looked at
        with pytest.raises(ValueError, match=f"codes must be those of .*, got byte {bad}"):
            fmt.check_values(packed)


@pytest.mark.parametrize("columns", [-1, 32, 65, 2**62])
def test_columns_must_fit_the_bytes(columns):
    with pytest.raises(RuntimeError, match=f"columns must be what rows of 32 bytes hold, got {columns}"):
        _C.unpack_codes("int4", np.zeros((2, 32), np.uint8), columns)


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(RuntimeError, match="columns must be what rows of 17 bytes hold, got 32"):
        _C.unpack_codes("int4", np.zeros((2, 17), np.uint8), 32)


def test_arrays_are_never_converted():
    w = np.zeros((4, 64), np.float32)
    for wrong, text in [
        (w.astype(np.float64), "w must be float32, got float64"),
        (w.astype(">f4"), "w must be float32, got >f4"),
        (w[0], "w must have 2 dimensions, got 1"),
        (w.T, "w must be C-contiguous and aligned"),
        (np.zeros(4 * 64 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(4, 64), "w must be C-contiguous and aligned"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            _C.quantize("int8", wrong, 32)
    with pytest.raises(TypeError):
        _C.quantize("int8", w.tolist(), 32)
    with pytest.raises(RuntimeError, match="group must be 32, 64, 128 or 0 .* for int8, got 7"):
        _C.quantize("int8", w, 7)
    with pytest.raises(RuntimeError, match="format must be int8, .* or ternary5, got int3"):
        _C.quantize("int3", w, 32)
    with pytest.raises(RuntimeError, match="threads must be 1 to 1024, got 0"):
        _C.quantize("int8", w, 32, threads=0)


def test_scales_and_zeros_must_have_their_shape():
    codes, scales, zeros = _C.quantize("int4_asymmetric", np.ones((4, 64), np.float32), 32)
    with pytest.raises(RuntimeError, match=r"scales must be \[4, 2\], got \[4, 1\]"):
        _C.dequantize("int4_asymmetric", codes, scales[:, :1].copy(), zeros, 64, 32)
    with pytest.raises(RuntimeError, match=r"zeros must be \[4, 2\], got \[3, 2\]"):
        _C.dequantize("int4_asymmetric", codes, scales, zeros[:3], 64, 32)
    with pytest.raises(RuntimeError, match="zeros must be an array for int4_asymmetric, got None"):
        _C.dequantize("int4_asymmetric", codes, scales, None, 64, 32)
    with pytest.raises(RuntimeError, match="zeros must be None for int4, got an array"):
        _C.dequantize("int4", codes, scales, zeros, 64, 32)
    with pytest.raises(RuntimeError, match="scales must be float16, got float32"):
        _C.dequantize("int4", codes, scales.astype(np.float32), None, 64, 32)


def test_random_bytes_decode_or_are_refused():
    random = np.random.default_rng(0)
    for _ in range(300):
        name = random.choice(["int8", "int4", "int4_asymmetric", "mxfp4", "ternary2", "ternary5"])
        codes = random.integers(0, 256, (2, 16 * random.integers(0, 4)), np.uint8)
        scales = random.integers(0, 256, (2, random.integers(0, 4) * (1 if name == "mxfp4" else 2)), np.uint8)
        scales = scales if name == "mxfp4" else scales.view(np.float16)
        zeros = random.integers(0, 17, scales.shape, np.uint8) if name == "int4_asymmetric" else None
        try:
            w = _C.dequantize(name, codes, scales, zeros, int(random.integers(0, 200)), 32)
        except RuntimeError as error:
            assert " must be " in str(error)
        else:
            assert w.shape[0] == 2 and not np.isnan(w).any()


def test_threads_do_not_change_the_bits():
    w = np.random.default_rng(0).standard_normal((37, 200)).astype(np.float32)
    for name in ("int4", "mxfp4", "ternary5"):
        one, two = (_C.quantize(name, w, 32, threads=n) for n in (1, 2))
        assert all(np.array_equal(a, b) for a, b in zip(one[:2], two[:2], strict=True))
        args = (name, *one, 200, 32)
        assert np.array_equal(_C.dequantize(*args, threads=1), _C.dequantize(*args, threads=2))


def test_gradients_and_views_do_not_get_in():
    w = torch.randn(2, 4, 64, requires_grad=True)
    packed = Int8().pack(w)
    assert not Int8().unpack(packed).requires_grad
    assert packed.codes.shape == (2, 4, 64) and packed.scales.shape == (2, 4, 1) and packed.zeros is None
