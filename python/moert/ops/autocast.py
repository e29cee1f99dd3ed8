"""Under torch.autocast the GEMM operators compute in its dtype, as torch's own linear layers do."""

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype in which torch would multiply them; the first says whose autocast it is."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # asked once: a call for one token has microseconds
        return tensors
    return tuple(None if t is None else t.to(autocast_dtype(t)) for t in tensors)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Autocast's where it is on for x's device, else x's own; float64 is left alone, as torch does."""
    device = x.device.type
    # meta has no autocast; torch.amp.is_autocast_available would say so, but torch 2.11 cannot compile it.
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
