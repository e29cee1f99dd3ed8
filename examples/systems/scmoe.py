"""SCMoE: how far is a weak routing of a model from its own, what does contrasting them do, and what does it cost?

A classifier of noisy digits with three MoE layers (8 experts, top-2) in place of a language model.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import moert.integrations.transformers  # noqa: F401
from experiment import Claim, Experiment, main, medians, once
from experiment.digits import Classifier, split
from moert import GluExperts, MoELayer, RouterContext, TopKRouter
from moert.decode import contrast_logits, self_contrast, speculative
from moert.integrations.transformers.routers import use_routers_
from moert.routers import given_context, load_balance_loss, recorded_routings

H, E, NOISE, BALANCE, STEPS, DRAWS = 64, 8, 0.35, 0.01, 600, 32  # draws of the noise at the test
LAYERS = 3
BETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
RANK_8, RANDOM = "rank 8, beta .7 .9", "random expert, best beta"
FIGURES = {f"KL {k}": f"top-2 to rank-{k}" for k in (1, 2, 8)} | {
    "KL 2 - 1": "",
    "KL 8 - 2": "",
    "Spearman": "of KL and k",
    "accuracy": "",
    "loss to greedy": "",
    "extra experts": "of a token and layer, beside its two",
    "time": "a token, of greedy",
}


@once
def trained(seed: int, progress) -> tuple[Classifier, Tensor, Tensor]:
    """Trained with a balance loss, as Mixtral is: without one some experts are strangers to most tokens."""
    (x, y), (test_x, test_y) = split(seed, held_out=1 / 3)
    model = Classifier(
        H, (MoELayer(TopKRouter(H, E, 2, renormalize=True), GluExperts(E, H, 32)) for _ in range(LAYERS))
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in progress.steps(STEPS):
        batch = torch.randint(len(x), (64,))
        with recorded_routings(model) as calls:
            loss = F.cross_entropy(model(x[batch] + NOISE * torch.randn(64, 64)), y[batch])
        (loss + BALANCE * sum(load_balance_loss(routing) for _, routing in calls)).backward()
        optimizer.step()
        optimizer.zero_grad()
    test_x, test_y = test_x.repeat(DRAWS, 1), test_y.repeat(DRAWS)
    return model, test_x + NOISE * torch.randn(test_x.shape), test_y


def one_of(rank: int | None, tokens: int) -> RouterContext:
    """Routing of tokens to the expert of this rank alone; None: to a random one, of its own in every layer."""
    if rank is not None:
        return RouterContext(ranks=((rank,),))
    return RouterContext(ranks=tuple((k,) for k in range(1, E + 1)), group=torch.randint(E, (tokens,)))


def by_rank(model: Classifier, x: Tensor, rank: int | None) -> Tensor:
    with given_context(model, lambda x: one_of(rank, len(x))):
        return model(x)


def divergences(seed: int, progress) -> dict[str, float]:
    model, x, _ = trained(seed, progress)
    with torch.no_grad():
        p = model(x).log_softmax(-1)
        kl = [(p.exp() * (p - by_rank(model, x, k).log_softmax(-1))).sum(-1).mean().item() for k in range(1, E + 1)]
    place = sorted(range(E), key=kl.__getitem__)
    squares = sum((i - k) ** 2 for i, k in enumerate(place))
    figures = {"KL 1": kl[0], "KL 2": kl[1], "KL 8": kl[7], "KL 2 - 1": kl[1] - kl[0], "KL 8 - 2": kl[7] - kl[1]}
    return figures | {"Spearman": 1 - 6 * squares / (E * (E * E - 1))}


def contrasted(rank: int | None, betas: tuple[float, ...], seed: int, progress) -> dict[str, float]:
    """The best accuracy over the betas; how often the weak routing needs an expert that the model's own does not."""
    model, x, y = trained(seed, progress)
    with torch.no_grad(), recorded_routings(model) as calls:
        z_s, z_w = model(x), by_rank(model, x, rank)
    greedy = (z_s.argmax(-1) == y).float().mean().item()
    best = max((contrast_logits(z_s, z_w, 0.1, b).argmax(-1) == y).float().mean().item() for b in betas)
    own, weak = (torch.stack([routing.ids for _, routing in half]) for half in (calls[:LAYERS], calls[LAYERS:]))
    extra = (own != weak).all(-1).float().mean().item()
    return {"accuracy": best, "loss to greedy": greedy - best, "extra experts": extra}


def timed(seed: int, progress) -> dict[str, float]:
    """Seconds a token at batch 1 over greedy's: Mixtral of 50 million parameters, random weights."""
    size = 32 if progress.quick else 512
    config = MixtralConfig(
        hidden_size=size, intermediate_size=2 * size, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=256, num_local_experts=E, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation("moert")
    use_routers_(model)
    prompt, count = torch.randint(256, (1, 16)), 24
    calls = (
        partial(speculative, model, None, prompt, count),
        partial(self_contrast, model, prompt, max_new_tokens=count),
    )
    greedy, contrast = medians(calls, progress.steps(5))
    return {"time": contrast / greedy}


EXPERIMENT = Experiment(
    name="scmoe",
    title="SCMoE",
    paper="arXiv:2405.14507",
    classes=("self_contrast", "contrast_logits", "TopKRouter"),
    figures=FIGURES,
    claims=(
        Claim("rank 2 alone is further from the model than rank 1", "KL 2 - 1", "higher", "divergence", 0.0),
        Claim("rank 8 is further than rank 2", "KL 8 - 2", "higher", "divergence", 0.0),
        Claim("the divergence grows with the rank", "Spearman", "higher", "divergence", 0.95),
        Claim("contrast with rank 2 is no worse than greedy", "loss to greedy", "lower", "rank 2, best beta", 0.002),
        Claim("contrast with rank 8, beta ≥ .7, is worse", "loss to greedy", "higher", RANK_8, 0.0),
        Claim("rank 2 needs fewer experts besides than rank 8", "extra experts", "lower", "rank 2, best beta", RANK_8),
        Claim("and than a random one", "extra experts", "lower", "rank 2, best beta", RANDOM),
        Claim("a token takes at most 1.7 times as long as greedy's", "time", "lower", "latency", 1.7),
    ),
    equal="one model, trained once per seed",
    seeds=12,
    timed=("latency",),
    together=True,
    variants={
        "divergence": divergences,
        "greedy": partial(contrasted, 1, (0.0,)),
        "rank 2, best beta": partial(contrasted, 2, BETAS),
        RANK_8: partial(contrasted, 8, (0.7, 0.9)),
        RANDOM: partial(contrasted, None, BETAS),
        "latency": timed,
    },
    notes="At this size no gain over greedy is claimed; the paper's gains are on reasoning with Mixtral 8x7B. A "
    "random expert of its own per token and layer as the weak one, the paper's ablation, loses 0.0014 ± 0.0009 "
    "of accuracy to greedy at its best beta, rank 2 0.0014 ± 0.0008; over ten other seeds both lose 0.0012 ± "
    "0.0007. Six seeds and a quarter of the draws of the noise at the test left the second figure at 0.0009 ± "
    "0.0014. Trained without a balance loss the best contrast with rank 2 lost .002 to .003 in the mean of six "
    "seeds, after 150 steps as after 600.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
