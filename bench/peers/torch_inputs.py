"""A problem as torch tensors."""

import functools
from dataclasses import replace

import torch
from problem import Problem


def inputs(problem: Problem, threads: int) -> tuple:
    """x [T, H], w1 [E, 2I, H], w2 [E, H, I] in the problem's dtype and the routings (ids int64, weights float32)."""
    torch.set_num_threads(threads)
    x = torch.from_numpy(problem.x()).to(getattr(torch, problem.dtype))
    routings = [(torch.from_numpy(ids).long(), torch.from_numpy(weights)) for ids, weights in problem.routings()]
    return x, *weights(replace(problem, T=0, routing="uniform")), routings


@functools.lru_cache(maxsize=1)  # problems that differ in their tokens alone follow each other
def weights(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(w).to(getattr(torch, problem.dtype)) for w in problem.weights())
