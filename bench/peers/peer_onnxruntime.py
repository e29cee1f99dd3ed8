"""onnxruntime's operators MoE, in float32, and QMoE, in blocks of 8 or 4 bits.

They make their own softmax and top-k, so they are given logits that choose and weigh as the routing does.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from problem import Problem, kept

# accuracy_level 0 keeps rows in float32, 4 rounds them to 8 bits; experts in 8 bits have the latter alone.
BITS = {"int8": (8, (4,)), "int4": (4, (4, 0)), "mxfp4": (4, (4, 0))}
TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}


def providers(problem: Problem, threads: int) -> dict:
    if problem.training:
        raise ValueError("training must be off: there is no backward")
    if problem.dtype != "float32" and problem.format[0] not in BITS:
        raise ValueError(f"dtype must be float32 or one of {', '.join(BITS)}, got {problem.dtype}")
    x, logits = problem.x(), [_logits(problem, *routing) for routing in problem.routings()]

    def provider(session):
        return lambda turn: session.run(None, {"x": x, "logits": logits[turn]})[0]

    return {name: provider(session) for name, (session, _) in _sessions(problem, threads).items()}


def _logits(problem: Problem, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    logits = np.full((problem.T, problem.E), -1e4, dtype=np.float32)
    np.put_along_axis(logits, ids.astype(np.int64), np.log(weights), axis=1)
    return logits


@kept
def _sessions(problem: Problem, threads: int) -> dict:
    """A session and the weights that it reads, of each provider."""
    w1, w2 = problem.windows()
    # Gate and up rows take turns, which is the one layout in which the operators fuse SwiGLU.
    w1 = w1.reshape(problem.E, 2, problem.I, problem.H).swapaxes(1, 2).reshape(problem.E, 2 * problem.I, problem.H)
    if problem.dtype == "float32":
        values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(w)) for w in (w1, w2)]
        return {"onnxruntime MoE": _session(problem, threads, "MoE", dict(zip(("w1", "w2"), values, strict=True)))}
    bits, levels = BITS[problem.format[0]]
    block = problem.format[1] or 32
    block = 32 if problem.H % block or problem.I % block else block
    parts = [part for w in (w1, w2) for part in _rounded(w, bits, block, threads)]
    values = dict(zip(("w1", "s1", "w2", "s2"), map(ort.OrtValue.ortvalue_from_numpy, parts), strict=True))
    return {
        f"onnxruntime QMoE int{bits}:{block} level {level}": _session(
            problem, threads, "QMoE", values, expert_weight_bits=bits, block_size=block, accuracy_level=level,
            weights_prepacked=0,
        ) for level in levels
    }  # fmt: skip


def _rounded(w: np.ndarray, bits: int, block: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [E, rows, bytes] around 2^(bits - 1) and scales [E, rows, blocks]; the largest of a block is code 0."""
    middle = 2 ** (bits - 1)

    def each(matrix):
        blocks = matrix.reshape(len(matrix), -1, block)
        extreme = np.where(blocks.max(2) > -blocks.min(2), blocks.max(2), blocks.min(2))
        scales = extreme / -np.float32(middle)
        codes = np.rint(blocks / np.where(scales, scales, 1)[:, :, None]) + middle
        codes = codes.clip(0, 2 * middle - 1).astype(np.uint8).reshape(matrix.shape)
        return codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4, scales

    with ThreadPoolExecutor(threads) as pool:
        codes, scales = zip(*pool.map(each, w), strict=True)
    return np.stack(codes), np.stack(scales)


def _session(problem: Problem, threads: int, operator: str, weights: dict, **attributes) -> tuple:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_external_initializers(list(weights), list(weights.values()))
    model = _model(problem, operator, weights, attributes)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]), weights


def _model(problem: Problem, operator: str, weights: dict, attributes: dict) -> bytes:
    """x [T, H], logits [T, E] -> y [T, H]; the weights are initializers kept outside of the file."""
    names = ["w1", "s1", "", "w2", "s2", ""] if "s1" in weights else ["w1", "", "w2", ""]
    moe = helper.make_node(
        operator, ["x", "logits", *names], ["y"], domain="com.microsoft", k=problem.k, activation_type="swiglu",
        swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0, normalize_routing_weights=1, **attributes,
    )  # fmt: skip

    def value(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    def outside(name, held):
        kind = TYPES[held.numpy().dtype.name]
        tensor = TensorProto(name=name, data_type=kind, dims=held.shape())
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
        return tensor

    H, E = problem.H, problem.E
    inputs, outputs = [value("x", "T", H), value("logits", "T", E)], [value("y", "T", H)]
    graph = helper.make_graph([moe], "moe", inputs, outputs, [outside(*item) for item in weights.items()])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
