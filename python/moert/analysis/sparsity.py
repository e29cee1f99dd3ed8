"""How many experts single tokens (TLS) and chunks of consecutive tokens (CLS) leave unused (arXiv:2507.08771)."""

import torch
from torch import Tensor

from moert.routers.chunks import chunks_of


def token_level_sparsity(weights: Tensor) -> Tensor:
    """Share of zeros in weights [T, E], as Routing.dense_weights gives them (any activations do)."""
    return (weights == 0).float().mean()


def chunk_level_sparsity(weights: Tensor, chunk: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """1 - the share of experts that any token of a chunk uses, mean over chunks of `chunk` tokens.

    weights [T, E]; a chunk ends with its document and may be shorter.  Never above the token-level sparsity where the
    chunks are of equal size; what a chunk of tokens costs at inference follows it.
    """
    T, E = weights.shape
    index, most, count = chunks_of(T, chunk, cu_seqlens, weights.device)
    uses = torch.zeros(most, E, device=weights.device).index_add(0, index, (weights != 0).float())
    return 1 - (uses > 0).sum() / (count * E)
