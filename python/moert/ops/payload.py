"""Rows that travel in eight bits an element, a scale for each, as DeepSeek-V3 dispatches in fp8 (arXiv 2412.19437).

dispatch_pack rounds them, dispatch_unpack_ widens them (csrc/cpu/dispatch_rows.h).  Letters: T rows of H elements.
"""

import torch
from torch import Tensor

# The type that travels and its largest value.
PAYLOADS = {"int8": (torch.int8, 127.0), "float8_e4m3": (torch.float8_e4m3fn, 448.0)}
WORD = torch.float32  # what carries the bytes: it is moved, never computed with


def check_payload(payload: str | None) -> None:
    if payload is not None and payload not in PAYLOADS:
        raise ValueError(f"payload must be None or one of {', '.join(PAYLOADS)}, got {payload}")


def rounded_width(H: int) -> int:
    """Words of a rounded row: its elements, and its scale."""
    return (H + 3) // 4 + 1


def encode_ref(x: Tensor, payload: str) -> Tensor:
    """x [T, H], floating point -> words [T, ceil(H / 4) + 1]: the elements, zeros up to a word, the row's scale.

    The scale is the row's largest magnitude over the type's, float32.  A row with a value that is not finite in float32
    arrives as NaN.
    """
    dtype, largest = PAYLOADS[payload]
    T, H = x.shape
    words = torch.zeros(T, rounded_width(H), dtype=WORD, device=x.device)
    if H:
        x = x.float()
        scale = x.abs().amax(-1, keepdim=True) / largest
        scale = torch.where(scale.isfinite(), scale, torch.nan)
        scaled = torch.where(scale > 0, x / scale, 0)  # a row of zeros has scale 0, one of NaN no comparison
        scaled = scaled.clamp(-largest, largest)  # a scale that is not normal is too small by as much as a third
        words[:, :-1].view(dtype)[:, :H] = scaled.round() if dtype == torch.int8 else scaled
        words[:, -1:] = scale
    return words


def decode_ref(words: Tensor, H: int, dtype: torch.dtype, payload: str) -> Tensor:
    """words [M, ceil(H / 4) + 1], strided rows -> [M, H] in dtype."""
    elements = words[:, :-1].view(PAYLOADS[payload][0])[:, :H]
    most = torch.finfo(WORD).max  # which the largest magnitude times its scale may round past
    return (elements.float() * words[:, -1:]).clamp(-most, most).to(dtype)


def rounded_ref(x: Tensor, payload: str) -> Tensor:
    """What arrives of x [T, H], element by element."""
    rows, limit = [], 127 if payload == "int8" else 448
    for row in x.float().tolist():
        largest = max(map(abs, row), default=0.0)
        scale = torch.tensor(largest) / limit
        for value in row:
            exact = (torch.tensor(value) / scale).clamp(-limit, limit)
            if not all(torch.tensor(row).isfinite()):
                rows.append(torch.nan)
            elif largest == 0:
                rows.append(0.0)
            elif payload == "int8":
                rows.append(round(exact.item()) * scale.item())  # to even, where there are two
            else:
                rows.append(exact.to(torch.float8_e4m3fn).item() * scale.item())
    return torch.tensor(rows, dtype=torch.float32).reshape(x.shape).to(x.dtype)
