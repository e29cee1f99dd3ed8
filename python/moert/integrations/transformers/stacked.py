"""The weights of experts that are modules of their own, as the one tensor [E, ...] that the operators take.

Packing moves the parameters of the experts into one piece of memory, each still a parameter under its own name: a
state_dict, an optimizer or a saved checkpoint sees no difference, and the operators read all of them without a copy.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn


def stack(param: Callable[[int], Tensor], num_experts: int, chosen: Sequence[int] | None = None) -> Tensor:
    """param(e), the weight of expert e -> [E, ...], without a copy where the weights lie one after the other.

    Only the experts in chosen (None: all) are looked at and get a gradient; that of all others is None, as of modules
    that were not called.  What something else has laid apart (a load with assign=True, FSDP) is copied in every call,
    as under torch.compile, which cannot see where a tensor lies and gives zeros instead of None.
    """
    if torch.compiler.is_compiling():
        return torch.stack([param(e) for e in range(num_experts)])
    chosen = range(num_experts) if chosen is None else chosen
    first, params = param(0), [param(e) for e in chosen]
    if _lie_from(first, zip(chosen, params, strict=True), num_experts):
        whole = first.detach().as_strided((num_experts, *first.shape), (first.numel(), *first.stride()))
    else:
        whole = torch.stack([param(e).detach() for e in range(num_experts)])
    if torch.is_grad_enabled() and any(p.requires_grad for p in params):
        return _Whole.apply(whole, chosen, *params)
    return whole


def lie_together(params: Sequence[Tensor]) -> bool:
    """Whether the tensors follow each other in one storage."""
    return _lie_from(params[0], enumerate(params), len(params))


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


def _lie_from(first: Tensor, rows: Iterable[tuple[int, Tensor]], num_experts: int) -> bool:
    """Whether every (e, tensor) is row e of the [E, ...] that begins with first, in the storage of first."""
    size, start = first.numel(), first.data_ptr()
    storage = first.untyped_storage()
    room = storage.nbytes() - (start - storage.data_ptr())
    step = size * first.element_size()
    like = (first.shape, first.dtype)
    fits = size > 0 and room >= num_experts * step and _is_plain(first)
    return fits and all(
        _is_plain(p) and (p.shape, p.dtype) == like and p.data_ptr() == start + e * step for e, p in rows
    )


def _is_plain(p: Tensor) -> bool:
    return type(p) in (nn.Parameter, Tensor) and type(p.data) is Tensor and p.is_contiguous()


class _Whole(torch.autograd.Function):
    """Gives each chosen parameter its row of the gradient of whole."""

    @staticmethod
    def forward(ctx, whole, chosen, *params):
        ctx.chosen = chosen
        ctx.save_for_backward(*params)
        return whole

    @staticmethod
    def backward(ctx, grad):
        ctx.saved_tensors  # noqa: B018  raises if a parameter was changed in place since the forward
        return (
            None,
            None,
            *(grad[e] if need else None for e, need in zip(ctx.chosen, ctx.needs_input_grad[2:], strict=True)),
        )


class Stacked:
    """A module whose parameters are stacked, kept packed when they move to another dtype or device, or are copied."""

    def stacks(self) -> list[list[nn.Parameter]]:
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
