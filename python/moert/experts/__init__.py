"""Experts: (x, routing) -> y."""

from moert.experts.base import Experts
from moert.experts.block import BlockExperts
from moert.experts.glu import GluExperts
from moert.experts.hetero import HeteroExperts
from moert.experts.lora import add_lora_, load_lora_, lora_state_dict
from moert.experts.quantized import QuantizedExperts
from moert.experts.split import split_ffn
from moert.experts.sub_one_bit import SubOneBitExperts

__all__ = [
    "BlockExperts",
    "Experts",
    "GluExperts",
    "HeteroExperts",
    "QuantizedExperts",
    "SubOneBitExperts",
    "add_lora_",
    "load_lora_",
    "lora_state_dict",
    "split_ffn",
]
