import pytest
import torch
from torch import nn

from moert.layers import FeedForward, MoRModel, PackedBlock, RecursiveStack
from moert.runtime import DepthBatcher

H, DEPTHS, VOCAB = 16, 3, 40


def block():
    return PackedBlock(H, 2, FeedForward(H, 24))


def model(**options):
    made = MoRModel(block(), RecursiveStack([block(), block()], DEPTHS, H, **options), block()).eval()
    made.stack.causal_()
    for router in made.stack.routers:
        nn.init.normal_(router.weight, std=0.7)
    embedding = torch.randn(VOCAB, H)
    return made, embedding.__getitem__, lambda y: (y @ embedding.T).argmax(-1)


def alone(made, embed, next_token, prompt, count):
    """One sequence after the other, everything computed again for every token."""
    for _ in range(count):
        y = made(embed(prompt)[None])[0]
        prompt = torch.cat([prompt, next_token(y[0, -1:])])
    return prompt


@pytest.mark.parametrize("options", ({}, {"kv": "shared"}, {"kv": "update"}, {"gating": "replace"}, {"mode": "token"},
    {"mode": "token", "gates": "every"}, {"threshold": 0.4}))  # fmt: skip
@torch.no_grad()
def test_decodes_as_each_sequence_alone(options):
    ends = model(**options)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(VOCAB, (n,), generator=generator) for n in (1, 5, 3, 2, 7)]
    batcher = DepthBatcher(*ends, slots=3)
    numbers = [batcher.submit(prompt, 4 + i) for i, prompt in enumerate(prompts)]
    done = batcher.run()
    for i, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
        assert torch.equal(done[number], alone(*ends, prompt, 4 + i))
    assert batcher.run() == {} and batcher.submit(prompts[0], 1) == 5


def test_rows_of_different_depths_share_a_pass():
    ends = model(capacity=[1, 1, 1])
    for router in ends[0].stack.routers[1:]:
        nn.init.zeros_(router.weight)  # nobody goes beyond the first depth ...
        router.capacity = 0.5
    batcher = DepthBatcher(*ends, slots=4)
    for _ in range(4):
        batcher.submit(torch.tensor([1]), 6)
    batcher.run()
    assert (batcher.passes, batcher.rows) == (6, 24)  # ... so a token is a pass
    one_slot = DepthBatcher(*ends, slots=1)
    for _ in range(4):
        one_slot.submit(torch.tensor([1]), 6)
    one_slot.run()
    assert (one_slot.passes, one_slot.rows) == (24, 24)


def test_fewer_passes_than_depth_by_depth():
    ends = model()
    batcher, generator = DepthBatcher(*ends, slots=8), torch.Generator().manual_seed(1)
    prompts = torch.randint(VOCAB, (8, 3), generator=generator)
    for prompt in prompts:
        batcher.submit(prompt, 12)
    batcher.run()
    depth_by_depth = 12 * DEPTHS
    assert 12 <= batcher.passes < depth_by_depth


def test_errors():
    ends = model()
    for call, message in (
        (lambda: DepthBatcher(*ends, slots=0), "slots must be at least 1, got 0"),
        (lambda: DepthBatcher(*ends).submit(torch.zeros(0), 1), r"prompt must have shape \[n\] with n at least 1, got"),
        (lambda: DepthBatcher(*ends).submit(torch.tensor([1]), 0), "max_new_tokens must be at least 1, got 0"),
        (lambda: DepthBatcher(*model(order=[[0], [1], [1]])), "model must run the same blocks at every depth, got"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    ends[0].stack.causal_(False)
    with pytest.raises(ValueError, match=r"model must decide token by token \(stack.causal_\(\)\), got one that takes"):
        DepthBatcher(*ends)
