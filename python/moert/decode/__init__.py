"""Decoding rules for language models with transformers' interface (logits and past_key_values)."""

from moert.decode.draft import ModelDraft, NGramDraft
from moert.decode.speculative import Speculation, speculative

__all__ = ["ModelDraft", "NGramDraft", "Speculation", "speculative"]
