"""safetensors files as bytes: what their headers tell, tensors read one at a time, files written from pieces.

Plain reads, not maps: a file that shrinks meanwhile is an error here, and memory is what is asked for.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from moert.cli.checkpoint import INDEX, read_json, weight_files
from moert.cli.errors import CommandError

PIECE = 1 << 22
SAMPLE = 1 << 12  # bytes of a tensor that a fingerprint reads at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor as a header tells of it; dtype is the file format's name."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Stored":
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)


class TensorFiles:
    """The files of a checkpoint as one set of tensors, which check_files has found sound."""

    def __init__(self, directory: Path):
        self._files = [directory / file for file in weight_files(directory)]
        self.stored: dict[str, Stored] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path in self._files:
            for name, (stored, start) in header(path).items():
                if name in self.stored:
                    raise CommandError(f"{name} must be in one file, got {self._places[name][0].name} and {path.name}")
                self.stored[name], self._places[name] = stored, (path, start)
        if (directory / INDEX).exists():
            for name, file in read_json(directory / INDEX)["weight_map"].items():
                if name not in self._places or self._places[name][0].name != file:
                    raise CommandError(f"{file} must hold {name} as its index says, got none")

    def nbytes(self, names: Iterable[str]) -> int:
        return sum(self.stored[name].nbytes for name in names)

    def pieces(self, name: str) -> Iterator[bytes]:
        path, start = self._places[name]
        left = self.stored[name].nbytes
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while left:
                piece = file.read(min(left, PIECE))
                if not piece:
                    raise CommandError(f"{path} must stay as it is while it is read, got {left} bytes less")
                left -= len(piece)
                yield piece

    def read(self, name: str) -> Tensor:
        stored = self.stored[name]
        if stored.dtype not in DTYPES:
            raise CommandError(f"{name} must have a dtype of {', '.join(DTYPES)}, got {stored.dtype}")
        buffer, at = torch.empty(stored.nbytes, dtype=torch.uint8), 0
        for piece in self.pieces(name):
            memoryview(buffer.numpy())[at : at + len(piece)] = piece
            at += len(piece)
        return buffer.view(DTYPES[stored.dtype]).view(stored.shape)

    def first_float(self) -> torch.dtype:
        """The dtype that transformers takes for the model's where the configuration has none."""
        dtypes = (DTYPES.get(stored.dtype, torch.bool) for stored in self.stored.values())
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    def fingerprint(self) -> str:
        """SHA-256 of the names, types and shapes of all tensors and of the first, middle and last bytes of each.

        Whatever the files are called and however the tensors are spread over them.
        """
        digest = hashlib.sha256()
        for name in sorted(self.stored):
            stored, (path, start) = self.stored[name], self._places[name]
            digest.update(json.dumps([name, stored.dtype, stored.shape]).encode())
            with open(path, "rb", buffering=0) as file:
                for at in sorted({0, max(0, stored.nbytes - SAMPLE) // 2, max(0, stored.nbytes - SAMPLE)}):
                    file.seek(start + at)
                    digest.update(file.read(min(SAMPLE, stored.nbytes)))
        return digest.hexdigest()

    def identity(self) -> list[list]:
        """What tells these files from others: path, size and time of change."""
        facts = ((path.resolve(), path.stat()) for path in self._files)
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in facts]


def header(path: Path) -> dict[str, tuple[Stored, int]]:
    """Every tensor of a sound file, and where in it its bytes start."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        described = json.loads(file.read(size))
    described.pop("__metadata__", None)
    found = {}
    for name, tensor in described.items():
        start, end = tensor["data_offsets"]
        found[name] = Stored(tensor["dtype"], tuple(tensor["shape"]), end - start), 8 + size + start
    return found


def write_tensors(path: Path, tensors: dict[str, Stored], pieces: Callable[[str], Iterable[bytes]]) -> str:
    """A safetensors file, whole and on the disk or not there; returns the SHA-256 of its bytes."""
    # Wide items first, as the library does: every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].nbytes // max(1, prod(tensors[name].shape)), name))
    described, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        stored, start = tensors[name], end
        end += stored.nbytes
        described[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        for piece in chain([len(text).to_bytes(8, "little"), text], *(pieces(name) for name in names)):
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
