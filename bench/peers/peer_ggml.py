"""llama.cpp's ggml: the nodes of its MoE layer, over weights as they lie and laid out anew ("repacked") by its CPU."""

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from ggml_library import TYPES, Graph, Library, Tensors
from problem import Problem, kept

FOUR = ("Q4_0", "Q4_K", "MXFP4")
KINDS = {
    "float32": ("F32",), "bfloat16": ("BF16",), "int8": ("Q8_0",), "int4": FOUR, "mxfp4": FOUR,
    "ternary2": ("TQ1_0", "TQ2_0"), "ternary5": ("TQ1_0", "TQ2_0"), "bit_nested": ("Q4_0",),
}  # fmt: skip
library = functools.cache(Library)


def providers(problem: Problem, threads: int) -> dict:
    if problem.training:
        raise ValueError("training must be off: there is no backward")
    if problem.format[0] not in KINDS:
        raise ValueError(f"dtype must be one of {', '.join(KINDS)}, got {problem.dtype}")
    ggml = library(threads)
    H, k, T = problem.H, problem.k, problem.T
    shapes = {"x": ("F32", (H, 1, T)), "ids": ("I32", (k, T)), "shares": ("F32", (1, k, T))}
    inputs, x = Tensors(ggml, ggml.plain, shapes), problem.x()
    inputs.fill("x", x.ctypes.data, x.nbytes)
    routings = [tuple(map(np.ascontiguousarray, routing)) for routing in problem.routings()]
    found = {}
    for name, held in _weights(problem, threads).items():
        found[name] = held if isinstance(held, str) else _provider(ggml, problem, inputs, held, routings)
    return found


def _provider(ggml: Library, problem: Problem, inputs: Tensors, weights: Tensors, routings: list):
    graph = Graph(ggml, functools.partial(_layer, ggml, problem, inputs, weights))
    keep = (graph, inputs, weights)

    def call(turn):
        ids, shares = routings[turn]
        inputs.fill("ids", ids.ctypes.data, ids.nbytes)
        inputs.fill("shares", shares.ctypes.data, shares.nbytes)
        numbers = (ctypes.c_float * (problem.T * problem.H)).from_address(keep[0].run())
        return np.frombuffer(numbers, dtype=np.float32).reshape(problem.T, problem.H)

    return call


def _layer(ggml: Library, problem: Problem, inputs: Tensors, weights: Tensors, context: int) -> int:
    """y [T, H], of the nodes that llama.cpp makes: the sum over the choices is a chain of additions."""
    H, k, T = problem.H, problem.k, problem.T
    gate, up = (ggml.mul_mat_id(context, w, inputs.x, inputs.ids) for w in (weights.gate, weights.up))
    each = ggml.mul_mat_id(context, weights.down, ggml.swiglu_split(context, gate, up), inputs.ids)
    each = ggml.mul(context, each, inputs.shares)
    row = 4 * H
    y, *rest = [ggml.view_2d(context, each, H, T, k * row, choice * row) for choice in range(k)]
    for part in rest:
        y = ggml.add(context, y, part)
    return y if rest else ggml.cont(context, y)


@kept
def _weights(problem: Problem, threads: int) -> dict[str, Tensors | str]:
    """Of each provider, or why it has none."""
    ggml, found = library(threads), {}
    for kind in KINDS[problem.format[0]]:
        block = ggml.blck_size(TYPES[kind])
        if problem.H % block or problem.I % block:
            found[f"ggml {kind}"] = f"H and I must be multiples of {block}, got {problem.H} and {problem.I}"
            continue
        found[f"ggml {kind}"] = plain = _rounded(ggml, problem, kind, threads)
        if repacked := _repacked(ggml, problem, kind, plain):
            found[f"ggml {kind} repacked"] = repacked
    return found


def _shapes(problem: Problem, kind: str) -> dict:
    H, I, E = problem.H, problem.I, problem.E
    return {"gate": (kind, (H, I, E)), "up": (kind, (H, I, E)), "down": (kind, (I, H, E))}


def _rounded(ggml: Library, problem: Problem, kind: str, threads: int) -> Tensors:
    tensors = Tensors(ggml, ggml.plain, _shapes(problem, kind))
    w1, w2 = problem.windows()
    parts = {"gate": w1[:, : problem.I], "up": w1[:, problem.I :], "down": w2}

    def fill(part):
        name, e = part
        w, out = np.array(parts[name][e]), getattr(tensors, name)
        start = ggml.get_data(out) + e * (ggml.nbytes(out) // problem.E)
        ggml.quantize_chunk(TYPES[kind], w.ctypes.data, start, 0, *w.shape, None)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, [(name, e) for name in parts for e in range(problem.E)]))
    return tensors


def _repacked(ggml: Library, problem: Problem, kind: str, plain: Tensors) -> Tensors | None:
    """In the first of the CPU's own layouts that its mul_mat_id takes."""
    H, I, k = problem.H, problem.I, problem.k
    token = Tensors(ggml, ggml.plain, {"x": ("F32", (H, 1, 1)), "h": ("F32", (I, k, 1)), "ids": ("I32", (k, 1))})
    for buffer_type in ggml.other_buffer_types():
        tensors = Tensors(ggml, buffer_type, _shapes(problem, kind))
        if ggml.multiplies(tensors.gate, token.x, token.ids) and ggml.multiplies(tensors.down, token.h, token.ids):
            for name in _shapes(problem, kind):
                held = getattr(plain, name)
                tensors.fill(name, ggml.get_data(held), ggml.nbytes(held))
            return tensors
    return None
