"""Weights in memory of large pages, where reading them is fastest."""

import mmap

import torch
from torch import Tensor, nn

from moert.ops.kinds import expect

HUGE = 2 << 20  # bytes of a large page on x86-64 and, as Linux is usually built, on aarch64


def huge_pages_(module: nn.Module, smallest: int = 4 * HUGE) -> int:
    """Move parameters and buffers on the CPU of at least `smallest` bytes into pages of 2 MiB; the bytes moved.

    Buffers are what packed experts consist of.  All stay what they are (names, shapes, strides, values, the objects
    themselves), so optimizers and state_dict see no difference, and a copy made by `.to()` or `deepcopy` is an
    ordinary one.  Those that share memory share it afterwards.  Peak memory is that of the largest one more.  Where
    the system has no such pages, or grants none, the values move all the same.
    """
    expect(nn.Module, module=module)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        raise RuntimeError("huge_pages_ must run on Linux, got a system without MADV_HUGEPAGE")
    moved: dict[int, Tensor] = {}
    total = 0
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or storage.nbytes() < max(smallest, 1):
            continue
        if storage.data_ptr() not in moved:
            moved[storage.data_ptr()] = _copy(storage)
            total += storage.nbytes()
        flat = moved[storage.data_ptr()].view(tensor.dtype)
        tensor.data = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return total


def _copy(storage: torch.UntypedStorage) -> Tensor:
    """The bytes of the storage in fresh memory that begins on a large page; it lives as long as the tensor."""
    memory = mmap.mmap(-1, storage.nbytes() + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    skip = -whole.data_ptr() % HUGE
    copy = torch.frombuffer(memory, dtype=torch.uint8, offset=skip, count=storage.nbytes())
    copy.untyped_storage().copy_(storage)
    return copy
