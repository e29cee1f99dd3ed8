"""Layers: a router, experts and what surrounds them."""

from moert.layers.chain import ChainMoELayer, losses_of
from moert.layers.feed_forward import FeedForward
from moert.layers.mod import MoDBlock
from moert.layers.moe import MoELayer
from moert.layers.moma import MoMaLayer, train_auxiliary, upcycle
from moert.layers.mor import MoRModel, RecursiveStack
from moert.layers.packed import PackedBlock, Rows, all_rows, run_chosen

__all__ = [
    "ChainMoELayer",
    "FeedForward",
    "MoDBlock",
    "MoELayer",
    "MoMaLayer",
    "MoRModel",
    "PackedBlock",
    "RecursiveStack",
    "Rows",
    "all_rows",
    "losses_of",
    "run_chosen",
    "train_auxiliary",
    "upcycle",
]
