"""Where things live: weights in large pages or in panels; keys and values, and sequences at different depths."""

from moert.runtime.depth_batcher import DepthBatcher
from moert.runtime.huge_pages import huge_pages_
from moert.runtime.prepack import prepack_, unprepack_
from moert.runtime.skippable_kv import ModelKV, RecursiveKV, SkippableKV

__all__ = ["DepthBatcher", "ModelKV", "RecursiveKV", "SkippableKV", "huge_pages_", "prepack_", "unprepack_"]
