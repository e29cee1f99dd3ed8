"""Tokens by document: D documents, bounded by cu_seqlens, or one."""

import torch
from torch import Tensor


def document_of_token(cu_seqlens: Tensor | None, T: int, device: torch.device) -> tuple[Tensor, int]:
    """The number of each token's document int64 [T], and how many documents there are; one where cu_seqlens is None."""
    if cu_seqlens is None:
        return torch.zeros(T, dtype=torch.int64, device=device), 1
    ends = cu_seqlens[1:].to(device=device, dtype=torch.int64)
    return torch.bucketize(torch.arange(T, device=device), ends, right=True), ends.shape[0]


def tokens_per_document(document: Tensor, D: int) -> Tensor:
    """int64 [D]; numbers outside [0, D) do not count."""
    inside = (document >= 0) & (document < D)
    counts = torch.zeros(D + 1, dtype=torch.int64, device=document.device)
    return counts.scatter_add(0, torch.where(inside, document, D), torch.ones_like(document))[:D]
