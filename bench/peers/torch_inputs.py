"""A problem as torch tensors."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from problem import Problem, kept


def inputs(problem: Problem, threads: int) -> tuple:
    """x [T, H], w1 [E, 2I, H], w2 [E, H, I] in the problem's dtype and the routings (ids int64, weights float32)."""
    return tokens(problem, threads), *weights(problem), routings(problem)


def tokens(problem: Problem, threads: int) -> torch.Tensor:
    if problem.packed:
        raise ValueError(f"dtype must be float32 or bfloat16, got {problem.dtype}")
    torch.set_num_threads(threads)
    return torch.from_numpy(problem.x()).to(getattr(torch, problem.dtype))


def routings(problem: Problem) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.from_numpy(ids).long(), torch.from_numpy(weights)) for ids, weights in problem.routings()]


def training(forward: Callable, x: torch.Tensor, parameters: tuple, routings: list) -> Callable:
    """call(turn): forward(x, ids, shares) and the gradients of x, the shares and the parameters (w1, w2).

    Gives of them what Problem.gradients says.
    """
    dy = torch.ones_like(x)

    def call(turn):
        ids, weights = routings[turn]
        rows, shares = (tensor.detach().requires_grad_() for tensor in (x, weights.to(x.dtype)))
        leaves = (rows, shares, *parameters)
        dx, _, dw1, dw2 = torch.autograd.grad(forward(rows, ids, shares), leaves, dy)
        H = x.shape[1]
        down = F.pad(dw2[:, 0, :H], (0, max(0, H - dw2.shape[2])))
        return torch.cat([dx, dw1[:, 0], dw1[:, -1], down]).float().numpy()

    return call


def made_weights(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(w).to(getattr(torch, problem.dtype)) for w in problem.weights())


weights = kept(made_weights)
