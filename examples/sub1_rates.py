"""Bits a weight of QMoE's code on matrices of the sizes of Switch Transformers: rounded, and chosen by GPTQ.

    python examples/sub1_rates.py

Gaussian weights; the rows that they multiply have a quarter of their columns' rank, and noise.  Prints a table.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from moert.quant import GPTQ, SubOneBit, SubOneBitTensor
from moert.quant.gptq import gptq

SHAPES = ((768, 3072), (3072, 768))
PAPER = GPTQ(damp=0.1, act_order=False)  # the settings of arXiv 2310.16795


def rows(shape: tuple[int, int]) -> Iterator[str]:
    """The lines of the table for one shape."""
    torch.manual_seed(0)
    R, C = shape
    w = torch.randn(1, R, C)
    x = torch.randn(2 * C, C // 4) @ torch.randn(C // 4, C) + 0.3 * torch.randn(2 * C, C)
    hessian = (x.T @ x)[None]
    packed = {"rounded": SubOneBit().pack(w), "GPTQ": gptq(w, hessian, SubOneBit(), PAPER)}
    packed["GPTQ, act_order"] = gptq(w, hessian, SubOneBit(), GPTQ(damp=0.1))
    for name, each in packed.items():
        yield f"| {R} × {C} | {name} | {zeros(each):.1%} | {each.bits_per_weight:.3f} | {error(w, each, x):.3f} |"


def zeros(packed: SubOneBitTensor) -> float:
    return (SubOneBit().decode(packed) == 0).float().mean().item()


def error(w: Tensor, packed: SubOneBitTensor, x: Tensor) -> float:
    """Of the products with the rows, relative."""
    return (((w - SubOneBit().unpack(packed)) @ x.T).norm() / (w @ x.T).norm()).item()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("| matrix | codes | zeros | bits a weight | error of the products |")
    print("| --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        for line in rows(shape):
            print(line, flush=True)


if __name__ == "__main__":
    main()
