"""Backward operators are not differentiable themselves: asking for it must say so."""

import torch


def once_differentiable(operator: str, forward: str) -> None:
    """Make a second backward through `operator` (namespace::name) an error that names the forward."""

    def backward(ctx, *_):
        raise RuntimeError(f"{forward} must be differentiated at most once, got a second backward")

    torch.library.register_autograd(operator, backward)
