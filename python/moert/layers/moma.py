"""The layer of MoMa (arXiv:2407.21770): groups of experts by modality, expert choice within, causal after training."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moert.experts.glu import GluExperts
from moert.layers.moe import MoELayer
from moert.routers.expert_choice import AuxiliaryRouter, ExpertChoiceRouter
from moert.routers.modality import ModalityRouter
from moert.routers.within import causal_routers_, heard


class MoMaLayer(MoELayer):
    """groups[g] SwiGLU experts for modality g; each takes the share capacity (1 / groups[g]) of its modality's tokens.

    gumbel noise in training separates experts that started as copies.  hidden_aux is the width of the routers that
    causal() switches to, once train_auxiliary has trained them.  scope as in ExpertChoiceRouter.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        groups: Sequence[int] = (4, 4),
        capacity: float | None = None,
        score: str = "sigmoid",
        gumbel: bool = False,
        hidden_aux: int | None = None,
        scope: str = "rank",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        def router(num_experts):
            auxiliary = AuxiliaryRouter(hidden, num_experts, hidden_aux, device)
            options = {"scope": scope, "auxiliary": auxiliary, "device": device, "dtype": dtype}
            return ExpertChoiceRouter(hidden, num_experts, capacity, score, gumbel, **options)

        experts = GluExperts(sum(groups), hidden, intermediate, device=device, dtype=dtype)
        super().__init__(ModalityRouter([router(number) for number in groups]), experts)
        self.groups = tuple(groups)

    def causal(self, on: bool = True) -> "MoMaLayer":
        """Auxiliary routers choose from here on, token by token."""
        return causal_routers_(self, on)


def upcycle(layer: MoMaLayer, experts_per_group: int) -> MoMaLayer:
    """A layer of one expert per group -> one with experts_per_group copies of each, fresh gates and Gumbel noise."""
    if set(layer.groups) != {1}:
        raise ValueError(f"layer must have one expert per group, got {list(layer.groups)}")
    old, first = layer.experts, layer.router.routers[0]
    like = {"device": old.down_proj.device, "dtype": old.down_proj.dtype}
    groups, aux = [experts_per_group] * len(layer.groups), first.auxiliary.up.weight.shape[0]
    out = MoMaLayer(old.hidden, old.intermediate, groups, None, first.score, True, aux, first.scope, **like)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(out.experts, name).copy_(getattr(old, name).repeat_interleave(experts_per_group, 0))
    return out.train(layer.training)


def train_auxiliary(
    model: nn.Module, batches: Iterable[tuple], steps: int, rate: float = 1e-3
) -> dict[str, dict[str, float]]:
    """Trains every auxiliary router of model to predict what its expert choice router does; the rest stands still.

    A batch is the tuple of model's arguments; batches go round until steps are done.  Returns accuracy, precision and
    recall of membership per router, over the last tenth of the steps.
    """
    routers = {name: m for name, m in model.named_modules() if isinstance(m, ExpertChoiceRouter) and m.auxiliary}
    if not routers:
        raise ValueError("model must have expert choice routers with an auxiliary router, got none")
    optimizer = torch.optim.Adam([p for r in routers.values() for p in r.auxiliary.parameters()], rate)
    seen: dict[str, tuple] = {}

    def remember(name, x, context, routing):
        seen[name] = (x.detach(), routing.members(), None if context is None else context.mask)

    was_causal = {name: router.causal for name, router in routers.items()}
    tally = {name: torch.zeros(4, dtype=torch.float64) for name in routers}
    try:
        for router in routers.values():
            router.causal = False
        for step, batch in zip(range(steps), _cycle(batches), strict=False):
            with torch.no_grad(), heard(routers, remember):
                model(*batch)
            loss = 0
            for name, (x, taken, mask) in seen.items():
                keep = slice(None) if mask is None else mask.reshape(-1).bool()
                logits = routers[name].auxiliary(x[keep])
                loss = loss + F.binary_cross_entropy_with_logits(logits, taken[keep].to(logits.dtype))
                if step >= steps - max(1, steps // 10):
                    tally[name] += _outcomes(logits > 0, taken[keep])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        for name, router in routers.items():
            router.causal = was_causal[name]
    for router in routers.values():
        router.auxiliary.trained.fill_(True)
    return {name: _rates(counts) for name, counts in tally.items()}


def _cycle(batches: Iterable[tuple]):
    kept = []
    for batch in batches:
        kept.append(batch)
        yield batch
    while kept:
        yield from kept


def _outcomes(predicted: Tensor, taken: Tensor) -> Tensor:
    """Counts of true positives, false positives, false negatives, true negatives."""
    pairs = ((predicted & taken), (predicted & ~taken), (~predicted & taken), (~predicted & ~taken))
    return torch.stack([pair.sum() for pair in pairs]).double().cpu()


def _rates(counts: Tensor) -> dict[str, float]:
    hit, wrong, missed, rest = counts.tolist()
    return {
        "accuracy": (hit + rest) / max(1.0, hit + wrong + missed + rest),
        "precision": hit / max(1.0, hit + wrong),
        "recall": hit / max(1.0, hit + missed),
    }
