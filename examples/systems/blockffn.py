"""BlockFFN: do its two losses make consecutive tokens share experts, at what cost, and is the union of experts fast?

Sequences keep a topic for a while (6 topics, 8 % chance to change) and the target is tanh(W_topic x).
"""

from functools import partial

import torch
from torch import Tensor, nn

from experiment import Claim, Experiment, main, medians
from moert import MoELayer, RouterContext, experts_in_use, union_experts
from moert.analysis import chunk_level_sparsity, token_level_sparsity
from moert.experts import BlockExperts
from moert.routers import ReLUNormRouter

TOPICS, STAY, H, E, BLOCK, LENGTH, BATCH = 6, 0.92, 32, 16, 8, 64, 8
BOUNDARIES = torch.arange(0, BATCH * LENGTH + 1, LENGTH, dtype=torch.int32)
FIGURES = {
    "CLS_8": "share of unused experts",
    "CLS_8 gain": "over no loss",
    "TLS": "share of zeros",
    "MSE": "",
    "time": "of dense",
}


def sequences(maps: Tensor, centres: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x and target [BATCH * LENGTH, H]."""
    topic = torch.randint(TOPICS, (BATCH, LENGTH), generator=generator)
    stay = torch.rand(BATCH, LENGTH, generator=generator) < STAY
    for t in range(1, LENGTH):
        topic[:, t] = torch.where(stay[:, t], topic[:, t - 1], topic[:, t])
    topic = topic.flatten()
    x = torch.randn(BATCH * LENGTH, H, generator=generator) + centres[topic]
    return x, torch.tanh(torch.einsum("thg,tg->th", maps[topic], x))


def trained(al: float, cs: float, seed: int, progress) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(TOPICS, H, H, generator=generator) / H**0.5
    centres = torch.randn(TOPICS, H, generator=generator)
    layer = MoELayer(ReLUNormRouter(H, E, al_coef=al, cs_coef=cs, chunk=8), BlockExperts(H, E, BLOCK))
    optimizer, context = torch.optim.Adam(layer.parameters(), 5e-3), RouterContext(cu_seqlens=BOUNDARIES)
    for _ in progress.steps(400):
        x, target = sequences(maps, centres, generator)
        y, routing = layer.forward_with_routing(x, context)
        sum(routing.losses.values(), nn.functional.mse_loss(y, target)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return evaluated(layer.eval(), maps, centres, generator)


def with_both(seed: int, progress) -> dict[str, float]:
    without, figures = trained(0.0, 0.0, seed, progress), trained(5e-3, 0.1, seed, progress)
    return figures | {"CLS_8 gain": figures["CLS_8"] - without["CLS_8"]}


@torch.no_grad()
def evaluated(layer: MoELayer, maps: Tensor, centres: Tensor, generator: torch.Generator) -> dict[str, float]:
    batches = [sequences(maps, centres, generator) for _ in range(8)]
    outputs = [layer.forward_with_routing(x) for x, _ in batches]
    weights = [routing.dense_weights() for _, routing in outputs]
    mse = [nn.functional.mse_loss(y, target) for (y, _), (_, target) in zip(outputs, batches, strict=True)]
    cls = [chunk_level_sparsity(w, 8, BOUNDARIES) for w in weights]
    tls = [token_level_sparsity(w) for w in weights]
    return {"CLS_8": sum(cls) / 8, "TLS": sum(tls) / 8, "MSE": sum(mse) / 8}


def timed(seed: int, progress) -> dict[str, float]:
    """Union of 30 % of the blocks for 32 tokens over the dense network, of the sizes of the 0.5B model."""
    hidden, experts, block = (64, 40, 8) if progress.quick else (1280, 40, 128)
    up, down = (torch.randn(experts, block, hidden) / hidden**0.5 for _ in range(2))
    x, gains = torch.randn(32, hidden), torch.zeros(32, experts)
    gains[:, torch.randperm(experts)[: experts * 3 // 10]] = 0.5

    def dense():
        h = nn.functional.silu(nn.functional.linear(x, up.flatten(0, 1))).unflatten(-1, (experts, block))
        return (h * gains[..., None]).flatten(1) @ down.flatten(0, 1)

    def union():
        return union_experts(x, gains, experts_in_use(gains), up, down.mT)

    of_union, of_dense = medians([union, dense], progress.steps(60))
    return {"time": of_union / of_dense}


EXPERIMENT = Experiment(
    name="blockffn",
    title="BlockFFN",
    paper="arXiv:2507.08771",
    classes=("ReLUNormRouter", "BlockExperts"),
    figures=FIGURES,
    claims=(
        Claim("the two losses raise CLS_8 by at least .08", "CLS_8 gain", "higher", "both losses", 0.08),
        Claim("at little cost in quality", "MSE", "lower", "both losses", "no loss", 1.15),
        Claim("activation locality alone raises CLS_8", "CLS_8", "higher", "locality", "no loss"),
        Claim("chunk sparsification alone raises CLS_8", "CLS_8", "higher", "chunk sparsity", "no loss"),
        Claim("at 70 % CLS the union of 32 tokens runs in half the time of dense", "time", "lower", "union", 0.5),
    ),
    equal="equal parameters and steps",
    timed=("union",),
    variants={
        "no loss": partial(trained, 0.0, 0.0),
        "locality": partial(trained, 5e-3, 0.0),
        "chunk sparsity": partial(trained, 0.0, 0.1),
        "both losses": with_both,
        "union": timed,
    },
)

if __name__ == "__main__":
    main(EXPERIMENT)
