"""Experts: (x, routing) -> y."""

from moert.experts.base import Experts
from moert.experts.glu import GluExperts

__all__ = ["Experts", "GluExperts"]
