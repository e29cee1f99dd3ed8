"""MoMa: experts by modality, expert choice within, against the same experts shared by all tokens.

Eight sub-domains, four of "text" and four of "image": x = 0.6 mu_c + noise, target tanh(W_c x).  Letters: H hidden.
"""

import torch
from torch import Tensor

from experiment import Claim, Experiment, main
from moert import GluExperts, MoELayer, RouterContext
from moert.layers import FeedForward, MoMaLayer, train_auxiliary
from moert.routers import AuxiliaryRouter, ExpertChoiceRouter

H, FF, DOMAINS, BATCH = 24, 32, 8, 256


class Domains:
    """The problem of one seed: draws (x [n, H], target [n, H], context)."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(1000 + seed)
        self.mean = torch.randn(DOMAINS, H, generator=generator)
        self.map = torch.randn(DOMAINS, H, H, generator=generator) / H**0.5
        self.generator = generator

    def draw(self, n: int = BATCH) -> tuple[Tensor, Tensor, RouterContext]:
        domain = torch.randint(DOMAINS, (n,), generator=self.generator)
        x = 0.6 * self.mean[domain] + torch.randn(n, H, generator=self.generator)
        target = torch.tanh(torch.einsum("nh,nkh->nk", x, self.map[domain]))
        return x, target, RouterContext(modality=domain // (DOMAINS // 2))


def moma() -> MoELayer:
    return MoMaLayer(H, FF, (4, 4), hidden_aux=32)


def mixed() -> MoELayer:
    router = ExpertChoiceRouter(H, 8, auxiliary=AuxiliaryRouter(H, 8, 32))
    return MoELayer(router, GluExperts(8, H, FF))


def dense() -> torch.nn.Module:
    return FeedForward(H, FF)


def variant(build):
    def run(seed, progress):
        domains, layer = Domains(seed), build()
        experts = isinstance(layer, MoELayer)

        def predict(x, context):
            return layer(x, context) if experts else layer(x)

        optimizer, errors = torch.optim.Adam(layer.parameters(), 3e-3), []
        test = domains.draw(64 if progress.quick else 4096)
        for step in progress.steps(400):
            if step % 10 == 0:
                errors.append(error(predict, test))
            x, target, context = domains.draw()
            (predict(x, context) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        figures = {"error": error(predict, test), "area": sum(errors) / len(errors)}
        return figures | (causal_figures(layer, domains, test, predict, progress) if experts else {})

    return run


def causal_figures(layer, domains, test, predict, progress) -> dict[str, float]:
    """Accuracy of the auxiliary routers on fresh data, and what choosing by them costs."""
    before = error(predict, test)
    batches = ((x, context) for x, _, context in (domains.draw(1024) for _ in progress.steps(300)))
    train_auxiliary(layer, batches, 1 if progress.quick else 300, rate=1e-2)
    routers = [module for module in layer.modules() if isinstance(module, ExpertChoiceRouter)]
    accuracy = agreement(layer, routers, test)
    for router in routers:
        router.causal_()
    return {"membership accuracy": accuracy, "causal error over error": error(predict, test) / before}


@torch.no_grad()
def agreement(layer, routers, test) -> float:
    """How often the auxiliary routers say what expert choice does, over pairs of a token and an expert of its group."""
    x, _, context = test
    choosing = layer.router(x, context)
    for router in routers:
        router.causal_()
    predicting = layer.router(x, context)
    for router in routers:
        router.causal_(False)
    E = choosing.num_experts
    taken, said = (torch.zeros(len(x), E + 1).scatter(1, r.ids.long(), 1)[:, :E] for r in (choosing, predicting))
    pairs = len(x) * E / len(routers)  # a token meets the experts of its modality only
    return 1 - ((taken != said).sum() / pairs).item()


@torch.no_grad()
def error(predict, test) -> float:
    x, target, context = test
    return ((predict(x, context) - target).square().mean() / target.square().mean()).item()


EXPERIMENT = Experiment(
    name="moma",
    title="MoMa",
    paper="arXiv:2407.21770",
    classes=("MoMaLayer", "ExpertChoiceRouter", "ModalityRouter", "AuxiliaryRouter"),
    figures={
        "error": "test MSE / target's",
        "area": "mean of it over training",
        "membership accuracy": "share",
        "causal error over error": "ratio",
    },
    claims=(
        Claim("Experts by modality learn more than the same experts shared", "error", "lower", "moma", "mixed", 0.8),
        Claim("and more than a dense model of the same FLOPs", "error", "lower", "moma", "dense"),
        Claim("and faster", "area", "lower", "moma", "mixed"),
        Claim("An auxiliary router predicts the choice", "membership accuracy", "higher", "moma", 0.93),
        Claim("and stands in for it", "causal error over error", "lower", "moma", 1.1),
    ),
    equal="8 experts of width 32, or one: the same FLOPs per token",
    variants={"dense": variant(dense), "mixed": variant(mixed), "moma": variant(moma)},
)

if __name__ == "__main__":
    main(EXPERIMENT)
