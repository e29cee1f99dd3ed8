"""Blocks of ggml (GGUF files): uint8 [..., rows, bytes], a row of whole blocks of 32 or 256 columns."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moert.quant.format import PackedTensor, RowFormat
from moert.quant.int4 import Int4
from moert.quant.int8 import Int8
from moert.quant.mxfp4 import Mxfp4
from moert.quant.readers.bits import octets, pack_nibbles, pack_quarters, rows_of_bytes
from moert.quant.readers.layout import Layout, Parts, Read, cat_rows, finite, part
from moert.quant.ternary import Ternary2

# What holds the same numbers, and the bytes of a block.  TQ1_0 and TQ2_0 have a scale for 256 columns: ours, twice.
EXACT = {
    "Q8_0": (Int8(32), 34),
    "Q4_0": (Int4(32), 18),
    "MXFP4": (Mxfp4(), 17),
    "TQ1_0": (Ternary2(128), 54),
    "TQ2_0": (Ternary2(128), 66),
}


@dataclass(frozen=True)
class Ggml(Layout):
    """A tensor of one of ggml's types, by its name in the gguf package (needed for all but the exact ones)."""

    type: str

    names = ("blocks",)

    @property
    def format(self) -> RowFormat | None:
        return EXACT[self.type][0] if self.type in EXACT else None

    @property
    def obstacle(self) -> str:
        return f"no format has the numbers of {self.type}"

    def carry(self, parts: Parts) -> Read:
        fmt, size = EXACT[self.type]
        stored = _rows(parts, size, self.type)
        blocks = stored.unflatten(-1, (-1, size))
        codes, scales = READERS[self.type](blocks)
        columns = blocks.shape[-2] * (256 if self.type.startswith("TQ") else 32)
        return Read(PackedTensor(fmt, columns, codes, scales))

    def unpack(self, parts: Parts) -> Tensor:
        if self.format is not None:
            packed = self.carry(parts).packed
            return packed.format.unpack(packed)
        quants = gguf().quants
        kind = _type(self.type)
        _, size = quants.GGML_QUANT_SIZES[kind]
        stored = _rows(parts, size, self.type)
        try:
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is an error below
                w = torch.from_numpy(quants.dequantize(stored.numpy(), kind)).float()
        except NotImplementedError:
            raise ValueError(f"type must be one that the gguf package dequantizes, got {self.type}") from None
        return finite(w, "blocks")


@dataclass(frozen=True)
class GgmlExperts(Layout):
    """A weight of all experts as a GGUF file has it, gate and up or down, each beside the number of its type."""

    names = ("gate", "gate_type", "up", "up_type", "down", "down_type")
    of_experts = True
    in_halves = True
    format = None
    obstacle = "gate and up are of different types"

    @classmethod
    def of_config(cls, config: dict) -> "GgmlExperts":
        return cls()

    def read(self, parts: Parts, convert: RowFormat) -> Read:
        reads = [layout.read(blocks, convert) for layout, blocks in self._each(parts)]
        if len({read.packed.format for read in reads}) > 1:
            return super().read(parts, convert)
        changed = dict.fromkeys(read.changed for read in reads if read.changed)
        return Read(cat_rows([read.packed for read in reads]), "; ".join(changed))

    def carry(self, parts: Parts) -> Read:
        return Read(cat_rows([layout.carry(blocks).packed for layout, blocks in self._each(parts)]))

    def unpack(self, parts: Parts) -> Tensor:
        return torch.cat([layout.unpack(blocks) for layout, blocks in self._each(parts)], -2)

    def _each(self, parts: Parts) -> list[tuple[Ggml, Parts]]:
        given = [name for name in ("gate", "up", "down") if name in parts]
        if given not in (["gate", "up"], ["down"]):
            raise ValueError(f"parts must hold gate and up, or down, got {', '.join(parts)}")
        types = [
            gguf().GGMLQuantizationType(int(part(parts, f"{name}_type", (torch.int64,), ()))).name for name in given
        ]
        return [(Ggml(kind), {"blocks": parts[name]}) for kind, name in zip(types, given, strict=True)]


def gguf():
    """The gguf package."""
    try:
        import gguf
    except ImportError:
        raise ImportError("gguf must be installed for this file: pip install 'moert[gguf]'") from None
    return gguf


def _type(name: str):
    types = gguf().GGMLQuantizationType
    if name not in types.__members__:
        raise ValueError(f"type must be one of ggml's, got {name}")
    return types[name]


def _rows(parts: Parts, size: int, kind: str) -> Tensor:
    """The blocks, a row of whole ones of so many bytes."""
    if "blocks" not in parts:
        raise ValueError(f"parts must hold blocks, got {', '.join(parts)}")
    stored = parts["blocks"]
    if stored.dtype != torch.uint8 or stored.dim() < 2 or stored.shape[-1] % size:
        got = f"{stored.dtype} {list(stored.shape)}"
        raise ValueError(f"blocks must be uint8 [..., rows, multiple of {size}] for {kind}, got {got}")
    if 0 in stored.shape:
        raise ValueError(f"blocks must have sizes of at least 1, got {list(stored.shape)}")
    return stored.contiguous()


def _halves(blocks: Tensor) -> Tensor:
    """Bytes whose low bits are columns 0 to 15 and whose high bits are 16 to 31 -> our bytes of a row."""
    return pack_nibbles(torch.cat([blocks & 15, blocks >> 4], -1).flatten(-2))


def _scale(pair: Tensor) -> Tensor:
    """A float16 a block."""
    return octets(pair).view(torch.float16).squeeze(-1)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return rows_of_bytes(blocks[..., 2:].flatten(-2)), _scale(blocks[..., :2])


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return _halves(blocks[..., 2:]), _scale(blocks[..., :2])


def _mxfp4(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return _halves(blocks[..., 1:]), blocks[..., 0].contiguous()


def _tq1_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Five digits a byte of 32, then of 16; four a byte of 4.  Digit p of byte b: 3 (b 3^p mod 256) / 256."""
    fives, rest = torch.tensor([1, 3, 9, 27, 81]), torch.tensor([1, 3, 9, 27])
    runs = [(blocks[..., :32], fives), (blocks[..., 32:48], fives), (blocks[..., 48:52], rest)]
    digits = [((run[..., None, :].int() * powers[:, None] & 255) * 3 >> 8).flatten(-2) for run, powers in runs]
    return _ternary(torch.cat(digits, -1), blocks[..., 52:])


def _tq2_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Byte j of each 32 has columns j, 32 + j, 64 + j and 96 + j of 128."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    codes = blocks[..., :64].unflatten(-1, (2, 1, 32)) >> shifts[:, None] & 3
    return _ternary(codes.flatten(-3), blocks[..., 64:])


def _ternary(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if (codes > 2).any():
        raise ValueError(f"blocks must have codes 0, 1 and 2, got {int(codes.max())}")
    return pack_quarters(codes.to(torch.uint8).flatten(-2)), _scale(scale).repeat_interleave(2, -1)


READERS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "MXFP4": _mxfp4, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0}
