"""The 1,797 handwritten 8x8 digits that come with scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def digits() -> tuple[Tensor, Tensor]:
    """Pixels [1797, 64] in [0, 1], classes [1797]."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def split(seed: int, held_out: float = 0.2) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, y) to train on and (x, y) held out, shuffled by seed."""
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    count = int(held_out * len(x))
    return (x[order[count:]], y[order[count:]]), (x[order[:count]], y[order[:count]])
