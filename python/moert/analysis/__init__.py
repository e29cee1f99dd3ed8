"""What can be learnt about routers from statistics, apart from training them."""

"""What routings look like: measures, nothing that trains."""

from moert.analysis.sparsity import chunk_level_sparsity, token_level_sparsity

__all__ = [
    "chunk_level_sparsity",
    "token_level_sparsity",
]
