"""The weights of experts that are modules of their own, as the one tensor [E, ...] that the operators take.

Packing moves the parameters of the experts into one piece of memory, each still a parameter under its own name: a
state_dict, an optimizer or a saved checkpoint sees no difference, and the operators read all of them without a copy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def stack(params: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
    """params, E tensors of one shape -> [E, ...], without a copy where they lie one after the other.

    Parameters that something else has laid elsewhere (a load with assign=True, FSDP) are copied in every call, and
    under torch.compile, which cannot see where a tensor lies.  With ids, the experts chosen, the parameters of all
    others get no gradient (None, as from modules that were not called) instead of zeros; torch.compile gives zeros.
    """
    if torch.compiler.is_compiling():
        return torch.stack(tuple(params))
    if torch.is_grad_enabled() and any(p.requires_grad for p in params):
        return _Stack.apply(ids, *params)
    return _whole(params)


def lie_together(params: Sequence[Tensor]) -> bool:
    """Whether the tensors follow each other in one storage."""
    first, last = params[0], params[-1]
    if not all(_is_plain(p) and (p.shape, p.dtype) == (first.shape, first.dtype) for p in params):
        return False
    if first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
        return False
    start, step = first.data_ptr(), first.numel() * first.element_size()
    return all(p.data_ptr() == start + e * step for e, p in enumerate(params))


def pack_(params: Sequence[nn.Parameter]) -> None:
    """Lays the parameters one after the other.  Tied, mixed or meta ones are left as they lie."""
    first = params[0]
    same = all(
        _is_plain(p) and (p.shape, p.dtype, p.device) == (first.shape, first.dtype, first.device) for p in params
    )
    if not same or first.is_meta or len(set(map(id, params))) < len(params) or lie_together(params):
        return
    # An inference tensor could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        for p, row in zip(params, torch.stack([p.detach() for p in params]), strict=True):
            p.data = row


def _is_plain(p: Tensor) -> bool:
    return type(p) in (nn.Parameter, Tensor) and type(p.data) is Tensor and p.is_contiguous()


def _whole(params: Sequence[Tensor]) -> Tensor:
    if not lie_together(params):
        return torch.stack(tuple(params))
    first = params[0].detach()
    return first.as_strided((len(params), *first.shape), (first.numel(), *first.stride()), first.storage_offset())


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, *params):
        ctx.ids = ids
        return _whole(params)

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[1:]
        if ctx.ids is not None:
            used = set(ctx.ids.unique().tolist())
            needed = [need and e in used for e, need in enumerate(needed)]
        return None, *(g if need else None for g, need in zip(grad.unbind(), needed, strict=True))


class Stacked:
    """A module whose parameters are stacked, kept packed when they move to another dtype or device, or are copied."""

    def stacks(self) -> list[list[Tensor]]:
        raise TypeError(f"{type(self).__name__} must define stacks()")

    def pack_(self) -> None:
        for params in self.stacks():
            pack_(params)

    def _apply(self, fn, recurse=True):
        module = super()._apply(fn, recurse)
        self.pack_()
        return module

    def __setstate__(self, state):
        super().__setstate__(state)
        self.pack_()
