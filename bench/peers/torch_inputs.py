"""A problem as torch tensors."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from problem import Problem


def inputs(problem: Problem, threads: int) -> tuple:
    """x [T, H], w1 [E, 2I, H], w2 [E, H, I] in the problem's dtype and the routings (ids int64, weights float32)."""
    torch.set_num_threads(threads)
    x = torch.from_numpy(problem.x()).to(getattr(torch, problem.dtype))
    routings = [(torch.from_numpy(ids).long(), torch.from_numpy(weights)) for ids, weights in problem.routings()]
    return x, *weights(replace(problem, T=0, routing="uniform")), routings


def training(forward: Callable, x: torch.Tensor, parameters: tuple, routings: list) -> Callable:
    """call(turn): forward(x, ids, shares) and the gradients of x, the shares and the parameters; gives that of x."""
    dy = torch.ones_like(x)

    def call(turn):
        ids, weights = routings[turn]
        rows, shares = (tensor.detach().requires_grad_() for tensor in (x, weights.to(x.dtype)))
        leaves = (rows, shares, *parameters)
        return torch.autograd.grad(forward(rows, ids, shares), leaves, dy)[0].float().numpy()

    return call


@functools.lru_cache(maxsize=1)  # problems that differ in their tokens alone follow each other
def weights(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(w).to(getattr(torch, problem.dtype)) for w in problem.weights())
