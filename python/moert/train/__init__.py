"""What training loops do to routers from step to step."""

from moert.train.adaptive_coefficient import AdaptiveCoefficient
from moert.train.k_schedule import KSchedule, set_active_experts

__all__ = ["AdaptiveCoefficient", "KSchedule", "set_active_experts"]
