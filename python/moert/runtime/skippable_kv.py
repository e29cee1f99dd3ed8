"""Keys and values of layers that not every token reaches: each layer and sequence has its own number of rows.

What a block's attention is given has extend(layer, k, v, rows) -> (k, v, positions) of each sequence, and
positions(layer, rows), which says beforehand at which positions those will be.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Keys = list[tuple[Tensor, Tensor, Tensor]]
STRATEGIES = ("recursion", "shared", "update")


class SkippableKV:
    """Keys, values and true positions per layer and sequence; rows that skip a layer take no memory in it."""

    def __init__(self, num_layers: int, batch: int):
        self.keys: list[Keys] = [[] for _ in range(num_layers)]
        self.batch = batch

    def extend(self, layer: int, k: Tensor, v: Tensor, rows) -> Keys:
        """Takes k, v [N, h, d] of the rows and returns (k, v, positions) of each sequence, what came before included.

        Rows of a rectangle that have no token (those at the last position) are not kept.
        """
        ends = rows.offsets.tolist()
        if len(ends) != self.batch + 1:
            raise ValueError(f"rows must be of {self.batch} sequences, got {len(ends) - 1}")
        none = torch.iinfo(rows.positions.dtype).max
        for b, (first, last) in enumerate(zip(ends, ends[1:], strict=False)):
            new = tuple(t[first:last] for t in (k, v, rows.positions))
            if rows.length is not None:
                has = new[2] != none
                new = tuple(t[has] for t in new)
            if len(self.keys[layer]) <= b:
                self.keys[layer].append(new)
            else:
                old = self.keys[layer][b]
                self.keys[layer][b] = tuple(torch.cat(pair) for pair in zip(old, new, strict=True))
        return self.keys[layer]

    def stored(self, layer: int | None = None) -> int:
        """Rows kept in a layer, or in all."""
        layers = self.keys if layer is None else [self.keys[layer]]
        return sum(len(positions) for layer in layers for _, _, positions in layer)

    def positions(self, layer: int, rows) -> list[Tensor]:
        ends, none = rows.offsets.tolist(), torch.iinfo(rows.positions.dtype).max
        new = [rows.positions[first:last] for first, last in zip(ends, ends[1:], strict=False)]
        new = [at[at != none] for at in new]
        old = [at for _, _, at in self.keys[layer]]
        return [torch.cat(pair) for pair in zip(old, new, strict=True)] if old else new


class RecursiveKV:
    """Keys and values of num_layers layers that are run up to `depths` times (Mixture-of-Recursions, arXiv:2507.10524).

    strategy "recursion" keeps those of each depth apart; "shared" keeps the first depth's, which all depths read;
    "update" keeps each depth's and reads, for every token of the first, those of the deepest depth that has them.
    """

    def __init__(self, depths: int, num_layers: int, batch: int, strategy: str = "recursion"):
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy}")
        self.strategy = strategy
        self.depths = [SkippableKV(num_layers, batch) for _ in range(1 if strategy == "shared" else depths)]

    def at(self, depth: int) -> "SkippableKV | _Read | _Updated":
        """What the blocks extend at this depth."""
        if depth == 0 or self.strategy == "recursion":
            return self.depths[depth]
        return _Read(self.depths[0]) if self.strategy == "shared" else _Updated(self.depths[: depth + 1])

    def stored(self) -> int:
        return sum(kv.stored() for kv in self.depths)


class _Read:
    """The keys and values of another depth, which these rows do not change."""

    def __init__(self, kv: SkippableKV):
        self.kv = kv

    def extend(self, layer: int, k: Tensor, v: Tensor, rows) -> Keys:
        return self.kv.keys[layer]

    def positions(self, layer: int, rows) -> list[Tensor]:
        return [at for _, _, at in self.kv.keys[layer]]


class _Updated(_Read):
    """Those of the first depth, with a token's row replaced by that of the last of these depths which has it."""

    def __init__(self, depths: Sequence[SkippableKV]):
        super().__init__(depths[0])
        self.deeper = depths[1:]

    def extend(self, layer: int, k: Tensor, v: Tensor, rows) -> Keys:
        self.deeper[-1].extend(layer, k, v, rows)
        keys = [tuple(t.clone() for t in each) for each in self.kv.keys[layer]]
        for kv in self.deeper:
            for (k_b, v_b, at), (k_new, v_new, at_new) in zip(keys, kv.keys[layer], strict=False):
                place = torch.searchsorted(at, at_new)
                k_b[place], v_b[place] = k_new, v_new
        return keys


@dataclass(frozen=True)
class ModelKV:
    """Keys and values of a MoRModel: of the block before the recursive stack, of the stack, and of the block after."""

    first: SkippableKV | None
    stack: RecursiveKV | None
    last: SkippableKV | None


class _AtLayer:
    def __init__(self, kv, layer: int):
        self.kv, self.layer = kv, layer

    def extend(self, layer: int, k: Tensor, v: Tensor, rows) -> Keys:
        return self.kv.extend(self.layer, k, v, rows)

    def positions(self, layer: int, rows) -> list[Tensor]:
        return self.kv.positions(self.layer, rows)


def at_layer(kv, layer: int):
    """kv as a block sees it that is run as this layer, whatever layer it believes to be; None where kv is None."""
    return None if kv is None else _AtLayer(kv, layer)


class Joined:
    """The keys and values of several sequences that were kept apart, as one batch of them, in the order of the rows."""

    def __init__(self, each: Sequence):
        self.each = each

    def extend(self, layer: int, k: Tensor, v: Tensor, rows) -> Keys:
        parts = _one_by_one(rows)
        return [kv.extend(layer, k[part], v[part], row)[0] for kv, (part, row) in zip(self.each, parts, strict=True)]

    def positions(self, layer: int, rows) -> list[Tensor]:
        return [kv.positions(layer, row)[0] for kv, (_, row) in zip(self.each, _one_by_one(rows), strict=True)]


def _one_by_one(rows):
    """The slice of each sequence's rows, and these rows alone."""
    ends = rows.offsets.tolist()
    for first, last in zip(ends, ends[1:], strict=False):
        part = slice(first, last)
        yield part, type(rows)(rows.positions[part], torch.tensor([0, last - first]))
