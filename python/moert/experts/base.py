"""The contract of experts: (x [T, H], routing of T tokens) -> y [T, H]."""

from torch import Tensor, nn

from moert.types import Onto, Routing


class Experts(nn.Module):
    """A set of experts; y[t] is the weighted sum of what the experts chosen for token t make of x[t].

    Where fuses_onto is True, forward takes an Onto as its third argument and adds it before the sums are rounded.
    """

    fuses_onto = False

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define forward(x, routing)")

    def onto(self, x: Tensor, routing: Routing, onto: Onto) -> Tensor:
        """self(x, routing) + onto, in one step where these experts can."""
        check_added(onto.rows, x)
        return self(x, routing, onto) if self.fuses_onto else onto.added_to(self(x, routing))

    def beside(self, x: Tensor, routing: Routing, shared: nn.Module) -> Tensor:
        """self(x, routing) + shared(x), in the order that suits these experts."""
        return self.onto(x, routing, Onto(shared(x)))


def check_added(rows: Tensor | None, x: Tensor) -> None:
    if rows is not None and rows.shape != x.shape:
        expected, got = list(x.shape), list(rows.shape)
        raise ValueError(f"rows added to experts (shared_experts) must have shape {expected}, got {got}")
