"""The operators, one file each."""

from moert.ops.all_to_all import Splits, all_to_all, exchange_counts
from moert.ops.dispatch import Dispatched, Returning, combine, dispatch, start_combine
from moert.ops.expert_choice import expert_choice
from moert.ops.expert_map import ExpertMap
from moert.ops.fused_experts import fused_experts
from moert.ops.fused_experts_quantized import fused_experts_quantized
from moert.ops.gating import topk_gating
from moert.ops.grouped_gemm import grouped_gemm
from moert.ops.permute import permute, permute_plan, plan_of, unpermute
from moert.ops.rank_capacity import Capacity
from moert.ops.ranks import Ranks
from moert.ops.union_experts import experts_in_use, union_experts

__all__ = [
    "Capacity",
    "Dispatched",
    "ExpertMap",
    "Ranks",
    "Returning",
    "Splits",
    "all_to_all",
    "combine",
    "dispatch",
    "exchange_counts",
    "expert_choice",
    "experts_in_use",
    "fused_experts",
    "fused_experts_quantized",
    "grouped_gemm",
    "permute",
    "permute_plan",
    "plan_of",
    "start_combine",
    "topk_gating",
    "union_experts",
    "unpermute",
]
