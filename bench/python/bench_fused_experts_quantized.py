import torch
from bench_fused_experts import loop

from case import Case
from moert.ops.fused_experts_quantized import fused_experts_quantized
from moert.quant import Int4
from moert.testing import Shape
from moert.types import Routing


def case(shape: Shape, dtype: torch.dtype) -> Case:
    """int4 in groups of 32, with int8 rows and with full ones, against a loop over the dequantized weights."""
    routing, fmt = shape.routing(), Int4(32)
    x = torch.randn(shape.T, shape.H).to(dtype)
    w1, w2 = (
        fmt.pack(torch.randn(shape.E, rows, columns).mul(columns**-0.5))
        for rows, columns in ((2 * shape.I, shape.H), (shape.H, shape.I))
    )
    first, second = fmt.unpack(w1).to(dtype), fmt.unpack(w2).to(dtype)

    def moert(precision):
        return lambda x, weights: fused_experts_quantized(
            x, Routing(routing.ids, weights, shape.E), w1, w2, precision=precision
        )

    providers = {
        "moert": moert("auto"),
        "moert_full": moert("full"),
        "torch": lambda x, weights: loop(x, routing.ids, weights, first, second),
    }
    used = len(routing.ids.unique()) / shape.E * (w1.nbytes + w2.nbytes)
    flop = 2 * shape.T * shape.k * 3 * shape.H * shape.I
    return Case((x, routing.weights), providers, flop, 2 * x.nbytes + used)
