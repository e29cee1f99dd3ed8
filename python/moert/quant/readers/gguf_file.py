"""GGUF files: their metadata and tensors, every length checked against the file before it is believed.

The gguf package's own reader follows the lengths of a broken file past its end, into loops that do not end.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from moert.quant.format import RowFormat
from moert.quant.int8 import Int8
from moert.quant.quantize import format_of
from moert.quant.readers.ggml import Ggml, gguf
from moert.quant.readers.layout import Read

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_exps\.weight")


@dataclass(frozen=True)
class GgufTensor:
    """shape as torch says it, [..., rows, columns]; start in bytes from the beginning of the file."""

    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GgufFile:
    """metadata: what the file says of itself; tensors by name; read(name) and blocks(name) give one of them."""

    def __init__(self, path: str | PathLike):
        self.path = path
        try:
            self._octets = np.memmap(path, mode="c")  # changes, which nobody makes, would stay in memory
        except ValueError:
            raise ValueError(f"{path} must be a GGUF file, got an empty one") from None
        self._at = 0
        if bytes(self._take(4)) != b"GGUF":
            raise ValueError(f"{path} must be a GGUF file, got another beginning")
        if (version := self._number("I")) not in (2, 3):
            raise ValueError(f"{path} must be GGUF of version 2 or 3, got {version}")
        num_tensors, num_values = self._count(24), self._count(13)
        self.metadata = dict(self._entry() for _ in range(num_values))
        if len(self.metadata) < num_values:
            raise ValueError(f"{path} must name every value once, got {len(self.metadata)} names of {num_values}")
        infos = [self._info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment must be a power of two, got {alignment}")
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: self._tensor(name, start, *info) for name, *info in infos}
        if len(self.tensors) < num_tensors:
            raise ValueError(f"{path} must name every tensor once, got {len(self.tensors)} names of {num_tensors}")

    def blocks(self, name: str) -> Tensor:
        """uint8 [..., rows, bytes], mapped from the file."""
        tensor = self._named(name)
        octets = torch.from_numpy(self._octets[tensor.start : tensor.start + tensor.nbytes])
        return octets.view(*tensor.shape[:-1], -1)

    def layout(self, name: str) -> Ggml:
        return Ggml(self._named(name).type)

    def read(self, name: str, convert: RowFormat) -> Read:
        """The tensor packed, as a Layout reads it."""
        return self.layout(name).read({"blocks": self.blocks(name)}, convert)

    def unpack(self, name: str) -> Tensor:
        """The tensor in float32."""
        return self.layout(name).unpack({"blocks": self._matrix(name)}).view(self.tensors[name].shape)

    def _matrix(self, name: str) -> Tensor:
        blocks = self.blocks(name)
        return blocks[None] if blocks.dim() == 1 else blocks

    def _named(self, name: str) -> GgufTensor:
        if name not in self.tensors:
            raise ValueError(f"name must be a tensor of {self.path}, got {name}")
        return self.tensors[name]

    def _take(self, length: int) -> np.ndarray:
        if length > (left := len(self._octets) - self._at):
            raise ValueError(f"{self.path} must go on for {length} bytes from byte {self._at}, got {left}")
        self._at += length
        return self._octets[self._at - length : self._at]

    def _number(self, kind: str):
        return struct.unpack("<" + kind, self._take(struct.calcsize("<" + kind)))[0]

    def _count(self, least: int) -> int:
        """A number of things of at least so many bytes each."""
        count = self._number("Q")
        if count * least > (left := len(self._octets) - self._at):
            raise ValueError(f"{self.path} must hold the {count} entries that it says, got {left} bytes")
        return count

    def _string(self) -> str:
        octets = bytes(self._take(self._number("Q")))
        try:
            return octets.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} must have names and texts in UTF-8, got {octets[:20]}") from None

    def _entry(self) -> tuple:
        return self._string(), self._value(self._number("I"))

    def _value(self, kind: int, depth: int = 0):
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY or depth > 3:
            raise ValueError(f"{self.path} must have metadata of known types, got type {kind}, {depth} deep")
        each = self._number("I")
        if each in SCALARS:
            size = struct.calcsize("<" + SCALARS[each])
            octets = self._take(self._count(size) * size)
            return list(struct.unpack(f"<{len(octets) // size}{SCALARS[each]}", octets))
        return [self._value(each, depth + 1) for _ in range(self._count(8))]

    def _info(self) -> tuple:
        name, dims = self._string(), self._number("I")
        if not 1 <= dims <= 4:
            raise ValueError(f"{name} must have 1 to 4 dimensions, got {dims}")
        sizes = [self._number("Q") for _ in range(dims)]
        # With a size of 0 the others cost the file nothing: rows without columns would be gone through, to no end.
        if min(sizes) < 1 or prod(sizes) >= 2**63:
            raise ValueError(f"{name} must have sizes from 1 on and fewer than 2^63 numbers, got sizes {sizes}")
        return name, tuple(reversed(sizes)), self._number("I"), self._number("Q")

    def _tensor(self, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        package = gguf()
        if kind not in package.GGMLQuantizationType._value2member_map_:
            raise ValueError(f"{name} must be in one of ggml's types, got type {kind}")
        kind = package.GGMLQuantizationType(kind)
        columns, size = package.GGML_QUANT_SIZES[kind]
        nbytes, end = prod(shape) // columns * size, len(self._octets)
        if shape[-1] % columns or start + offset + nbytes > end:
            got = f"{list(shape)} at byte {start + offset} of {end}"
            raise ValueError(
                f"{name} must be whole blocks of {kind.name} ({columns} columns) within the file, got {got}"
            )
        return GgufTensor(kind.name, shape, start + offset, nbytes)


def gguf_experts(path: str | PathLike, convert: str | RowFormat = Int8(128)) -> Iterator[tuple[str, Read]]:
    """The experts' tensors [E, rows, columns] of a GGUF file, packed one after the other, with their names."""
    fmt, file = format_of(convert), GgufFile(path)
    names = [name for name in file.tensors if EXPERTS.fullmatch(name)]
    if not names:
        raise ValueError(f"{path} must hold tensors blk.*.ffn_*_exps.weight, got none")
    for name in names:
        yield name, file.read(name, fmt)
