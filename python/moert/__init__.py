"""moert: the Mixture-of-Experts runtime for PyTorch."""

from importlib import import_module
from importlib.util import find_spec

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("moert needs torch, got none: pip install 'torch>=2.11'", name="torch") from None

# find_spec, not __file__: in an editable install the library does not lie beside this file.
torch.ops.load_library(find_spec("moert._ops").origin)

from moert import cuda  # noqa: E402

_refusals = cuda.load()

from moert.experts import Experts, GluExperts, QuantizedExperts  # noqa: E402
from moert.info import info  # noqa: E402
from moert.numerics import batch_invariant, is_batch_invariant  # noqa: E402
from moert.ops import (  # noqa: E402
    expert_choice,
    experts_in_use,
    fused_experts,
    fused_experts_quantized,
    grouped_gemm,
    permute,
    permute_plan,
    plan_of,
    topk_gating,
    union_experts,
    unpermute,
)
from moert.routers import Router, RouterContext, TopKRouter  # noqa: E402
from moert.types import Activation, DispatchPlan, ExpertLayout, GroupLimit, Routing  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Activation",
    "DispatchPlan",
    "ExpertLayout",
    "Experts",
    "GluExperts",
    "GroupLimit",
    "MoELayer",
    "QuantizedExperts",
    "Router",
    "RouterContext",
    "Routing",
    "TopKRouter",
    "batch_invariant",
    "expert_choice",
    "experts_in_use",
    "fused_experts",
    "fused_experts_quantized",
    "grouped_gemm",
    "info",
    "is_batch_invariant",
    "permute",
    "permute_plan",
    "plan_of",
    "prepack_",
    "quantize_",
    "topk_gating",
    "union_experts",
    "unpermute",
    "unprepack_",
]

# Imported when they are asked for: `import moert` shall not cost much more than `import torch`.
_LATER = {
    "MoELayer": "moert.layers",
    "prepack_": "moert.runtime.prepack",
    "quantize_": "moert.quant.quantize",
    "unprepack_": "moert.runtime.prepack",
}
_PACKAGES = ("analysis", "decode", "layers", "parallel", "quant", "runtime", "train")


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name in _PACKAGES:
        return import_module(f"moert.{name}")
    raise AttributeError(f"module 'moert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
