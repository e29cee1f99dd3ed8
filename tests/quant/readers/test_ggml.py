"""Blocks of ggml, quantized and given back by the gguf package."""

import gguf
import numpy as np
import pytest
import torch
from k_quants import K_QUANTS, k_quantize
from readers_contract import CONVERT, check_broken, check_converted, check_exact

from moert.quant import Int4, Int8, Mxfp4, Ternary2
from moert.quant.readers import Ggml

EXACT = [("Q8_0", Int8(32)), ("Q4_0", Int4(32)), ("MXFP4", Mxfp4()), ("TQ1_0", Ternary2(128)), ("TQ2_0", Ternary2(128))]


def blocks(name, shape=(2, 6, 512)):
    """Random weights in a type, and the gguf package's dequantisation."""
    kind = gguf.GGMLQuantizationType[name]
    rng = np.random.default_rng(5)
    w = rng.standard_normal(shape, np.float32)
    octets = k_quantize(w, name) if name in K_QUANTS else gguf.quants.quantize(w, kind)
    return {"blocks": torch.from_numpy(octets)}, torch.from_numpy(gguf.quants.dequantize(octets, kind))


@pytest.mark.parametrize("name,fmt", EXACT, ids=[name for name, _ in EXACT])
def test_exact(name, fmt):
    check_exact(Ggml(name), *blocks(name), fmt)


@pytest.mark.parametrize("name,fmt", EXACT, ids=[name for name, _ in EXACT])
def test_exact_on_any_bytes(name, fmt):
    """But for codes 3 of TQ2_0, which Ternary2 has not: they become 2."""
    ternary = name.startswith("TQ")
    size = blocks(name)[0]["blocks"].shape[-1] // (2 if ternary else 16)
    octets = np.random.default_rng(0).integers(0, 256, (4, 64, size), dtype=np.uint8)
    if name == "TQ2_0":
        octets ^= octets & (octets >> 1 & 0x55)
    scale = slice(-2, None) if ternary else slice(2)
    octets[..., scale] = np.float16(np.arange(256).reshape(4, 64, 1) / 64 - 1.5).view(np.uint8)
    if name == "MXFP4":
        octets[..., 0] = np.arange(256).reshape(4, 64) % 253
    octets = octets.reshape(4, -1)
    theirs = torch.from_numpy(gguf.quants.dequantize(octets, gguf.GGMLQuantizationType[name]))
    check_exact(Ggml(name), {"blocks": torch.from_numpy(octets)}, theirs, fmt)


@pytest.mark.parametrize("name", [*K_QUANTS, "Q5_0", "Q4_1"])
def test_converted(name):
    parts, expected = blocks(name)
    check_converted(Ggml(name), parts, expected, f"no format has the numbers of {name}")
    packed = Ggml(name).read(parts, CONVERT).packed
    assert (CONVERT.unpack(packed) - expected).norm() < 0.012 * expected.norm()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "MXFP4", "TQ1_0", "TQ2_0", *K_QUANTS])
def test_broken(name):
    check_broken(Ggml(name), blocks(name, (2, 512))[0], 40)


@pytest.mark.parametrize("name,bound", [("Q4_K", 0.09), ("Q5_K", 0.045), ("Q6_K", 0.025)])
def test_the_blocks_of_k_quants_are_near_what_was_quantized(name, bound):
    """Of the helper: its layout is the package's, apart from which it was written."""
    w = np.random.default_rng(0).standard_normal((4, 512), np.float32)
    back = gguf.quants.dequantize(k_quantize(w, name), gguf.GGMLQuantizationType[name])
    assert np.linalg.norm(back - w) < bound * np.linalg.norm(w)


def test_errors():
    octets = blocks("Q8_0")[0]["blocks"]
    with pytest.raises(
        ValueError, match=r"blocks must be uint8 .* multiple of 34\] for Q8_0, got torch.uint8 \[2, 6, 543\]"
    ):
        Ggml("Q8_0").read({"blocks": octets[..., :543]}, CONVERT)
    with pytest.raises(ValueError, match=r"blocks must be uint8 .* multiple of 210\] for Q6_K, got"):
        Ggml("Q6_K").read({"blocks": octets[..., :209]}, CONVERT)
    with pytest.raises(ValueError, match="type must be one of ggml's, got Q9_9"):
        Ggml("Q9_9").read({"blocks": octets}, CONVERT)
    with pytest.raises(ValueError, match="type must be one that the gguf package dequantizes, got I8"):
        Ggml("I8").read({"blocks": octets[..., :32]}, CONVERT)
    with pytest.raises(ValueError, match="blocks must have codes 0, 1 and 2, got 3"):
        Ggml("TQ2_0").read({"blocks": torch.full((1, 66), 255, dtype=torch.uint8)}, CONVERT)
    with pytest.raises(ValueError, match="scales must be finite"):
        Ggml("Q4_0").read({"blocks": torch.full((1, 18), 255, dtype=torch.uint8)}, CONVERT)
