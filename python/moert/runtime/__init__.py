"""Where things live at decode: keys and values."""

from moert.runtime.skippable_kv import RecursiveKV, SkippableKV

__all__ = ["RecursiveKV", "SkippableKV"]
