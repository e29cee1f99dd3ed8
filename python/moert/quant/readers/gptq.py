"""GPTQ's int4: qweight int32 [columns / 8, rows], qzeros int32 [groups, rows / 8], scales [groups, rows], g_idx."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moert.quant.format import PackedTensor, RowFormat
from moert.quant.int4 import Int4, Int4Asymmetric
from moert.quant.readers.bits import nibbles, octets, rows_of_bytes
from moert.quant.readers.layout import FLOATS, Layout, Parts, Read, finite, float16, num_groups, our_group, part, spread


@dataclass(frozen=True)
class Gptq(Layout):
    """w = scale * (code - zero), a scale and a zero of `group` columns (-1: the whole row).

    zero_offset is 1 in checkpoint_format "gptq", which stores zero - 1, and 0 in "gptq_v2".  act_order: column i is in
    group g_idx[i], in any order; no format of ours is.  symmetric: every zero is 8.
    """

    group: int
    symmetric: bool = True
    act_order: bool = False
    zero_offset: int = 1

    names = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def of_config(cls, config: dict) -> "Gptq":
        if config.get("bits") != 4:
            raise ValueError(f"bits must be 4 in GPTQ checkpoints, got {config.get('bits')}")
        if config.get("dynamic"):
            raise ValueError(
                "dynamic must be empty: one choice of bits and group for all modules, got some of their own"
            )
        kind = config.get("checkpoint_format") or config.get("format") or "gptq"
        if kind not in ("gptq", "gptq_v2"):
            raise ValueError(f"checkpoint_format must be gptq or gptq_v2, got {kind}")
        group, act_order = group_of(config), bool(config.get("desc_act", False))
        return cls(group, bool(config.get("sym", True)), act_order and group != -1, int(kind == "gptq"))

    @property
    def format(self) -> RowFormat | None:
        group = None if self.act_order else our_group(self.group)
        return None if group is None else (Int4 if self.symmetric else Int4Asymmetric)(group)

    @property
    def obstacle(self) -> str:
        return "columns of a group are not neighbours (desc_act)" if self.act_order else f"groups of {self.group}"

    def carry(self, parts: Parts) -> Read:
        qweight, zeros, scales = self._checked(parts)
        columns, fmt = 8 * qweight.shape[0], self.format
        codes = rows_of_bytes(octets(qweight.T))  # eight columns a word: our order already
        half, changed = float16(scales.T, "scales")
        parts = [spread(values, columns, self.group, fmt.group) for values in (half, zeros.T)]
        return Read(PackedTensor(fmt, columns, codes, parts[0], None if self.symmetric else parts[1]), changed)

    def unpack(self, parts: Parts) -> Tensor:
        qweight, zeros, scales = self._checked(parts)
        groups = self._groups(parts, 8 * qweight.shape[0]).long()
        codes = nibbles(qweight.T)
        return (codes.float() - zeros.T[:, groups].float()) * finite(scales, "scales").T[:, groups].float()

    def _checked(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
        """qweight, zeros uint8 [groups, rows], scales."""
        qweight = part(parts, "qweight", (torch.int32,), (None, None))
        columns, rows = 8 * qweight.shape[0], qweight.shape[1]
        if rows % 8:
            raise ValueError(f"qweight must have a multiple of 8 rows of the weight, got {rows}")
        groups = num_groups(columns, self.group)
        scales = part(parts, "scales", FLOATS, (groups, rows))
        stored = nibbles(part(parts, "qzeros", (torch.int32,), (groups, rows // 8)))
        if self.zero_offset and (stored == 15).any():  # libraries differ in what they make of it: 16, or 0
            raise ValueError("qzeros must be at most 14 in checkpoint_format gptq, got 15")
        zeros = stored + self.zero_offset
        if self.symmetric and (zeros != 8).any():
            got = int(zeros[zeros != 8][0])
            raise ValueError(f"qzeros must stand for 8 everywhere with sym=true, got {got}")
        if not self.act_order:
            self._groups(parts, columns)
        return qweight, zeros, scales

    def _groups(self, parts: Parts, columns: int) -> Tensor:
        """The group of every column."""
        in_order = torch.arange(columns) // (columns if self.group == -1 else self.group)
        if "g_idx" not in parts:
            if self.act_order:
                raise ValueError(f"parts must hold g_idx with desc_act=true, got {', '.join(parts)}")
            return in_order
        groups = part(parts, "g_idx", (torch.int32, torch.int64), (columns,))
        if self.act_order:
            if columns and not 0 <= int(groups.min()) <= int(groups.max()) < num_groups(columns, self.group):
                got = f"{int(groups.min())} to {int(groups.max())}"
                raise ValueError(f"g_idx must be in [0, {num_groups(columns, self.group)}), got {got}")
        elif not torch.equal(groups.long(), in_order):
            raise ValueError("g_idx must be column // group_size with desc_act=false, got another order")
        return groups


def group_of(config: dict) -> int:
    """group_size of a configuration: -1 or positive."""
    group = config.get("group_size", 128)
    if not isinstance(group, int) or isinstance(group, bool) or (group < 1 and group != -1):
        raise ValueError(f"group_size must be -1 or positive, got {group}")
    return group
