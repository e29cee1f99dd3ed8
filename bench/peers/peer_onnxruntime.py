"""onnxruntime's MoE operator in float32.

It makes its own softmax and top-k, so it is given logits that choose and weigh as the routing does.
"""

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from problem import Problem


def providers(problem: Problem, threads: int) -> dict:
    if problem.training:
        raise ValueError("training must be off: there is no backward")
    if problem.dtype != "float32":
        raise ValueError(f"dtype must be float32, got {problem.dtype}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    w1, w2 = problem.weights()
    # Gate and up rows take turns, which is the one layout in which the operator fuses SwiGLU.
    w1 = np.ascontiguousarray(w1.reshape(problem.E, 2, problem.I, problem.H).swapaxes(1, 2)).reshape(w1.shape)
    weights = {"w1": ort.OrtValue.ortvalue_from_numpy(w1), "w2": ort.OrtValue.ortvalue_from_numpy(w2)}
    options.add_external_initializers(list(weights), list(weights.values()))
    session = ort.InferenceSession(_model(problem, w1, w2), options, providers=["CPUExecutionProvider"])
    x, logits = problem.x(), [_logits(problem, *routing) for routing in problem.routings()]
    keep = (weights, session)

    def call(turn):
        return keep[1].run(None, {"x": x, "logits": logits[turn]})[0]

    return {"onnxruntime MoE": call}


def _logits(problem: Problem, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    logits = np.full((problem.T, problem.E), -1e4, dtype=np.float32)
    np.put_along_axis(logits, ids.astype(np.int64), np.log(weights), axis=1)
    return logits


def _model(problem: Problem, w1: np.ndarray, w2: np.ndarray) -> bytes:
    """x [T, H], logits [T, E] -> y [T, H]; the weights are initializers kept outside of the file."""
    moe = helper.make_node(
        "MoE", ["x", "logits", "w1", "", "w2", ""], ["y"], domain="com.microsoft",
        k=problem.k, activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        normalize_routing_weights=1,
    )  # fmt: skip

    def value(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    def outside(name, array):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
        return tensor

    T, H, E = problem.T, problem.H, problem.E
    weights = [outside("w1", w1), outside("w2", w2)]
    graph = helper.make_graph([moe], "moe", [value("x", T, H), value("logits", T, E)], [value("y", T, H)], weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
