import sys

import torch

from moert import GluExperts, MoELayer, TopKRouter
from moert.ops import compiled_dispatch
from moert.ops.records import record_bytes
from moert.parallel import shard_experts_
from ranks import ranks

E, H, k = 7, 12, 2
dispatched = sys.modules["moert.ops.dispatch"]  # beside the function of that name


def exchanges(sizes: tuple[int, int], grad: bool) -> list[str]:
    """What a step of two layers side by side exchanges, in order: rows there, and rows of a width back."""
    torch.manual_seed(0)
    layers = {h: shard_experts_(MoELayer(TopKRouter(h, E, k), GluExperts(E, h, 8))) for h in (H, 2 * H)}
    xs = [torch.randn(T, h, requires_grad=grad) for T, h in zip(sizes, layers, strict=True)]
    seen, send, begin = [], compiled_dispatch.send_rows, dispatched.exchange

    def step(x, z):
        wide = torch.cat([x.tanh()] * 8)
        return layers[H](wide)[: len(x)].square().sum() + layers[2 * H](z.exp()).square().sum()

    compiled_dispatch.send_rows = lambda rows, *args: (seen.append(f"{rows.shape[1]} back"), send(rows, *args))[1]
    dispatched.exchange = lambda x, *args, **more: (seen.append(f"{x.shape[1]} there"), begin(x, *args, **more))[1]
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        loss = torch.compile(step, backend="inductor", fullgraph=True, dynamic=True)(*xs)
        if grad:
            loss.backward()
    compiled_dispatch.send_rows, dispatched.exchange = send, begin
    return seen


def orders(*cases: tuple) -> list:
    return [exchanges(*case) for case in cases]


def test_exchanges_stay_and_keep_their_order():
    """Whatever numbers of tokens a rank compiles for, and where what arrives is no part of its loss."""
    forward = [f"{H} there", f"{H} back", f"{2 * H} there", f"{2 * H} back"]
    few, many, none, one = ranks(1, orders, ((2, 9000), True), ((9000, 2), True), ((0, 0), True), ((0, 1), False))[0]
    assert few == many == none and few[:4] == forward
    # Of each layer: its results' gradient, and those of its rows and weights in one record.
    both = [f"{record_bytes(torch.float32, torch.float32, h, k, ids=False)} back" for h in (H, 2 * H)]
    assert sorted(few[4:]) == sorted([f"{H} back", f"{2 * H} back", *both])
    assert sorted(one) == sorted(forward)
