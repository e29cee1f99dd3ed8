"""Where things live: weights in large pages or panels, freed memory, keys and values, sequences at different depths."""

from moert.runtime.depth_batcher import DepthBatcher
from moert.runtime.huge_pages import huge_pages_
from moert.runtime.kept_memory import keep_memory, release_memory
from moert.runtime.main_grad import add_to_main_grad_
from moert.runtime.prepack import prepack_, unprepack_
from moert.runtime.skippable_kv import ModelKV, RecursiveKV, SkippableKV

__all__ = [
    "DepthBatcher",
    "ModelKV",
    "RecursiveKV",
    "SkippableKV",
    "add_to_main_grad_",
    "huge_pages_",
    "keep_memory",
    "prepack_",
    "release_memory",
    "unprepack_",
]
