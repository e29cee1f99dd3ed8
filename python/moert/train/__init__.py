"""What training loops do to routers from step to step."""

from moert.train.adaptive_coefficient import AdaptiveCoefficient

__all__ = ["AdaptiveCoefficient"]
