"""Routers: x [T, H] -> Routing, one file each; the losses are functions of the Routing."""

from moert.routers.base import Router, RouterContext, TakesContext
from moert.routers.capacity import CapacityPolicy, within_capacity
from moert.routers.deepseek import DeepSeekRouter
from moert.routers.dense_to_sparse import DenseToSparseRouter
from moert.routers.depth import DepthRouter, TokenDepthRouter
from moert.routers.expert_choice import AuxiliaryRouter, ExpertChoiceRouter
from moert.routers.frozen_random import FrozenRandomRouter
from moert.routers.gating_residual import GatingResidualRouter
from moert.routers.graph import AttentionAwareRouter, SimilarityRouter, mix_probs_with_attention, mixing_statistics
from moert.routers.linear import LinearRouter
from moert.routers.losses import (
    balance_terms,
    expert_load,
    load_balance_loss,
    router_z_loss,
    step_expert_bias_,
    update_expert_bias_,
)
from moert.routers.modality import ModalityRouter
from moert.routers.prototype import PrototypeRouter
from moert.routers.recurrent import RecurrentRouter, RecurrentState, follow
from moert.routers.relu_norm import ReLUNormRouter, activation_locality_loss, chunk_sparsity_loss
from moert.routers.topk import TopKRouter
from moert.routers.within import (
    causal_routers_,
    continued_routers,
    given_context,
    heard,
    linked_routers,
    recorded_routings,
    routers_in,
)

__all__ = [
    "AttentionAwareRouter",
    "AuxiliaryRouter",
    "CapacityPolicy",
    "DeepSeekRouter",
    "DenseToSparseRouter",
    "DepthRouter",
    "ExpertChoiceRouter",
    "FrozenRandomRouter",
    "GatingResidualRouter",
    "LinearRouter",
    "ModalityRouter",
    "PrototypeRouter",
    "ReLUNormRouter",
    "RecurrentRouter",
    "RecurrentState",
    "Router",
    "RouterContext",
    "SimilarityRouter",
    "TakesContext",
    "TokenDepthRouter",
    "TopKRouter",
    "activation_locality_loss",
    "balance_terms",
    "causal_routers_",
    "chunk_sparsity_loss",
    "continued_routers",
    "expert_load",
    "follow",
    "given_context",
    "heard",
    "linked_routers",
    "load_balance_loss",
    "mix_probs_with_attention",
    "mixing_statistics",
    "recorded_routings",
    "router_z_loss",
    "routers_in",
    "step_expert_bias_",
    "update_expert_bias_",
    "within_capacity",
]
