"""What can be learnt about routers from statistics, apart from training them."""

from moert.analysis.sparsity import chunk_level_sparsity, token_level_sparsity

__all__ = ["chunk_level_sparsity", "token_level_sparsity"]
