"""Codes of four bits in words and bytes, the lowest bits first."""

import torch
import torch.nn.functional as F
from torch import Tensor


def octets(words: Tensor) -> Tensor:
    """The bytes of each row.  A clone, because a contiguous tensor of one column may have any stride."""
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def nibbles(words: Tensor) -> Tensor:
    """int32 [..., n], or uint8, -> the codes uint8 [..., 8 n], or 2 n."""
    pairs = octets(words)
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


def rows_of_bytes(row: Tensor) -> Tensor:
    """uint8 [..., n] with zeros up to whole blocks of 16."""
    return F.pad(row, (0, -row.shape[-1] % 16)).contiguous()


def pack_nibbles(codes: Tensor) -> Tensor:
    """codes uint8 [..., columns] -> [..., row_bytes], two a byte, the even column in the low bits."""
    even = F.pad(codes, (0, codes.shape[-1] % 2))
    return rows_of_bytes(even[..., ::2] | even[..., 1::2] << 4)


def pack_quarters(codes: Tensor) -> Tensor:
    """codes uint8 [..., columns] below 4 -> [..., row_bytes], four a byte, the first in the lowest bits."""
    fours = F.pad(codes, (0, -codes.shape[-1] % 4)).unflatten(-1, (-1, 4))
    return rows_of_bytes(fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6)
