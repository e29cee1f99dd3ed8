"""AWQ's int4: qweight int32 [columns, rows / 8], qzeros int32 [groups, rows / 8], scales [groups, rows]."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moert.quant.format import PackedTensor, RowFormat
from moert.quant.int4 import Int4Asymmetric
from moert.quant.readers.bits import nibbles, rows_of_bytes
from moert.quant.readers.gptq import group_of
from moert.quant.readers.layout import FLOATS, Layout, Parts, Read, finite, float16, num_groups, our_group, part, spread

# Row r of eight lies at this place of its word, counted in fours of bits from the lowest: rows 0, 2, 4, 6, 1, 3, 5, 7.
PLACE = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


@dataclass(frozen=True)
class Awq(Layout):
    """w = scale * (code - zero), a scale and a zero of `group` columns (-1: the whole row), in version "gemm"."""

    group: int

    names = ("qweight", "qzeros", "scales")

    @classmethod
    def of_config(cls, config: dict) -> "Awq":
        if (bits := config.get("bits", config.get("w_bit"))) != 4:
            raise ValueError(f"bits must be 4 in AWQ checkpoints, got {bits}")
        version = str(config.get("version", config.get("format", "gemm"))).lower()
        if version != "gemm":
            raise ValueError(f"version must be gemm in AWQ checkpoints, got {version}")
        if not config.get("zero_point", True):
            raise ValueError("zero_point must be true in AWQ checkpoints, got false")
        return cls(group_of({"group_size": config.get("group_size", config.get("q_group_size", 128))}))

    @property
    def format(self) -> RowFormat | None:
        group = our_group(self.group)
        return None if group is None else Int4Asymmetric(group)

    @property
    def obstacle(self) -> str:
        return f"groups of {self.group}"

    def carry(self, parts: Parts) -> Read:
        qweight, zeros, scales = self._checked(parts)
        columns, fmt = len(qweight), self.format
        half, changed = float16(scales, "scales")
        scales, zeros = (spread(values, columns, self.group, fmt.group) for values in (half, zeros))
        return Read(PackedTensor(fmt, columns, _packed(qweight), scales, zeros), changed)

    def unpack(self, parts: Parts) -> Tensor:
        qweight, zeros, scales = self._checked(parts)
        codes = _in_order(qweight)
        groups = torch.arange(codes.shape[1]) // (codes.shape[1] if self.group == -1 else self.group)
        return (codes.float() - zeros[:, groups].float()) * finite(scales, "scales")[:, groups].float()

    def _checked(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
        """qweight, zeros uint8 and scales [rows, groups]."""
        qweight = part(parts, "qweight", (torch.int32,), (None, None))
        columns, words = qweight.shape
        groups = num_groups(columns, self.group)
        qzeros = part(parts, "qzeros", (torch.int32,), (groups, words))
        scales = part(parts, "scales", FLOATS, (groups, 8 * words))
        return qweight, _in_order(qzeros), scales.T.contiguous()


def _in_order(words: Tensor) -> Tensor:
    """int32 [columns, rows / 8] -> codes uint8 [rows, columns]."""
    return nibbles(words).unflatten(-1, (-1, 8))[..., PLACE].flatten(-2).T.contiguous()


def _packed(words: Tensor) -> Tensor:
    """The same as bytes of two columns, without going through single codes, which takes several times as long."""
    even, odd = (F.pad(words, (0, 0, 0, len(words) % 2))[first::2].T.contiguous() for first in (0, 1))
    rows = [(even >> 4 * place & 15 | (odd >> 4 * place & 15) << 4).to(torch.uint8) for place in PLACE.tolist()]
    return rows_of_bytes(torch.stack(rows, 1).flatten(0, 1))
