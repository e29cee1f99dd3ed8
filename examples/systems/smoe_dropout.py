"""SMoE-Dropout: does a model trained with a growing number of experts get better with every expert it is given?

Two residual MoE blocks on handwritten digits; k grows from 2 to all 16, against training with all 16 throughout.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from experiment import Claim, Experiment, main, medians
from experiment.digits import Classifier, split
from moert import GluExperts, MoELayer
from moert.experts import BlockExperts
from moert.routers import FrozenRandomRouter
from moert.train import KSchedule, set_active_experts

H, E, WIDTH, KS = 64, 16, 16, (1, 2, 4, 8, 16)


def model() -> Classifier:
    return Classifier(
        H, (MoELayer(FrozenRandomRouter(H, E, E), BlockExperts(H, E, WIDTH, "relu", bias=True)) for _ in range(2))
    )


def trained(k_min: int, seed: int, progress) -> dict[str, float]:
    (x, y), (test_x, test_y) = split(seed, held_out=597 / 1797)
    classifier, steps = model(), 400
    schedule = KSchedule(classifier, k_min, E, 1 if progress.quick else steps)
    optimizer = torch.optim.Adam(classifier.parameters(), 2e-3)
    for _ in progress.steps(steps):
        batch = torch.randint(len(x), (64,))
        F.cross_entropy(classifier(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    losses = []
    with torch.no_grad():
        for k in KS:
            set_active_experts(classifier, k)
            logits = classifier(test_x)
            losses.append(F.cross_entropy(logits, test_y).item())
    worst = max(after / before for before, after in zip(losses[:-1], losses[1:], strict=True))
    figures = {f"k = {k}": loss for k, loss in zip(KS, losses, strict=True)}
    return figures | {"worst ratio": worst, "accuracy": (logits.argmax(-1) == test_y).float().mean()}


def timed(seed: int, progress) -> dict[str, float]:
    """Time of a layer at half of the experts over that at all of them: 2048 tokens, E = 16, H = 256, F = 512."""
    T, hidden, width = (16, 8, 8) if progress.quick else (2048, 256, 512)
    layer = MoELayer(FrozenRandomRouter(hidden, E, E), BlockExperts(hidden, E, width, "relu", bias=True)).eval()
    x = torch.randn(T, hidden)

    def run(k: int) -> None:
        set_active_experts(layer, k)
        layer(x)

    with torch.no_grad():
        half, every = medians([partial(run, E // 2), partial(run, E)], progress.steps(15))
    return {"time": half / every}


def all_routed(seed: int, progress) -> dict[str, float]:
    """Time of a layer of GluExperts at k = E over that of a dense network as wide as they are together."""
    T, hidden, width = (16, 8, 8) if progress.quick else (2048, 256, 512)
    layer = MoELayer(FrozenRandomRouter(hidden, E, E), GluExperts(E, hidden, width, "relu", bias=True))
    dense = nn.Sequential(nn.Linear(hidden, E * width), nn.ReLU(), nn.Linear(E * width, hidden))
    x = torch.randn(T, hidden)
    with torch.no_grad():
        routed, plain = medians([partial(layer, x), partial(dense, x)], progress.steps(15))
    return {"routed": routed / plain}


EXPERIMENT = Experiment(
    name="smoe-dropout",
    title="SMoE-Dropout",
    paper="arXiv:2303.01610",
    classes=("FrozenRandomRouter", "BlockExperts", "KSchedule"),
    figures={f"k = {k}": "test cross-entropy" for k in KS}
    | {
        "worst ratio": "loss at 2k over loss at k",
        "accuracy": "",
        "time": "at k = 8, of k = 16",
        "routed": "of the dense network's time",
    },
    claims=(
        Claim("self-slimming: every doubling of k lowers the loss", "worst ratio", "lower", "k 2 to 16", 1.0),
        Claim("at all experts as good as dense training, within 10 %", "k = 16", "lower", "k 2 to 16", "k 16", 1.1),
        Claim("half of the experts take at most .75 of the time", "time", "lower", "half of the experts", 0.75),
        Claim(
            "routing to all experts costs no more than a dense network", "routed", "lower", "all experts, routed", 1.0
        ),
    ),
    equal="equal parameters and steps; k 2 to 16 trains with 9/16 of the expert FLOPs",
    timed=("half of the experts", "all experts, routed"),
    variants={
        "k 2 to 16": partial(trained, 2),
        "k 16": partial(trained, E),
        "half of the experts": timed,
        "all experts, routed": all_routed,
    },
)

if __name__ == "__main__":
    main(EXPERIMENT)
