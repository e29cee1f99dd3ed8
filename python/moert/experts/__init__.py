"""Experts: (x, routing) -> y."""

from moert.experts.base import Experts
from moert.experts.block import BlockExperts
from moert.experts.glu import GluExperts
from moert.experts.hetero import HeteroExperts
from moert.experts.quantized import QuantizedExperts
from moert.experts.split import split_ffn

__all__ = [
    "BlockExperts",
    "Experts",
    "GluExperts",
    "HeteroExperts",
    "QuantizedExperts",
    "split_ffn",
]
