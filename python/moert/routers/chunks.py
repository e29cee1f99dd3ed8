"""Chunks of consecutive tokens that do not cross the boundaries of documents.  Nothing here waits for the device."""

import torch
from torch import Tensor

from moert.routers.documents import document_of_token


def chunks_of(T: int, chunk: int, cu_seqlens: Tensor | None, device: torch.device | str) -> tuple[Tensor, int, Tensor]:
    """Token -> its chunk, int64 [T]; an upper bound on the number of chunks; that number, a tensor.

    Every document is cut from its first token on; what is left at its end is a chunk of its own.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    position = torch.arange(T, device=device)
    if cu_seqlens is None:
        count = -(-T // chunk)
        return position // chunk, count, torch.tensor(count, device=device)
    ends = cu_seqlens.long()
    documents = ends.shape[0] - 1
    document = document_of_token(cu_seqlens, T, device)[0].clamp_max(documents - 1)
    chunks = (ends.diff() + chunk - 1) // chunk
    first = chunks.cumsum(0) - chunks
    return first[document] + (position - ends[document]) // chunk, T // chunk + documents, chunks.sum()


def same_document(T: int, cu_seqlens: Tensor | None, device: torch.device | str) -> Tensor:
    """bool [T - 1]: whether tokens t and t + 1 are of one document."""
    document, _ = document_of_token(cu_seqlens, T, device)
    return document[1:] == document[:-1]
