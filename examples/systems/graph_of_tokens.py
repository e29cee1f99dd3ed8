"""Graph of Tokens: how often a small change of the tokens flips their expert, with and without mixing."""

import torch
import torch.nn.functional as F

from experiment import Claim, Experiment, main
from moert.routers import SimilarityRouter

TOKENS, CLUSTERS, HIDDEN, EXPERTS, TRIALS, DRAWS = 64, 6, 16, 8, 20, 20


def router(tau: float) -> SimilarityRouter:
    out = SimilarityRouter(HIDDEN, EXPERTS, 1, "cosine", tau)
    torch.nn.init.normal_(out.weight)
    return out


@torch.no_grad()
def flips(tau: float | None):
    """Mean over draws of clusters and routers; tau None is the plain softmax router."""

    def run(seed, progress):
        flipped, used = 0.0, 0
        draws = 0
        for draw in progress.steps(DRAWS):
            torch.manual_seed(1000 * seed + draw)
            centres = 2 * torch.randn(CLUSTERS, HIDDEN)
            x = centres[torch.randint(CLUSTERS, (TOKENS,))] + 0.8 * torch.randn(TOKENS, HIDDEN)
            layer = router(tau or 1.0)

            def expert(x):
                routing = layer(x)
                return (routing.ids[:, 0] if tau else routing.state.p.argmax(-1)).long()

            before = expert(x)
            changed = [expert(x + 0.5 * torch.randn(TOKENS, HIDDEN)) != before for _ in range(TRIALS)]
            flipped += torch.stack(changed).float().mean().item()
            used += int((F.one_hot(before, EXPERTS).sum(0) > 0).sum())
            draws += 1
        return {"flip rate": flipped / draws, "experts in use": used / draws}

    return run


EXPERIMENT = Experiment(
    name="graph-of-tokens",
    title="Graph of Tokens",
    paper="arXiv:2505.00792",
    classes=("SimilarityRouter", "AttentionAwareRouter"),
    figures={"flip rate": "share of tokens", "experts in use": f"of {EXPERTS}"},
    claims=(
        Claim("a token's expert flips less under noise", "flip rate", "lower", "cosine, tau 0.3", "plain", 0.65),
        Claim("without sending all tokens to one expert", "experts in use", "higher", "cosine, tau 0.3", 3.5),
    ),
    equal="router parameters; 20 draws of clusters and routers a seed, 20 perturbations each",
    variants={"plain": flips(None), "cosine, tau 0.1": flips(0.1), "cosine, tau 0.3": flips(0.3)},
    notes="Random routers on clustered tokens (64 in 6 clusters), noise 0.5: the claim is about stability, not about "
    "accuracy. tau 1 sends almost all tokens to one expert.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
