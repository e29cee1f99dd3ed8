"""Experts on several ranks of torch.distributed."""

from moert.parallel.checkpoint import load_checkpoint, save_checkpoint
from moert.parallel.expert_parallel import ExpertParallel, expert_parameters, shard_experts_
from moert.parallel.pulse import Pulse

__all__ = ["ExpertParallel", "Pulse", "expert_parameters", "load_checkpoint", "save_checkpoint", "shard_experts_"]
