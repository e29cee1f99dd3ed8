"""The text that `moert run` learns: the source of Python's standard library, in bytes, split by file.

The bigram model fitted on the same text is what the language model has to beat.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moert.cli.errors import CommandError

# Not text of the library: its tests, installed packages, character tables and one generated page of help.
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """train and heldout are bytes [n] uint8, files the number of files of each; no file is in both."""

    train: Tensor
    heldout: Tensor
    files: tuple[int, int]


def load_corpus(root: Path | None = None) -> Corpus:
    """Every twentieth file, by the hash of its path, is held out: the split is the same on every machine."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(root.rglob("*.py")) if not SKIP & set(p.relative_to(root).parts)]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in paths:
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        parts[int.from_bytes(digest, "big") % 20 == 0].append(path.read_bytes())
    train, heldout = (b"\0".join(p) for p in parts)
    if min(len(train), len(heldout)) < 10_000:
        raise CommandError(f"the source of the standard library must be in {root}, got {len(paths)} files")
    return Corpus(_bytes(train), _bytes(heldout), (len(parts[0]), len(parts[1])))


def evenly_spaced(data: Tensor, length: int, count: int) -> Tensor:
    """Windows [count, length] int64 that start at equal distances."""
    starts = torch.linspace(0, len(data) - length, count, dtype=torch.float64).long()
    return data[starts[:, None] + torch.arange(length)].long()


def bigram_loss(train: Tensor, windows: Tensor) -> float:
    """Nats per byte, all but the first of each window, of the add-one smoothed bigram model fitted on train."""
    pairs = train[:-1].long() * 256 + train[1:].long()
    counts = torch.bincount(pairs, minlength=65536).view(256, 256).double() + 1
    log_p = (counts / counts.sum(1, keepdim=True)).log()
    return -log_p[windows[:, :-1], windows[:, 1:]].mean().item()


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
