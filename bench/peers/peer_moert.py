"""moert, with weights as they lie and prepacked, or packed in few bits; and the limits of the machine."""

import copy
from functools import partial

import numpy as np
import torch
from problem import PRODUCT_FLOP, PRODUCT_SIZE, READ_BYTES, Problem, kept
from torch_inputs import inputs, made_weights, routings, tokens, training, weights

import moert
from moert import _C, GluExperts
from moert.quant.quantize import any_format_of
from moert.runtime import huge_pages_


def providers(problem: Problem, threads: int) -> dict:
    torch.set_num_threads(threads)
    if problem.packed:
        return _over_packed(problem) | _beside(problem)
    if problem.training:
        return _training(problem, threads) | _beside(problem)
    x, experts, (prepacked, laid_out) = tokens(problem, threads), _experts(problem), _prepacked(problem)
    routed = [moert.Routing(ids, weights, problem.E) for ids, weights in routings(problem)]

    def call(experts, turn):
        with torch.inference_mode():
            return experts(x, routed[turn]).float().numpy()

    mine = {"moert": partial(call, experts)} | ({"moert prepacked": partial(call, prepacked)} if laid_out else {})
    return mine | _beside(problem)


def weight_bytes(problem: Problem) -> int:
    """Of all experts as they are stored, scales included."""
    if problem.packed:
        return sum(w.nbytes for w in _packed(problem))
    return sum(w.nbytes for w in (weights(problem) if problem.training else _experts(problem).parameters()))


def _training(problem: Problem, threads: int) -> dict:
    x, w1, w2, routed = inputs(problem, threads)
    w1, w2 = (w.detach().requires_grad_() for w in (w1, w2))

    def step(x, ids, weights):
        return moert.fused_experts(x, moert.Routing(ids, weights, problem.E), w1, w2)

    return {"moert": training(step, x, (w1, w2), routed)}


def _over_packed(problem: Problem) -> dict:
    if problem.training:
        raise ValueError("training must be off: packed weights have no gradients")
    x, (w1, w2) = torch.from_numpy(problem.x()), _packed(problem)
    routed = [moert.Routing(ids, weights, problem.E) for ids, weights in routings(problem)]

    def call(precision, turn):
        with torch.inference_mode():
            return moert.fused_experts_quantized(x, routed[turn], w1, w2, precision=precision).numpy()

    # Faster where rows are many, and less exact than the default.
    int8_rows = {"int8": "int8"} | dict.fromkeys(("int4:32", "int4:128", "mxfp4"), "int8_weights")
    faster = {"moert int8 rows": partial(call, int8_rows[problem.dtype])} if problem.dtype in int8_rows else {}
    return {"moert": partial(call, "auto")} | faster


def limits(threads: int) -> dict:
    """What the machine is measured by; products in bfloat16 and int8 where the CPU has them (or they take seconds)."""
    torch.set_num_threads(threads)
    stream = torch.ones(READ_BYTES // 4)
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE)
    found = {"read": lambda turn: stream.sum(), "product": lambda turn: a @ b}
    if hasattr(_C, "multiply_floats"):  # older revisions, which --base times, have neither
        found["FMA peak"] = lambda turn: _C.multiply_floats(PRODUCT_FLOP, threads)
        found["int8 peak"] = lambda turn: _C.multiply_bytes(PRODUCT_FLOP, threads)
    if _C.cpu_features().get("avx512bf16") or _C.cpu_features().get("amx_bf16"):
        e, f = a.bfloat16(), b.bfloat16()
        found["bfloat16 product"] = lambda turn: e @ f
    if _C.cpu_features().get("avx512vnni"):
        c, d = torch.randint(-127, 128, (2, PRODUCT_SIZE, PRODUCT_SIZE), dtype=torch.int8)
        found["int8 product"] = lambda turn: torch._int_mm(c, d)
    return found


def _beside(problem: Problem) -> dict:
    """The limits that hold for rows of this problem."""
    wanted = ("read", "product", *problem.products)
    return {name: call for name, call in limits(torch.get_num_threads()).items() if name in wanted}


@kept
def _packed(problem: Problem) -> list:
    """An expert at a time, so that no more than one is there in float32."""
    fmt = any_format_of(*problem.format)
    return [fmt.pack_each((torch.from_numpy(np.array(w)) for w in view), view.shape) for view in problem.windows()]


@kept
def _experts(problem: Problem) -> GluExperts:
    """In large pages, as moert's own modules are made and huge_pages_ leaves others."""
    experts = GluExperts(problem.E, problem.H, problem.I, device="meta")
    experts.gate_up_proj, experts.down_proj = map(torch.nn.Parameter, made_weights(problem))
    huge_pages_(experts)
    return experts


@kept
def _prepacked(problem: Problem) -> tuple[GluExperts, list[str]]:
    laid_out = moert.prepack_(experts := copy.deepcopy(_experts(problem)))
    huge_pages_(experts)
    return experts, laid_out
