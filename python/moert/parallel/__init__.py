"""Experts on several ranks of torch.distributed."""

from moert.parallel.adaptive import AdaptiveExperts
from moert.parallel.checkpoint import load_checkpoint, save_checkpoint
from moert.parallel.expert_parallel import ExpertParallel, expert_parameters, shard_experts_
from moert.parallel.pulse import Pulse
from moert.parallel.settings import Setting, SettingsCache

__all__ = [
    "AdaptiveExperts",
    "ExpertParallel",
    "Pulse",
    "Setting",
    "SettingsCache",
    "expert_parameters",
    "load_checkpoint",
    "save_checkpoint",
    "shard_experts_",
]
