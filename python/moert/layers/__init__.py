"""Layers: a router, experts and what surrounds them."""

from moert.layers.feed_forward import FeedForward
from moert.layers.moe import MoELayer
from moert.layers.moma import MoMaLayer, train_auxiliary, upcycle

__all__ = ["FeedForward", "MoELayer", "MoMaLayer", "train_auxiliary", "upcycle"]
