"""Decoding rules for language models with transformers' interface (logits and a key-value cache)."""

from moert.decode.draft import ModelDraft, NGramDraft
from moert.decode.rewire import Rewired, rewire
from moert.decode.router_adapter import AdaptReport, RouterAdapter
from moert.decode.self_contrast import Contrast, contrast_logits, self_contrast
from moert.decode.speculative import Speculation, speculative

__all__ = [
    "AdaptReport",
    "Contrast",
    "ModelDraft",
    "NGramDraft",
    "Rewired",
    "RouterAdapter",
    "Speculation",
    "contrast_logits",
    "rewire",
    "self_contrast",
    "speculative",
]
