"""What can be learnt about routers from statistics and from traces of their choices, apart from training them."""

from moert.analysis.sparsity import chunk_level_sparsity, token_level_sparsity
from moert.analysis.trace import LayerTrace, RoutingRecorder, RoutingTrace, record_routings

__all__ = [
    "LayerTrace",
    "RoutingRecorder",
    "RoutingTrace",
    "chunk_level_sparsity",
    "record_routings",
    "token_level_sparsity",
]
