"""The 1,797 handwritten 8x8 digits that come with scikit-learn, and a classifier.

Read from its files: importing it would load a second OpenMP runtime beside torch's.
"""

import functools
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Pixels [1797, 64] in [0, 1], classes [1797]."""
    package = Path(find_spec("sklearn").origin).parent
    table = torch.from_numpy(np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.int64))
    return table[:, :64].float() / 16, table[:, 64]


def split(seed: int, held_out: float = 0.2) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, y) to train on and (x, y) held out, shuffled by seed."""
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    count = int(held_out * len(x))
    return (x[order[count:]], y[order[count:]]), (x[order[:count]], y[order[:count]])


class Classifier(nn.Module):
    """Pixels [n, 64] -> logits [n, 10]: residual blocks on normalised rows between two linear layers."""

    def __init__(self, hidden: int, blocks: Iterable[nn.Module]):
        super().__init__()
        self.first, self.last, self.blocks = nn.Linear(64, hidden), nn.Linear(hidden, 10), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(F.layer_norm(x, x.shape[-1:]))
        return self.last(x)
