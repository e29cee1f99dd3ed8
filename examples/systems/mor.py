"""Mixture-of-Recursions: a shared stack run up to three times, as often as each token needs."""

import torch
from torch import Tensor, nn

from experiment import Claim, Experiment, main, medians
from experiment.language import EveryToken, LanguageModel, corpus, evaluate, train
from moert import RouterContext, Routing
from moert.layers import FeedForward, MoRModel, PackedBlock, RecursiveStack
from moert.runtime import DepthBatcher

HIDDEN, LENGTH, STEPS, DEPTHS, BLOCKS = 64, 64, 370, 3, 2
BCE = 0.01  # ten times the paper's coefficient: it trained for far more steps


def packed(layer: int = 0, hidden: int = HIDDEN) -> PackedBlock:
    return PackedBlock(hidden, 4, FeedForward(hidden, 4 * hidden, "gelu"), layer)


class Recursions(nn.Module):
    """The stack as a block of the model, whose routing has the losses of all depths."""

    def __init__(self, **options):
        super().__init__()
        self.stack = RecursiveStack([packed(i) for i in range(BLOCKS)], DEPTHS, HIDDEN, **options)

    def forward(self, x: Tensor, context: RouterContext) -> tuple[Tensor, Routing]:
        y, routings = self.stack(x)
        losses = {f"{name}/{r}": loss for r, each in enumerate(routings) for name, loss in each.losses.items()}
        return y, Routing(routings[-1].ids, routings[-1].weights, routings[-1].num_experts, losses=losses)


def vanilla(blocks: int):
    def run(seed, progress):
        model = LanguageModel([EveryToken(packed()) for _ in range(blocks)], HIDDEN, LENGTH)
        return {"loss": train(model, STEPS, seed, progress, length=LENGTH)}

    return run


def recursive(steps: int, decides: bool, **options):
    """decides: the loss is that of tokens which decide for themselves, top-k's is told apart."""

    def run(seed, progress):
        model = LanguageModel([Recursions(**options)], HIDDEN, LENGTH)
        loss = train(model, steps, seed, progress, length=LENGTH)
        if not decides:
            return {"loss": loss}
        model.blocks[0].stack.causal_()
        alone = evaluate(model, LENGTH, 8 if progress.quick else 512)
        return {"loss": alone, "loss top-k": loss, "gap": abs(alone - loss)}

    return run


@torch.no_grad()
def decoding(seed, progress):
    """Tokens per second of one model, decoded depth by depth and by DepthBatcher, in turns.

    Six blocks of H 768, four of them shared; about half of the tokens go on at each depth; 32 sequences, 16 at a time.
    """
    hidden, count, slots, new = (16, 4, 2, 3) if progress.quick else (768, 32, 16, 6)
    model = MoRModel(packed(0, hidden), RecursiveStack([packed(i, hidden) for i in range(4)], DEPTHS, hidden),
                     packed(0, hidden)).eval()  # fmt: skip
    model.stack.causal_()
    for router in model.stack.routers:
        nn.init.normal_(router.weight)
    embedding, prompts = torch.randn(256, hidden), torch.randint(256, (count, 4))

    def next_token(y):
        return (y @ embedding.T).argmax(-1)

    def depth_by_depth():
        for ids in prompts.split(slots):
            kv, x, at = model.new_kv(len(ids)), embedding[ids], torch.arange(4).expand(len(ids), 4)
            for step in range(new):
                token = next_token(model(x, positions=at, kv=kv)[0][:, -1])
                x, at = embedding[token][:, None], torch.full((len(ids), 1), 4 + step)

    def batched():
        batcher = DepthBatcher(model, embedding.__getitem__, next_token, slots)
        for prompt in prompts:
            batcher.submit(prompt, new)
        batcher.run()

    slow, fast = medians([depth_by_depth, batched], progress.steps(3))
    return {"tokens per s": count * new / fast, "speed": slow / fast}


EXPERIMENT = Experiment(
    name="mor",
    title="Mixture-of-Recursions",
    paper="arXiv:2507.10524",
    classes=("RecursiveStack", "DepthRouter", "TokenDepthRouter", "RecursiveKV", "DepthBatcher"),
    figures={
        "loss": "held-out nats per byte",
        "loss top-k": "held-out nats per byte",
        "gap": "nats per byte",
        "tokens per s": "32 sequences, H 768",
        "speed": "over depth by depth",
    },
    claims=(
        Claim("a third fewer block evaluations cost little", "loss", "lower", "MoR", "recursive"),
        Claim("causal decisions cost little", "gap", "lower", "MoR", 0.05),
        Claim("equal FLOPs: no worse than plain recursion", "loss", "lower", "MoR, equal FLOPs", "recursive"),
        Claim("equal FLOPs: no worse than unshared blocks", "loss", "lower", "MoR, equal FLOPs", "6 blocks"),
        Claim("rows of different depths in one batch decode faster", "speed", "higher", "DepthBatcher", 1.0),
    ),
    reads=corpus,
    equal="steps, or (equal FLOPs: 1.5 times the steps) FLOPs of the blocks in training; AdamW 3e-3 for all",
    timed=("DepthBatcher",),
    variants={
        "6 blocks": vanilla(BLOCKS * DEPTHS),
        "recursive": recursive(STEPS, False, capacity=[1.0] * DEPTHS, gating="replace", causal="none"),
        "MoR": recursive(STEPS, True, bce_coef=BCE),
        "MoR, equal FLOPs": recursive(STEPS * 3 // 2, True, bce_coef=BCE),
        "DepthBatcher": decoding,
    },
    notes="Losses of MoR are those of causal decisions, with a coefficient of 0.01 for the loss that trains them. With "
    "the paper's 0.001 400 steps train it too little: the gap to top-k was 0.075 in the mean of three "
    "seeds; with 0.1 or a predictor beside the router it stays below 0.011. DepthBatcher runs the stack less "
    "often (23 to 44 times where depth by depth takes 36 or 48), with more rows each time, which is no sure gain "
    "on a CPU. Tried on two other seeds each: H 768 with 4, 8 and 16 sequences at a time, 0.89 to 1.03 of depth "
    "by depth's speed, H 1024 with 4 and 8, 0.86 to 1.24.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
