"""Chain-of-Experts (arXiv:2506.18945): an MoE layer run several times on its own output, a router per iteration."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from moert.experts.base import Experts
from moert.routers.base import Router, RouterContext
from moert.types import Onto, Routing

LAYOUTS = ("renorm", "released", "prenorm")
HALF = (torch.bfloat16, torch.float16)


class ChainMoELayer(nn.Module):
    """x <- x + experts(x, routers[t](x)) + shared_experts(x) for each iteration t; one set of experts for all of them.

    residual "inner" adds x in every iteration, "outer" only the first x, once, after the last.  With a norm the input
    is the residual stream h, and layout says where the norm stands: "renorm" h <- h + moe(norm(h)) in each iteration,
    "released" loop(norm(h)), without h itself, "prenorm" h + loop(norm(h)) - norm(h).  A single router serves all.
    subtract_input gives what there is to add to the input, for blocks that add it themselves.  checkpoint keeps the
    activations of one iteration at a time for the backward pass, which computes the others again.  Gradients of the
    experts and shared experts are added up over the iterations in float32 at least.
    """

    def __init__(
        self,
        routers: Sequence[Router],
        experts: Experts,
        shared_experts: nn.Module | None = None,
        iterations: int | None = None,
        residual: str = "inner",
        norm: Callable[[Tensor], Tensor] | None = None,
        layout: str = "renorm",
        subtract_input: bool = False,
        checkpoint: bool = False,
    ):
        super().__init__()
        iterations = len(routers) if iterations is None else iterations
        if iterations < 1 or len(routers) not in (1, iterations):
            raise ValueError(f"routers must be 1 or iterations={iterations} >= 1, got {len(routers)}")
        if residual not in ("inner", "outer"):
            raise ValueError(f"residual must be inner or outer, got {residual}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout}")
        if residual == "outer" and norm is not None and layout == "renorm":
            raise ValueError("layout must be released or prenorm for residual outer, got renorm")
        self.routers, self.experts, self.shared_experts = nn.ModuleList(routers), experts, shared_experts
        self.iterations, self.residual, self.norm, self.layout = iterations, residual, norm, layout
        self.subtract_input, self.checkpoint = subtract_input, checkpoint

    def forward(self, x: Tensor, context: RouterContext | None = None) -> Tensor:
        return self.forward_with_routing(x, context)[0]

    def forward_with_routing(self, x: Tensor, context: RouterContext | None = None) -> tuple[Tensor, list[Routing]]:
        """y, and the routing of every iteration: losses are the caller's to add, see losses_of."""
        h_TH, routings = x.reshape(-1, x.shape[-1]), []
        renorm = self.norm is not None and self.layout == "renorm"
        weights = self._weights()
        start_TH = y_TH = h_TH if self.norm is None or renorm else self.norm(h_TH)
        for t in range(self.iterations):
            residual = y_TH if self.residual == "inner" else None
            step = (t, self.norm(y_TH) if renorm else y_TH, residual, context, weights[t])
            again = self.checkpoint and torch.is_grad_enabled()
            y_TH, routing = checkpoint(self._iteration, *step, use_reentrant=False) if again else self._iteration(*step)
            routings.append(routing)
        if self.residual == "outer":
            y_TH = y_TH + start_TH
        if self.norm is not None and self.layout == "prenorm":
            y_TH = h_TH + (y_TH - start_TH)
        if self.subtract_input:
            y_TH = y_TH - h_TH
        return y_TH.view(x.shape), routings

    def _weights(self) -> list[dict[str, dict[str, Tensor]]]:
        """For each iteration the weights that take the place of the modules' own: none where autograd adds as well."""
        weights: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(self.iterations)]
        if self.iterations < 3 or not torch.is_grad_enabled():  # one sum of two is rounded once in any case
            return weights
        for part in ("experts", "shared_experts"):
            for name, weight in getattr(self, part).named_parameters() if getattr(self, part) is not None else ():
                if type(weight) is nn.Parameter and weight.requires_grad and weight.dtype in HALF:
                    for t, view in enumerate(_AddedInFloat32.apply(weight, self.iterations)):
                        weights[t].setdefault(part, {})[name] = view
        return weights

    def _iteration(
        self, t: int, x_TH: Tensor, residual: Tensor | None, context: RouterContext | None, weights: dict
    ) -> tuple[Tensor, Routing]:
        routing = self.routers[t if len(self.routers) > 1 else 0](x_TH, context)
        added = residual
        if self.shared_experts is not None:
            added = functional_call(self.shared_experts, weights.get("shared_experts", {}), (x_TH,))
        y_TH = self._experts(x_TH, routing, added, weights.get("experts"))
        return y_TH if residual is None or self.shared_experts is None else y_TH + residual, routing

    def _experts(self, x_TH: Tensor, routing: Routing, added: Tensor | None, weights: dict | None) -> Tensor:
        if weights is None:
            return self.experts(x_TH, routing) if added is None else self.experts.onto(x_TH, routing, Onto(added))
        fused = () if added is None or not self.experts.fuses_onto else (Onto(added),)
        y_TH = functional_call(self.experts, weights, (x_TH, routing, *fused))
        return y_TH if fused or added is None else Onto(added).added_to(y_TH)


class _AddedInFloat32(torch.autograd.Function):
    """A weight n times, for as many uses; their gradients are added in float32 and rounded once."""

    @staticmethod
    def forward(ctx, weight: Tensor, n: int):
        return tuple(weight.view_as(weight) for _ in range(n))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        total = grads[0].float()
        for grad in grads[1:]:
            total = total + grad
        return total.to(grads[0].dtype), None


def losses_of(routings: Sequence[Routing]) -> dict[str, Tensor]:
    """The losses of all iterations: name -> their sum, and name/t -> that of iteration t."""
    losses: dict[str, Tensor] = {}
    for t, routing in enumerate(routings):
        for name, loss in routing.losses.items():
            losses[f"{name}/{t}"] = loss
            losses[name] = losses[name] + loss if name in losses else loss
    return losses
