"""MoE++: experts that cost nothing take the easy tokens; digits, and the speed of the experts.

Letters: T tokens, H hidden, I intermediate.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from experiment import Claim, Experiment, main, medians
from experiment.digits import split
from moert import GluExperts, MoELayer, RouterContext, Routing, TopKRouter
from moert.experts import HeteroExperts
from moert.routers import GatingResidualRouter, load_balance_loss

H, FFN = 64, 8
KINDS = ["ffn"] * FFN + ["const"] * 2 + ["copy", "zero"]


class Classifier(nn.Module):
    """Two MoE layers with residual paths; the second router is given the first one's routing."""

    def __init__(self, layers):
        super().__init__()
        self.inward, self.layers, self.head = nn.Linear(64, H), nn.ModuleList(layers), nn.Linear(H, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(H) for _ in layers)

    def forward(self, pixels):
        x, routings = self.inward(pixels), []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            context = RouterContext(previous=routings[-1] if routings else None)
            y, routing = layer.forward_with_routing(norm(x), context)
            x = x + y
            routings.append(routing)
        return self.head(x), routings


def moe_plus_plus(tau, beta=0.05, hidden=H, intermediate=H):
    router = GatingResidualRouter(hidden, len(KINDS), kinds=KINDS, tau=tau, beta=beta)
    return MoELayer(router, HeteroExperts(GluExperts(FFN, hidden, intermediate), KINDS, hidden))


def vanilla(hidden=H, intermediate=H):
    return MoELayer(TopKRouter(hidden, FFN, 2, renormalize=True), GluExperts(FFN, hidden, intermediate))


def train_on_digits(build, seed, progress):
    """Test accuracy, share of the choices that fall on feed-forward experts in the test set, and the trained layers."""
    (x, y), (test_x, test_y) = split(seed)
    model = Classifier([build(), build()])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 25)
    generator = torch.Generator().manual_seed(seed)
    for _ in progress.steps(25):
        for rows in torch.randperm(len(x), generator=generator).split(64)[: 1 if progress.quick else None]:
            logits, routings = model(x[rows])
            losses = [loss for routing in routings for loss in routing.losses.values()]
            losses = losses or [0.01 * load_balance_loss(routing) for routing in routings]
            sum(losses, F.cross_entropy(logits, y[rows])).backward()
            optimizer.step()
            optimizer.zero_grad()
        rate.step()
    with torch.no_grad():
        logits, routings = model.eval()(test_x)
    share = sum((routing.ids < FFN).double().mean().item() for routing in routings) / 2
    return {"accuracy": (logits.argmax(-1) == test_y).double().mean().item(), "share": share}


def speed(build, seed, share, progress):
    """Tokens per second of the experts' forward over the vanilla layer's, in turns; `share` of the choices are FFN."""
    torch.manual_seed(seed)
    T, hidden, intermediate = (16, 8, 8) if progress.quick else (512, 256, 512)
    layers = [each(hidden=hidden, intermediate=intermediate).experts for each in (vanilla, build)]
    x, calls = torch.randn(T, hidden), []
    for experts in layers:
        count = experts.num_experts
        weight = torch.ones(count)
        if count > FFN:  # as likely as in the trained model
            weight[:FFN], weight[FFN:] = share / FFN, (1 - share) / (count - FFN)
        ids = torch.multinomial(weight.expand(T, count), 2)
        calls.append(partial(experts, x, Routing(ids, torch.full(ids.shape, 0.5), count)))
    with torch.no_grad():
        before, this = medians(calls, progress.steps(40))
    return before / this


def variant(build):
    def run(seed, progress):
        figures = train_on_digits(build, seed, progress)
        faster = speed(build, seed, figures["share"], progress)
        return figures | {"speed": faster, "FFN speed": faster * figures["share"]}

    return run


EXPERIMENT = Experiment(
    name="moe-plus-plus",
    title="MoE++",
    paper="arXiv:2410.07348",
    classes=("GatingResidualRouter", "HeteroExperts"),
    figures={
        "accuracy": "share of test digits",
        "share": "FFN choices / all",
        "speed": "tokens per s / vanilla MoE's",
        "FFN speed": "FFN choices per s / vanilla MoE's",
    },
    claims=(
        Claim("Free experts cost no accuracy (tau 0.75)", "accuracy", "higher", "tau 0.75", 0.96),
        Claim("Free experts cost no accuracy (tau 0.1)", "accuracy", "higher", "tau 0.1", 0.96),
        Claim("A smaller tau sends fewer tokens to FFN experts", "share", "lower", "tau 0.1", "tau 0.75", 0.9),
        Claim("Experts' forward at 1.1 to 2.1 times the throughput (tau 0.75)", "speed", "higher", "tau 0.75", 1.1),
        Claim("Experts' forward at 1.1 to 2.1 times the throughput (tau 0.1)", "speed", "higher", "tau 0.1", 1.1),
    ),
    equal="8 FFN experts, top-2",
    timed=("vanilla", "tau 0.75", "tau 0.1"),
    variants={
        "vanilla": variant(lambda **size: vanilla(**size)),
        "tau 0.75": variant(lambda **size: moe_plus_plus(0.75, **size)),
        "tau 0.1": variant(lambda **size: moe_plus_plus(0.1, **size)),
    },
)

if __name__ == "__main__":
    main(EXPERIMENT)
