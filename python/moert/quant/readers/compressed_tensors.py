"""compressed-tensors' integers: "pack-quantized" (4 or 8 bits in int32 words) and "int-quantized" (a byte each)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moert.quant.format import PackedTensor, RowFormat
from moert.quant.int4 import Int4, Int4Asymmetric
from moert.quant.int8 import Int8
from moert.quant.readers.bits import nibbles, octets, rows_of_bytes
from moert.quant.readers.layout import FLOATS, Layout, Parts, Read, finite, float16, num_groups, our_group, part, spread

FORMATS = ("pack-quantized", "int-quantized")
# Whether the columns of a group are not neighbours; "dynamic" is an older name of "group".
ORDERS = {None: False, False: False, "weight": False, "static": False, True: True, "group": True, "dynamic": True}
STRATEGIES = ("tensor", "channel", "group")


@dataclass(frozen=True)
class CompressedInt(Layout):
    """w = scale * (code - zero): `weight_packed` with offset 2^(bits - 1), or `weight` int8, [rows, columns].

    weight_scale [rows, groups], [rows, 1] or [1] by strategy; weight_zero_point, packed along the rows where the codes
    are packed; weight_shape the two sizes; weight_g_idx the group of every column where those are in another order.
    """

    bits: int
    packed: bool
    strategy: str
    group: int = -1
    symmetric: bool = True
    act_order: bool = False

    @classmethod
    def of_config(cls, config: dict) -> "CompressedInt":
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ValueError(f"config_groups must be a dict of schemes, got {groups}")
        layouts = {cls._of_scheme(scheme, config.get("format")) for scheme in groups.values()}
        if len(layouts) > 1:
            raise ValueError(f"config_groups must agree on one scheme of weights, got {len(layouts)}")
        return layouts.pop()

    @classmethod
    def _of_scheme(cls, scheme: dict, default: str | None) -> "CompressedInt":
        weights = (scheme.get("weights") or {}) if isinstance(scheme, dict) else None
        if not isinstance(weights, dict):
            raise ValueError(f"config_groups must hold schemes with a dict of weights, got {scheme}")
        name = scheme.get("format") or default
        if name not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)} in compressed-tensors, got {name}")
        bits, strategy, packed = weights.get("num_bits"), weights.get("strategy"), name == "pack-quantized"
        if weights.get("type", "int") != "int" or bits not in (4, 8):
            raise ValueError(f"weights must be int of 4 or 8 bits, got {weights.get('type', 'int')} of {bits}")
        strategy = strategy or ("group" if weights.get("group_size") else "channel")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy}")
        group = weights.get("group_size") if strategy == "group" else -1
        if not isinstance(group, int) or (group < 1 and group != -1):
            raise ValueError(f"group_size must be positive, got {group}")
        order = weights.get("actorder")
        order = order.lower() if isinstance(order, str) else order
        if order not in ORDERS:
            raise ValueError(f"actorder must be one of {', '.join(map(str, ORDERS))}, got {order}")
        return cls(bits, packed, strategy, group, bool(weights.get("symmetric", True)), bool(ORDERS[order]))

    @property
    def names(self) -> tuple[str, ...]:
        codes = ("weight_packed", "weight_shape") if self.packed else ("weight",)
        return (*codes, "weight_scale", "weight_zero_point", "weight_g_idx")

    @property
    def format(self) -> RowFormat | None:
        if self.act_order or (self._bytes and not self.symmetric):
            return None
        if self._bytes and self.group == -1:
            return Int8()
        group = our_group(self.group)
        kind = Int8 if self._bytes else Int4 if self.symmetric else Int4Asymmetric
        return None if group is None else kind(group)

    @property
    def obstacle(self) -> str:
        if self.act_order:
            return "columns of a group are not neighbours (actorder)"
        return f"groups of {self.group}" if self.symmetric or not self._bytes else "8 bits with a zero point"

    @property
    def _bytes(self) -> bool:
        """Whether codes become bytes here: int-quantized ones may be of 4 bits."""
        return self.bits == 8 or not self.packed

    def carry(self, parts: Parts) -> Read:
        stored, columns = self._codes(parts)
        scales, fmt = self._scales(parts, len(stored), columns), self.format
        self._check_plain(parts, scales.shape, columns)
        half, changed = float16(scales, "weight_scale")
        zeros = None if self.symmetric else self._zeros(parts, scales.shape)
        if fmt.group is not None:
            half = spread(half, columns, self.group, fmt.group)
            zeros = None if zeros is None else spread(zeros, columns, self.group, fmt.group)
        return Read(PackedTensor(fmt, columns, rows_of_bytes(stored), half, zeros), changed)

    def unpack(self, parts: Parts) -> Tensor:
        stored, columns = self._codes(parts)
        scales = finite(self._scales(parts, len(stored), columns), "weight_scale")
        self._check_plain(parts, scales.shape, columns)
        middle = 0 if self._bytes else 8
        codes = (stored.view(torch.int8) if self._bytes else nibbles(stored)[:, :columns]).float()
        zeros = torch.full(scales.shape, middle) if self.symmetric else self._zeros(parts, scales.shape)
        groups = self._groups(parts, columns)
        return (codes - zeros[:, groups].float()) * scales[:, groups].float()

    def _codes(self, parts: Parts) -> tuple[Tensor, int]:
        """uint8 [rows, bytes] as our formats have them (4 bits with offset 8, 8 bits signed), and the columns."""
        if not self.packed:
            weight = part(parts, "weight", (torch.int8,), (None, None))
            if self.bits == 4 and weight.numel() and not -8 <= int(weight.min()) <= int(weight.max()) <= 7:
                got = f"{int(weight.min())} to {int(weight.max())}"
                raise ValueError(f"weight must be in [-8, 7] with num_bits 4, got {got}")
            return weight.view(torch.uint8), weight.shape[1]
        words = part(parts, "weight_packed", (torch.int32,), (None, None))
        rows, columns = part(parts, "weight_shape", (torch.int64, torch.int32), (2,)).tolist()
        width = -(-columns * self.bits // 32)
        if rows != words.shape[0] or columns < 0 or width != words.shape[1]:
            got = f"weight_packed {list(words.shape)}"
            raise ValueError(
                f"weight_shape must fit weight_packed, {self.bits} bits a weight, got {[rows, columns]} and {got}"
            )
        stored = octets(words)
        if self.bits == 8:
            return (stored ^ 128)[:, :columns].contiguous(), columns
        codes = stored[:, : -(-columns // 2)].contiguous()
        if columns % 2:
            codes[:, -1] &= 15
        return codes, columns

    def _scales(self, parts: Parts, rows: int, columns: int) -> Tensor:
        """[rows, groups]"""
        if self.strategy == "tensor":
            return part(parts, "weight_scale", FLOATS, (1,)).expand(rows, 1).contiguous()
        return part(parts, "weight_scale", FLOATS, (rows, num_groups(columns, self.group)))

    def _zeros(self, parts: Parts, shape: torch.Size) -> Tensor:
        """[rows, groups] in the codes' own numbers: uint8 for 4 bits in words, else int8."""
        rows, groups = shape
        if not self.packed:
            if self.strategy == "tensor":
                return part(parts, "weight_zero_point", (torch.int8,), (1,)).expand(shape)
            return part(parts, "weight_zero_point", (torch.int8,), (rows, groups))
        words = part(parts, "weight_zero_point", (torch.int32,), (-(-rows * self.bits // 32), groups))
        zeros = nibbles(words.T) if self.bits == 4 else (octets(words.T) ^ 128).view(torch.int8)
        return zeros[:, :rows].T.contiguous()

    def _check_plain(self, parts: Parts, scales: torch.Size, columns: int) -> None:
        """Parts that the scheme has no use for must say nothing else than it does."""
        zeros, order = parts.get("weight_zero_point"), parts.get("weight_g_idx")
        middle = 0 if self._bytes else 8
        if self.symmetric and zeros is not None and zeros.any() and (self._zeros(parts, scales) != middle).any():
            raise ValueError("weight_zero_point must be zero in a symmetric scheme, got others")
        if self.act_order or order is None or (order == -1).all():
            return
        order = part(parts, "weight_g_idx", (torch.int32, torch.int64), (columns,)).long()
        if not torch.equal(order, self._groups(parts, columns)):
            raise ValueError("weight_g_idx must be in order without actorder, got another order")

    def _groups(self, parts: Parts, columns: int) -> Tensor:
        in_order = torch.arange(columns) // (max(columns, 1) if self.group == -1 else self.group)
        if not self.act_order:
            return in_order
        groups = part(parts, "weight_g_idx", (torch.int32, torch.int64), (columns,)).long()
        most = num_groups(columns, self.group)
        if columns and not 0 <= int(groups.min()) <= int(groups.max()) < most:
            raise ValueError(f"weight_g_idx must be in [0, {most}), got {int(groups.min())} to {int(groups.max())}")
        return groups
