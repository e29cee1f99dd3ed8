"""The contract of experts: (x [T, H], routing of T tokens) -> y [T, H]."""

from torch import Tensor, nn

from moert.types import Routing


class Experts(nn.Module):
    """A set of experts; y[t] is the weighted sum of what the experts chosen for token t make of x[t]."""

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define forward(x, routing)")
