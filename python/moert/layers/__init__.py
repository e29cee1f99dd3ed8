"""Layers: a router, experts and what surrounds them."""

from moert.layers.moe import MoELayer

__all__ = ["MoELayer"]
