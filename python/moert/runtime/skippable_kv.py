"""Keys and values of layers that not every token reaches: each layer and sequence has its own number of rows."""

import torch
from torch import Tensor

Keys = list[tuple[Tensor, Tensor, Tensor]]


class SkippableKV:
    """Keys, values and true positions per layer and sequence; rows that skip a layer take no memory in it."""

    def __init__(self, num_layers: int, batch: int):
        self.keys: list[Keys] = [[] for _ in range(num_layers)]
        self.batch = batch

    def extend(self, layer: int, k: Tensor, v: Tensor, rows) -> Keys:
        """Takes k, v [N, h, d] of the rows and returns (k, v, positions) of each sequence, what came before included.

        Rows that have no token (those at the last position of a rectangle) are not kept.
        """
        ends = rows.offsets.tolist()
        if len(ends) != self.batch + 1:
            raise ValueError(f"rows must be of {self.batch} sequences, got {len(ends) - 1}")
        none = torch.iinfo(rows.positions.dtype).max
        for b, (first, last) in enumerate(zip(ends, ends[1:], strict=False)):
            has = rows.positions[first:last] != none
            new = tuple(t[first:last][has] for t in (k, v, rows.positions))
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


class RecursiveKV:
    """Keys and values of num_layers layers that are run up to `depths` times (Mixture-of-Recursions, arXiv:2507.10524).

    strategy "recursion" keeps those of each depth apart; "shared" keeps the first depth's, which all depths read.
    """

    def __init__(self, depths: int, num_layers: int, batch: int, strategy: str = "recursion"):
        if strategy not in ("recursion", "shared"):
            raise ValueError(f"strategy must be recursion or shared, got {strategy}")
        self.strategy = strategy
        self.depths = [SkippableKV(num_layers, batch) for _ in range(depths if strategy == "recursion" else 1)]

    def at(self, depth: int) -> "SkippableKV | _Read":
        """What the blocks extend at this depth."""
        if self.strategy == "shared" and depth > 0:
            return _Read(self.depths[0])
        return self.depths[depth]

    def stored(self) -> int:
        return sum(kv.stored() for kv in self.depths)


class _Read:
    """The keys and values of another depth, which these rows do not change."""

    def __init__(self, kv: SkippableKV):
        self.kv = kv

    def extend(self, layer: int, k: Tensor, v: Tensor, rows) -> Keys:
        return self.kv.keys[layer]
