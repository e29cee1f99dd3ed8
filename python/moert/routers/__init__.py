"""Routers: x [T, H] -> Routing, one file each; the losses are functions of the Routing."""

from moert.routers.base import Router, RouterContext
from moert.routers.losses import expert_load, load_balance_loss, router_z_loss, update_expert_bias_
from moert.routers.topk import TopKRouter
from moert.routers.within import given_context, recorded_routings, routers_in

__all__ = [
    "Router",
    "RouterContext",
    "TopKRouter",
    "expert_load",
    "given_context",
    "load_balance_loss",
    "recorded_routings",
    "router_z_loss",
    "routers_in",
    "update_expert_bias_",
]
