"""Fake kernels see what no kernel sees: tensors of a real device mixed with tensors of the meta device."""

from torch import Tensor


def same_device(**tensors: Tensor | None) -> None:
    """Refuse tensors on more than one device; without it the result would be a real tensor that nobody has written."""
    (first, like), *others = ((name, t) for name, t in tensors.items() if t is not None)
    for name, tensor in others:
        if tensor.device != like.device:
            raise RuntimeError(f"{name} must be on the device of {first}, {like.device}, got {tensor.device}")
