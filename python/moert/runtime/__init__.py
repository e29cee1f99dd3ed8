"""Where things live at decode: keys and values, and sequences at different depths of one model."""

from moert.runtime.depth_batcher import DepthBatcher
from moert.runtime.skippable_kv import ModelKV, RecursiveKV, SkippableKV

__all__ = ["DepthBatcher", "ModelKV", "RecursiveKV", "SkippableKV"]
