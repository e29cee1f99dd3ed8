"""Bad calls: a valid call of each operator, one argument replaced, and the exact complaint."""

import pytest
import torch

from moert.ops.fused_experts import fused_experts
from moert.testing import random_routing
from moert.types import ExpertLayout, Routing

FLOAT = "Float, BFloat16, Half or Double"
T, E, k, H, I, S = 3, 4, 2, 6, 5, 6
IDS = torch.tensor([[0, 3], [1, 0], [2, -1]], dtype=torch.int32)
OFFSETS, TOKENS, SLOTS = torch.ops.moert.permute_plan(IDS, E)
RANKS, LOCAL_IDS = (torch.tensor(v, dtype=torch.int32) for v in ([1, 0, 0, 1], [0, 0, 1, 1]))
NOT_FLOAT = torch.zeros(T, H, dtype=torch.int64)


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


PLAN = {"tokens": TOKENS, "slots": SLOTS}
WHOLE_PLAN = {"offsets": OFFSETS, **PLAN}
ADDED = {"onto_rows": ones(T, H), "onto_scale": ones(T), "mix": ones(T, 2), "constants": ones(2, H)}
MAIN_GRADS = {
    "w1_main_grad": torch.zeros(E, 2 * I, H),
    "w2_main_grad": torch.zeros(E, H, I),
    "b1_main_grad": torch.zeros(E, 2 * I),
    "b2_main_grad": torch.zeros(E, H),
}
GEMM = {"x": ones(S, H), "w": ones(E, I, H), "offsets": OFFSETS, "bias": ones(E, I), "tokens": None, "scale": ones(S)}
EXPERTS = {
    "x": ones(T, H),
    "ids": IDS,
    "weights": ones(T, k),
    "w1": ones(E, 2 * I, H),
    "w2": ones(E, H, I),
    "b1": ones(E, 2 * I),
    "b2": ones(E, H),
    "activation": "swiglu",
    "alpha": 1.0,
    "limit": 1.0,
    "transposed": False,
    "interleaved": False,
    "scale_on": "output",
}
BYTES = {"dtype": torch.uint8}
QUANTIZED = {
    **{name: EXPERTS[name] for name in ("x", "ids", "weights")},
    "codes1": ones(E, 2 * I, 16, **BYTES),
    "scales1": ones(E, 2 * I, 1).half(),
    "zeros1": ones(E, 2 * I, 1, **BYTES),
    "codes2": ones(E, H, 16, **BYTES),
    "scales2": ones(E, H, 1, **BYTES),
    "zeros2": None,
    **{name: EXPERTS[name] for name in ("b1", "b2")},
    "format1": "int4_asymmetric",
    "group1": 32,
    "format2": "mxfp4",
    "group2": 32,
    **{name: EXPERTS[name] for name in ("activation", "alpha", "limit")},
    "precision": "auto",
    "scale_on": "output",
}
PACK = {
    "x": ones(T, H),
    "weights": ones(T, k),
    "ids": IDS,
    "expert_to_rank": RANKS,
    "local_ids": LOCAL_IDS,
    "offsets": ints(0, 2, 4),
    "tokens": ints(1, 2, 0, 1),
}
OF_RANKS, RECORDS = ints(0, 1, -1, 2, 3, -1).view(T, k), torch.zeros(2, 48, dtype=torch.uint8)  # slots; two records
GATING = {"score": "softmax", "renormalize": True, "scale": 1.0}
VALID = {
    "topk_gating": {
        "logits": ones(T, E),
        "k": k,
        "bias": ones(E),
        **GATING,
        "num_groups": 2,
        "topk_groups": 1,
        "group_score": "top2",
    },
    "topk_gating_backward": {"dweights": ones(T, k), "logits": ones(T, E), "ids": IDS, **GATING},
    "expert_choice": {
        "scores": ones(T, E),
        "segments": torch.zeros(T, dtype=torch.int64),
        "capacity": torch.ones(1, E, dtype=torch.int64),
        "max_choices": E,
        "max_slots": T * E,
    },
    "permute_plan": {"ids": IDS, "num_experts": E, "capacity": None},
    "permute": {"x": ones(T, H), **PLAN},
    "dispatch_plan": {"ids": IDS, "expert_to_rank": RANKS, "num_ranks": 2, "x": ones(T, H), "weights": ones(T, k)},
    "dispatch_pack": {**PACK, "payload": "none"},
    "dispatch_pack_": {"records": RECORDS, **PACK, "first": 1, "payload": "none"},
    "dispatch_unpack_": {"rows": ones(2, H), "records": RECORDS, "payload": "int8"},
    "dispatch_combine": {"rows": ones(2, H), "own": ones(2, H), "first": 1, "slots": OF_RANKS, "residual": ones(T, H)},
    "unpermute": {"rows": ones(S, H), **PLAN, "weights": ones(T, k), "residual": ones(T, H)},
    "unpermute_backward": {"dy": ones(T, H), "rows": ones(S, H), **PLAN, "weights": ones(T, k)},
    "grouped_gemm": {**GEMM, "scale_on": "output", "transposed": False},
    "grouped_gemm_wgrad": {
        "dy": ones(S, I),
        "x": ones(S, H),
        "offsets": OFFSETS,
        "tokens": None,
        "transposed": False,
    },
    "fused_experts": {**EXPERTS, "save": False, **WHOLE_PLAN, **ADDED, **MAIN_GRADS},
    "union_experts": {
        **{name: value for name, value in EXPERTS.items() if name not in ("weights", "scale_on")},
        "ids": ints(3, 0, 4),
        "gains": ones(T, E),
    },
    "fused_experts_backward": {"dy": ones(T, H), **EXPERTS, "h": ones(S, 2 * I), "needs": 63, **WHOLE_PLAN},
    "fused_experts_backward_": {
        "dy": ones(T, H),
        **EXPERTS,
        "h": ones(S, 2 * I),
        **MAIN_GRADS,
        "needs": 63,
        **WHOLE_PLAN,
    },
    "fused_experts_quantized": QUANTIZED,
    "fused_experts_quantized_backward": {
        "dy": ones(T, H),
        **{name: value for name, value in QUANTIZED.items() if name != "precision"},
        "needs": 3,
    },
}
BAD = {
    "dispatch_plan": [
        ("ids", IDS[0], r"ids must be \[T, k\], got shape \[2\]"),
        ("ids", IDS.float(), "ids must have an integer dtype, got Float"),
        ("expert_to_rank", RANKS[None], r"expert_to_rank must be \[E\] with E > 0, got shape \[1, 4\]"),
        ("expert_to_rank", RANKS[:0], r"expert_to_rank must be \[E\] with E > 0, got shape \[0\]"),
        ("expert_to_rank", RANKS.long(), "expert_to_rank must have dtype Int, got Long"),
        ("expert_to_rank", RANKS + 1, r"expert_to_rank must hold a rank in \[0, R=2\), got 2"),
        ("expert_to_rank", RANKS - 1, r"expert_to_rank must hold a rank in \[0, R=2\), got -1"),
        ("num_ranks", 0, r"num_ranks must be in \[1, 2\^31 - 2\], got 0"),
        ("x", None, "weights must come with x, got one of them"),
        ("x", ones(T + 1, H), r"ids must have shape \[T=4, k\], got \[3, 2\]"),
        ("weights", ones(T, k).half(), "weights must have dtype Float or that of x, got Half"),
    ],
    "dispatch_pack_": [
        ("records", RECORDS.char(), "records must have dtype Byte, got Char"),
        ("records", RECORDS[:, :32], r"records must be contiguous \[n, 48\], got shape \[2, 32\]"),
        ("records", RECORDS.mT.contiguous().mT, r"records must be contiguous \[n, 48\], got shape \[2, 48\]"),
        ("first", -1, r"first must be in \[0, N - n=2\], got -1"),
        ("first", 3, r"first must be in \[0, N - n=2\], got 3"),
        ("payload", "int4", "payload must be none, int8 or float8_e4m3, got int4"),
        ("tokens", ints(1, 2, 0, 3), r"tokens must hold a token in \[0, T=3\), got 3"),
    ],
    "dispatch_unpack_": [
        ("rows", NOT_FLOAT, f"rows must have dtype {FLOAT}, got Long"),
        ("rows", ones(H), r"rows must be \[M, H\], got shape \[6\]"),
        ("rows", ones(2, H).double(), "rows must have dtype Float, BFloat16 or Half, got Double"),
        ("rows", ones(H, 2).mT, "rows must be contiguous, got strides of another layout"),
        ("records", RECORDS[:, :11], r"records must be \[M=2, at least 12 bytes\], got shape \[2, 11\]"),
        ("records", RECORDS[:1], r"records must be \[M=2, at least 12 bytes\], got shape \[1, 48\]"),
        ("records", RECORDS.char(), "records must have dtype Byte, got Char"),
        ("payload", "none", "payload must be int8 or float8_e4m3, got none"),
    ],
    "dispatch_combine": [
        ("rows", ones(H), r"rows must be \[N - n, H\], got shape \[6\]"),
        ("rows", NOT_FLOAT, f"rows must have dtype {FLOAT}, got Long"),
        ("own", ones(2, H).half(), "own must have the dtype of rows, Float, got Half"),
        ("own", ones(2, H + 1), r"own must be \[n, H=6\], got shape \[2, 7\]"),
        ("first", 3, r"first must be in \[0, N - n=2\], got 3"),
        ("slots", ints(0, 1), r"slots must be \[T, k\], got shape \[2\]"),
        ("slots", ints(0, 4, 1).view(3, 1), r"slots must hold -1 or be in \[0, S=4\), got 4"),
        ("slots", ints(0, 1).view(1, 2).long(), "slots must have dtype Int, got Long"),
        ("residual", ones(T, H + 1), r"residual must have shape \[T=3, H=6\], got \[3, 7\]"),
        ("residual", ones(T, H).half(), "residual must have the dtype of rows, Float, got Half"),
    ],
    "dispatch_pack": [
        ("x", ones(H), r"x must be \[T, H\], got shape \[6\]"),
        ("x", NOT_FLOAT, f"x must have dtype {FLOAT}, got Long"),
        ("weights", ones(T, k + 1), r"weights must have the shape of ids, \[3, 2\], got \[3, 3\]"),
        ("weights", ones(T, k).half(), "weights must have dtype Float or that of x, got Half"),
        ("ids", IDS[1:], r"ids must have shape \[T=3, k\], got \[2, 2\]"),
        ("local_ids", LOCAL_IDS[1:], r"local_ids must have shape \[E=4\], got \[3\]"),
        ("local_ids", LOCAL_IDS - 1, r"local_ids must hold an id in \[0, 32768\), got -1"),
        ("offsets", ints(0, 2, 3), "offsets must be from 0 to N=4, got 0 to 3"),
        ("offsets", ints(0, 5, 4), "offsets must be in rising order, got 5 before 4"),
        ("offsets", ints(0, 2, 4).long(), "offsets must have dtype Int, got Long"),
        ("offsets", ints(0, 2, 4)[None], r"offsets must be \[R\+1\], got shape \[1, 3\]"),
        ("tokens", ints(1, 2, 0, 3), r"tokens must hold a token in \[0, T=3\), got 3"),
        ("tokens", ints(1, 2, 0, 1).long(), "tokens must have dtype Int, got Long"),
        ("tokens", ints(1, 2, 0, 1)[None], r"tokens must be \[N\], got shape \[1, 4\]"),
    ],
    "topk_gating": [
        ("logits", ones(E), r"logits must be \[T, E\], got shape \[4\]"),
        ("logits", ones(T, E).int(), f"logits must have dtype {FLOAT}, got Int"),
        ("k", 5, r"k must be in \[0, E=4\], got 5"),
        ("k", -1, r"k must be in \[0, E=4\], got -1"),
        ("k", 3, "k must be at most the 2 experts of 1 groups, got 3"),
        ("score", "tanh", "score must be softmax, softmax_over_topk, sigmoid, relu or identity, got tanh"),
        ("bias", ones(T), r"bias must have shape \[E=4\], got \[3\]"),
        ("bias", ones(E).double(), r"bias must have dtype Float \(or Double for Double logits\), got Double"),
        ("num_groups", 3, "num_groups must divide E=4, got 3"),
        ("num_groups", 0, "num_groups must divide E=4, got 0"),
        ("num_groups", 4, "num_groups must leave two experts to a group for group_score top2, got 4 for E=4"),
        ("topk_groups", 3, r"topk_groups must be in \[1, num_groups=2\], got 3"),
        ("group_score", "mean", "group_score must be top2 or max, got mean"),
    ],
    "topk_gating_backward": [
        ("dweights", ones(T, E), r"dweights must have shape \[T=3, k=2\], got \[3, 4\]"),
        ("dweights", ones(T, k).half(), "dweights must have dtype Float, got Half"),
        ("ids", IDS[1:], r"ids must have shape \[T=3, k\], got \[2, 2\]"),
        ("ids", IDS.long(), "ids must have dtype Int, got Long"),
        ("logits", ones(T, E, 1), r"logits must be \[T, E\], got shape \[3, 4, 1\]"),
    ],
    "expert_choice": [
        ("scores", ones(T), r"scores must be \[T, E\], got shape \[3\]"),
        ("scores", ones(T, E).long(), f"scores must have dtype {FLOAT}, got Long"),
        ("scores", ones(T, E) * float("nan"), "scores must be numbers, got NaN"),
        ("segments", ints(0, 0), r"segments must have shape \[T=3\], got \[2\]"),
        ("segments", ones(T), "segments must have an integer dtype, got Float"),
        ("capacity", ints(1, 1, 1, 1), r"capacity must have shape \[D, E=4\], got \[4\]"),
        ("capacity", ones(1, E), "capacity must have an integer dtype, got Float"),
        ("capacity", ints(1, 1, -1, 1)[None], "capacity must be at least 0, got -1"),
        ("max_choices", 5, r"max_choices must be in \[0, E=4\], got 5"),
        ("max_choices", -1, r"max_choices must be in \[0, E=4\], got -1"),
        ("max_choices", 2, "max_choices must be at least the 4 experts that took a token, got 2"),
        ("max_slots", 3, "max_slots must be at least the 4 choices of all experts, got 3"),
        ("max_slots", 2**31, r"max_slots must be in \[0, 2\^31\), got 2147483648"),
    ],
    "permute_plan": [
        ("ids", IDS[0], r"ids must be \[T, k\], got shape \[2\]"),
        ("ids", IDS[None], r"ids must be \[T, k\], got shape \[1, 3, 2\]"),
        ("ids", IDS.float(), "ids must have an integer dtype, got Float"),
        ("ids", IDS.bool(), "ids must have an integer dtype, got Bool"),
        ("ids", IDS.cfloat(), "ids must have an integer dtype, got ComplexFloat"),
        ("num_experts", 0, r"num_experts must be in \[1, 2\^31 - 2\], got 0"),
        ("num_experts", -(2**63), r"num_experts must be in \[1, 2\^31 - 2\], got -9223372036854775808"),
        ("num_experts", 2**31 - 1, r"num_experts must be in \[1, 2\^31 - 2\], got 2147483647"),
        ("capacity", -1, r"capacity must be in \[0, 2\^31 / num_experts\), got -1"),
        ("capacity", 2**29, r"capacity must be in \[0, 2\^31 / num_experts\), got 536870912"),
        ("num_experts", 2.5, "Expected a value of type 'int' for argument 'num_experts'"),
        ("num_experts", None, "Expected a value of type 'int' for argument 'num_experts'"),
    ],
    "permute": [
        ("x", ones(H), r"x must be \[T, H\], got shape \[6\]"),
        ("x", ones(T + 1, H), r"x must have shape \[T=3, H\], got \[4, 6\]"),
        ("x", NOT_FLOAT, f"x must have dtype {FLOAT}, got Long"),
        ("x", ones(T, H).cfloat(), f"x must have dtype {FLOAT}, got ComplexFloat"),
        ("tokens", TOKENS.long(), "tokens must have dtype Int, got Long"),
        ("tokens", TOKENS.view(T, k), r"tokens must be \[S\], got shape \[3, 2\]"),
        ("tokens", TOKENS + 1, r"tokens must hold -1 or be in \[0, T=3\), got 3"),
        ("tokens", TOKENS - 1, r"tokens must hold -1 or be in \[0, T=3\), got -2"),
        ("slots", SLOTS.flatten(), r"slots must be \[T, k\], got shape \[6\]"),
        ("slots", SLOTS.short(), "slots must have dtype Int, got Short"),
        ("x", [1.0], "Expected a value of type 'Tensor' for argument 'x'"),
    ],
    "unpermute": [
        ("rows", ones(S), r"rows must be \[S, H\], got shape \[6\]"),
        ("rows", ones(T, H), r"rows must have shape \[S=6, H\], got \[3, 6\]"),
        ("tokens", TOKENS[:-1], r"rows must have shape \[S=5, H\], got \[6, 6\]"),
        ("residual", ones(S, H), r"residual must have shape \[T=3, H=6\], got \[6, 6\]"),
        ("residual", ones(T, H).half(), "residual must have the dtype of rows, Float, got Half"),
        ("rows", ones(S, H).bool(), f"rows must have dtype {FLOAT}, got Bool"),
        ("slots", SLOTS + 2, r"slots must hold -1 or be in \[0, S=6\), got 6"),
        ("slots", SLOTS - 1, r"slots must hold -1 or be in \[0, S=6\), got -2"),
        ("weights", ones(k, T), r"weights must have shape \[T=3, k=2\], got \[2, 3\]"),
        ("weights", ones(T, k, dtype=torch.float64), "weights must have dtype Float or that of rows, got Double"),
        ("weights", ones(T, k, dtype=torch.int32), "weights must have dtype Float or that of rows, got Int"),
    ],
    "unpermute_backward": [
        ("dy", ones(T, H + 1), r"dy must have shape \[T=3, H=6\], got \[3, 7\]"),
        ("dy", ones(T, H).half(), "dy must have the dtype of rows, Float, got Half"),
        ("rows", ones(S, H, 1), r"rows must be \[S, H\], got shape \[6, 6, 1\]"),
        ("tokens", TOKENS + 2**30, r"tokens must hold -1 or be in \[0, T=3\), got 10737"),
        ("slots", SLOTS + 2**30, r"slots must hold -1 or be in \[0, S=6\), got 10737"),
        ("weights", ones(T), r"weights must have shape \[T=3, k=2\], got \[3\]"),
    ],
    "grouped_gemm": [
        ("x", ones(S), r"x must be \[S, K\], got shape \[6\]"),
        ("x", ones(S, H).int(), f"x must have dtype {FLOAT}, got Int"),
        ("x", ones(S, H + 1), r"w must have shape \[E, N, K=7\], got \[4, 5, 6\]"),
        ("x", ones(S - 2, H), r"offsets must end at or below S=4, got 5"),
        ("w", ones(I, H), r"w must be \[E, N, K\], got shape \[5, 6\]"),
        ("w", ones(E, I, H).half(), "w must have the dtype of x, Float, got Half"),
        ("transposed", True, r"w must have shape \[E, K=6, N\], got \[4, 5, 6\]"),
        ("offsets", OFFSETS[None], r"offsets must be \[E\+1\], got shape \[1, 5\]"),
        ("offsets", OFFSETS.long(), "offsets must have dtype Int, got Long"),
        ("offsets", OFFSETS[:1], r"offsets must have shape \[E\+1\] with E >= 1, got \[1\]"),
        ("offsets", OFFSETS[:-1], r"offsets must have shape \[E\+1=5\], got \[4\]"),
        ("offsets", OFFSETS + 1, "offsets must ascend from 0, got other values"),
        ("offsets", ints(0, 3, 2, 4, 5), "offsets must ascend from 0, got other values"),
        ("offsets", ints(0, 1, 2, 3, 2**31 - 1), "offsets must end at or below S=6, got 2147483647"),
        ("bias", ones(E), r"bias must have shape \[E=4, N=5\], got \[4\]"),
        ("bias", ones(E, I).double(), "bias must have the dtype of x, Float, got Double"),
        ("tokens", ints(0, 1, 2, 3, 6, -1), r"tokens must be in \[0, T=6\) for every slot in use, got 6"),
        ("tokens", ints(-1, 1, 2, 3, 4, -1), r"tokens must be in \[0, T=6\) for every slot in use, got -1"),
        ("tokens", TOKENS.long(), "tokens must have dtype Int, got Long"),
        ("tokens", SLOTS, r"tokens must be \[S\], got shape \[3, 2\]"),
        ("scale", ones(S, 1), r"scale must have shape \[S=6\], got \[6, 1\]"),
        ("scale", ones(S).half(), "scale must have dtype Float or that of x, got Half"),
        ("scale_on", "both", "scale_on must be output or input, got both"),
    ],
    "grouped_gemm_wgrad": [
        ("dy", ones(S), r"dy must be \[S, N\], got shape \[6\]"),
        ("dy", ones(S, I).int(), f"dy must have dtype {FLOAT}, got Int"),
        ("x", ones(H), r"x must be \[S, K\], got shape \[6\]"),
        ("x", ones(S - 1, H), r"x must have shape \[S=6, K\], got \[5, 6\]"),
        ("x", ones(S, H).double(), "x must have the dtype of dy, Float, got Double"),
        ("offsets", OFFSETS * 2, "offsets must end at or below S=6, got 10"),
        ("tokens", TOKENS[1:], r"tokens must have shape \[S=6\], got \[5\]"),
        ("tokens", TOKENS + 6, r"tokens must be in \[0, T=6\) for every slot in use, got"),
    ],
    "fused_experts": [
        ("x", ones(H), r"x must be \[T, H\], got shape \[6\]"),
        ("x", NOT_FLOAT, f"x must have dtype {FLOAT}, got Long"),
        ("x", ones(T, H).bfloat16(), "w1 must have the dtype of x, BFloat16, got Float"),
        ("x", ones(T, H + 1), r"w1 must have shape \[E, 2I, H=7\], got \[4, 10, 6\]"),
        ("ids", IDS.flatten(), r"ids must be \[T, k\], got shape \[6\]"),
        ("ids", IDS[1:], r"ids must have shape \[T=3, k\], got \[2, 2\]"),
        ("ids", IDS.float(), "ids must have an integer dtype, got Float"),
        ("weights", ones(T), r"weights must be \[T, k\], got shape \[3\]"),
        ("weights", ones(T, k + 1), r"weights must have the shape of ids, \[3, 2\], got \[3, 3\]"),
        ("weights", ones(T, k).half(), "weights must have dtype Float or that of x, got Half"),
        ("w1", ones(2 * I, H), r"w1 must be \[E, 2I, H\], got shape \[10, 6\]"),
        ("w1", ones(E, 9, H), r"w1 must have an even 2I for the gated activation swiglu, got \[4, 9, 6\]"),
        ("w1", ones(0, 2 * I, H), r"w2 must have shape \[E=0, H=6, I=5\], got \[4, 6, 5\]"),
        ("w2", ones(E, H), r"w2 must be \[E, H, I\], got shape \[4, 6\]"),
        ("w2", ones(E, I, H), r"w2 must have shape \[E=4, H=6, I=5\], got \[4, 5, 6\]"),
        ("w2", ones(E, H, I).half(), "w2 must have the dtype of x, Float, got Half"),
        ("b1", ones(E, I), r"b1 must have shape \[E=4, 2I=10\], got \[4, 5\]"),
        ("b2", ones(H), r"b2 must have shape \[E=4, H=6\], got \[6\]"),
        ("b2", ones(E, H).half(), "b2 must have the dtype of x, Float, got Half"),
        ("activation", "swish", "activation must be one of identity, silu, .*, got swish"),
        ("activation", "silu", r"w2 must have shape \[E=4, H=6, I=10\], got \[4, 6, 5\]"),
        ("transposed", True, r"w1 must have shape \[E, H=6, 2I\], got \[4, 10, 6\]"),
        ("scale_on", "", "scale_on must be output or input, got "),
        ("offsets", None, "offsets, tokens and slots must be given together, got some of them"),
        ("offsets", OFFSETS[1:], r"offsets must have shape \[E \+ 1=5\], got \[4\]"),
        ("offsets", OFFSETS.long(), "offsets must have dtype Int, got Long"),
        ("offsets", OFFSETS * 2, "offsets must ascend from 0 to at most S=6, got others"),
        ("offsets", OFFSETS.flip(0), "offsets must ascend from 0 to at most S=6, got others"),
        ("tokens", TOKENS[None], r"tokens must be \[S\], got shape \[1, 6\]"),
        ("tokens", TOKENS.long(), "tokens must have dtype Int, got Long"),
        ("tokens", TOKENS[:1].expand(2**31), r"tokens must have fewer than 2\^31 elements, got shape \[2147483648\]"),
        ("tokens", TOKENS + 1, r"slots must be those of the plan of ids \(permute_plan\), got others"),
        ("slots", SLOTS[1:], r"slots must have shape \[T=3, k=2\], got \[2, 2\]"),
        ("slots", SLOTS.float(), "slots must have dtype Int, got Float"),
        ("slots", SLOTS.flip(0), r"slots must be those of the plan of ids \(permute_plan\), got others"),
        ("onto_rows", ones(T, H).half(), "onto_rows must have the dtype of x, Float, got Half"),
        ("onto_rows", ones(T, k), r"onto_rows must have shape \[T=3, H=6\], got \[3, 2\]"),
        ("onto_rows", None, r"onto_scale must have shape \[T=3\], and onto_rows be given, got \[3\]"),
        ("onto_scale", ones(T, 1), r"onto_scale must have shape \[T=3\], and onto_rows be given, got \[3, 1\]"),
        ("onto_scale", ones(T).half(), "onto_scale must have dtype Float or that of x, got Half"),
        ("mix", None, "mix and constants must be given together, got one of them"),
        ("mix", ones(T, 3), r"mix must have shape \[T=3, C=2\], got \[3, 3\]"),
        ("mix", ones(T, 2).double(), "mix must have dtype Float or that of x, got Double"),
        ("constants", ones(2, I), r"constants must have shape \[C, H=6\], got \[2, 5\]"),
        ("constants", ones(2, H).bfloat16(), "constants must have the dtype of x, Float, got BFloat16"),
        ("ids", IDS.flip(0), r"slots must be those of the plan of ids \(permute_plan\), got others"),
        ("w1_main_grad", ones(E, 2 * I, H).half(), "w1_main_grad must have dtype Float, got Half"),
        ("b1", None, "b1_main_grad must be None where b1 is, got a tensor"),
    ],
    "union_experts": [
        ("x", ones(H), r"x must be \[T, H\], got shape \[6\]"),
        ("gains", ones(E, T), r"gains must have shape \[T=3, E=4\], got \[4, 3\]"),
        ("gains", ones(T, E).half(), "gains must have dtype Float or that of x, got Half"),
        ("ids", IDS, r"ids must be \[n\], got shape \[3, 2\]"),
        ("ids", ones(3), "ids must have an integer dtype, got Float"),
        ("w2", ones(E, I, H), r"w2 must have shape \[E=4, H=6, I=5\], got \[4, 5, 6\]"),
        ("b1", ones(E, I), r"b1 must have shape \[E=4, 2I=10\], got \[4, 5\]"),
        ("activation", "swish", "activation must be one of identity, silu, .*, got swish"),
    ],
    "fused_experts_backward": [
        ("dy", ones(T, H + 1), r"dy must have shape \[T=3, H=6\], got \[3, 7\]"),
        ("dy", ones(T, H).double(), "dy must have the dtype of x, Float, got Double"),
        ("h", ones(S, I), r"h must be what fused_experts returned, \[S=6, 2I\] or \[0, 2I\], got \[6, 5\]"),
        ("h", ones(S, 2 * I).half(), "h must have the dtype of x, Float, got Half"),
    ],
    "fused_experts_backward_": [
        ("dy", ones(T, H + 1), r"dy must have shape \[T=3, H=6\], got \[3, 7\]"),
        ("w1_main_grad", ones(E, H, 2 * I), r"w1_main_grad must have the shape of w1, \[4, 10, 6\], got \[4, 6, 10\]"),
        ("w2_main_grad", ones(E, I, H).mT, "w2_main_grad must be contiguous, got other strides"),
        ("b1_main_grad", ones(E, 2 * I).double(), "b1_main_grad must have dtype Float, got Double"),
        ("b2", None, "b2_main_grad must be None where b2 is, got a tensor"),
    ],
    "fused_experts_quantized": [
        ("x", ones(H), r"x must be \[T, H\], got shape \[6\]"),
        ("x", NOT_FLOAT, f"x must have dtype {FLOAT}, got Long"),
        (
            "x",
            ones(T, 40),
            r"codes1 must have shape \[E=4, rows=10, bytes=32\] for 40 columns of int4_asymmetric, got \[4",
        ),
        ("ids", IDS[1:], r"ids must have shape \[T=3, k\], got \[2, 2\]"),
        ("weights", ones(T), r"weights must be \[T, k\], got shape \[3\]"),
        ("weights", ones(T, k + 1), r"weights must have the shape of ids, \[3, 2\], got \[3, 3\]"),
        ("weights", ones(T, k).half(), "weights must have dtype Float or that of x, got Half"),
        ("codes1", ones(2 * I, 16, **BYTES), r"codes1 must be \[E, rows, bytes\], got shape \[10, 16\]"),
        (
            "codes1",
            ones(E, 2 * I, 17, **BYTES),
            r"codes1 must have shape \[E=4, rows=10, bytes=16\] for 6 columns of int4",
        ),
        ("codes1", ones(E, 2 * I, 16), "codes1 must have dtype Byte for 6 columns of int4_asymmetric, got Float"),
        ("scales1", ones(E, 2 * I, 1), "scales1 must have dtype Half for 6 columns of int4_asymmetric, got Float"),
        (
            "scales1",
            ones(E, I, 1).half(),
            r"scales1 must have shape \[E=4, rows=10, groups=1\] for 6 columns of .*, got \[4, 5",
        ),
        ("scales2", ones(E, H, 1).half(), "scales2 must have dtype Byte for 5 columns of mxfp4, got Half"),
        ("zeros1", None, "zeros1 must be a tensor for int4_asymmetric, got None"),
        ("zeros1", ones(E, 2 * I, 1), "zeros1 must have dtype Byte for 6 columns of int4_asymmetric, got Float"),
        ("zeros2", ones(E, H, 1, **BYTES), "zeros2 must be None for mxfp4, got a tensor"),
        (
            "codes2",
            ones(E, H + 1, 16, **BYTES),
            r"scales2 must have shape \[E=4, rows=7, groups=1\] for 5 columns of mxfp4",
        ),
        ("format1", "int3", "format1 must be one of int8, .*, sub1, got int3"),
        ("group1", 16, "group must be 32, 64 or 128 for int4_asymmetric, got 16"),
        ("group2", 64, "group must be 32 for mxfp4, got 64"),
        ("b1", ones(E, I), r"b1 must have shape \[E=4, 2I=10\], got \[4, 5\]"),
        ("b2", ones(E, H).half(), "b2 must have the dtype of x, Float, got Half"),
        ("activation", "swish", "activation must be one of identity, silu, .*, got swish"),
        ("precision", "", "precision must be one of auto, full, .*, int8_weights, int8_group160, got "),
        ("scale_on", "", "scale_on must be output or input, got "),
    ],
    "fused_experts_quantized_backward": [
        ("dy", ones(T, H + 1), r"dy must have shape \[T=3, H=6\], got \[3, 7\]"),
        ("dy", ones(T, H).double(), "dy must have the dtype of x, Float, got Double"),
    ],
}


def call(op, **replaced):
    return getattr(torch.ops.moert, op)(**{**VALID[op], **replaced})


@pytest.mark.parametrize("op", VALID)
def test_the_calls_that_are_spoilt_are_valid(op):
    out = call(op)
    out = (out,) if torch.is_tensor(out) else out or ()  # nothing of one that writes an argument
    assert all(t.isfinite().all() for t in out)


@pytest.mark.parametrize(
    "op,argument,value,message", [(op, *row) for op, rows in BAD.items() for row in rows], ids=lambda v: str(v)[:24]
)
def test_bad_call(op, argument, value, message):
    with pytest.raises(RuntimeError, match=message):
        call(op, **{argument: value})


def test_the_table_is_long_enough():
    assert sum(map(len, BAD.values())) >= 80


@pytest.mark.parametrize("op", VALID)
def test_one_device(op):
    tensors = {name: value for name, value in VALID[op].items() if torch.is_tensor(value)}
    for name, value in tensors.items():
        if len(tensors) > 1:
            with pytest.raises(RuntimeError, match=r"^\w+ must be on .*(cpu, got meta|meta, got cpu)$"):
                call(op, **{name: value.to("meta")})


@pytest.mark.parametrize("op", VALID)
def test_a_tensor_elsewhere_reaches_no_kernel(op):
    operator, cpu = getattr(torch.ops.moert, op).default, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for argument in operator._schema.arguments:
        value = VALID[op].get(argument.name)
        if torch.is_tensor(value):
            elsewhere = {**VALID[op], argument.name: value.to("meta")}
            with pytest.raises(RuntimeError, match=f"{argument.name} must be on the CPU like .*, got another device"):
                operator.redispatch(cpu, **elsewhere)


@pytest.mark.parametrize("layout", ("sparse", "quantized"))
def test_tensors_without_strides_are_refused(layout):
    x = ones(T, H)
    odd = x.to_sparse() if layout == "sparse" else torch.quantize_per_tensor(x, 1.0, 0, torch.qint8)
    for op, name in (("permute", "x"), ("unpermute", "weights"), ("grouped_gemm", "x"), ("fused_experts", "x")):
        with pytest.raises((NotImplementedError, RuntimeError), match="moert::|must have dtype|strides"):
            call(op, **{name: odd})


def test_python_arguments():
    x, routing, w1, w2 = ones(T, H), random_routing(T, E, k), ones(E, 2 * I, H), ones(E, H, I)
    with pytest.raises(ValueError, match="w1 must have E=routing.num_experts=5 experts, got 4"):
        fused_experts(x, Routing(routing.ids, routing.weights, 5), w1, w2)
    with pytest.raises(RuntimeError, match=r"w1 must have shape \[E, H=6, 2I\], got \[4, 10, 6\]"):
        fused_experts(x, routing, w1, w2, layout=ExpertLayout(transposed=True))
    with pytest.raises(ValueError, match="kind must be one of uniform, .*, got skewed"):
        random_routing(T, E, k, "skewed")
