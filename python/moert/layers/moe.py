"""The MoE layer: a router, experts, and experts that every token shares."""

from torch import Tensor, nn

from moert.experts.base import Experts
from moert.ops.kinds import expect
from moert.routers.base import Router, RouterContext
from moert.types import Routing


class MoELayer(nn.Module):
    """y = experts(x, router(x)) + shared_experts(x); x [..., H] -> y [..., H].

    shared_experts is any module from [T, H] to [T, H].
    """

    def __init__(self, router: Router, experts: Experts, shared_experts: nn.Module | None = None):
        super().__init__()
        expect(Router, router=router)
        expect(Experts, experts=experts)
        self.router, self.experts, self.shared_experts = router, experts, shared_experts

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Tensor:
        return self.forward_with_routing(x, context)[0]

    def forward_with_routing(self, x: Tensor, context: RouterContext | None = None) -> tuple[Tensor, Routing]:
        """y, and the routing of the flattened tokens: its losses and logits are for the caller to use."""
        expect(Tensor, x=x)
        expect((RouterContext, type(None)), context=context)
        if x.dim() == 0:
            raise ValueError("x must have shape [..., H], got []")
        x_TH = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TH, context)
        if self.shared_experts is None:
            return self.experts(x_TH, routing).view(x.shape), routing
        return self.experts.beside(x_TH, routing, self.shared_experts).view(x.shape), routing
