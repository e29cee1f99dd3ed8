"""Tutel: rows find their experts by index instead of by a one-hot matrix; also in a small SwinV2-MoE on digits.

Letters: T tokens, k choices, E experts, C rows of room for each, H hidden.
"""

import weakref
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiment import Claim, Experiment, main, medians
from experiment.digits import split
from moert import GluExperts, MoELayer, Routing, TopKRouter
from moert.experts import Experts
from moert.layers import FeedForward
from moert.ops.permute import permute, permute_plan, unpermute
from moert.routers import CapacityPolicy, load_balance_loss
from moert.testing import random_routing

WIDTH, SIDE, WINDOW, HEADS, EXPERTS, BLOCKS = 32, 8, 4, 2, 8, 4
ROOM = CapacityPolicy(1.25)


def one_hot_matrix(routing: Routing, C: int) -> Tensor:
    """[T, E, C]: a choice's weight at its expert and its place there (GShard, arXiv 2006.16668); no choice twice."""
    E, ids = routing.num_experts, routing.ids.long()
    experts = F.one_hot(torch.where(ids < 0, E, ids), E + 1)[..., :E]  # [T, k, E]
    before = experts.transpose(0, 1).flatten(0, 1).cumsum(0).view(ids.shape[1], -1, E).transpose(0, 1)
    place = ((before - 1) * experts).sum(-1)  # among the choices of its expert, first ones first
    places = F.one_hot(place, C).to(routing.weights.dtype)
    return torch.einsum("tke,tkc->tec", experts * routing.weights[..., None], places)


def by_one_hot(x: Tensor, routing: Routing, C: int, apply=lambda rows: rows) -> Tensor:
    """Encode, what experts do with rows [E, C, H], decode."""
    matrix = one_hot_matrix(routing, C)
    rows = torch.einsum("tec,th->ech", (matrix > 0).to(x.dtype), x)
    return torch.einsum("tec,ech->th", matrix, apply(rows))


def by_index(x: Tensor, routing: Routing, C: int) -> Tensor:
    plan = permute_plan(routing.ids, routing.num_experts, C)
    return unpermute(permute(x, plan), plan, routing.weights)


class OneHotExperts(Experts):
    """The same experts over rows that a one-hot matrix brings them, C for each."""

    def __init__(self, experts: GluExperts):
        super().__init__()
        self.experts, self.num_experts = experts, experts.num_experts

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        def apply(rows: Tensor) -> Tensor:
            gate, up = (rows @ self.experts.gate_up_proj.mT).chunk(2, -1)
            return (F.silu(gate) * up) @ self.experts.down_proj.mT

        return by_one_hot(x, routing, ROOM.capacity(routing), apply)


class Limited(MoELayer):
    """An MoE layer whose experts have room for so many choices."""

    def forward_with_routing(self, x: Tensor, context=None) -> tuple[Tensor, Routing]:
        rows = x.reshape(-1, x.shape[-1])
        routing = ROOM(self.router(rows))
        return self.experts(rows, routing).view(x.shape), routing


class SwinBlock(nn.Module):
    """Attention within windows, every second time shifted by half of one, by cosine; norms after each part (SwinV2)."""

    def __init__(self, feed_forward: nn.Module, shift: int):
        super().__init__()
        self.qkv, self.out, self.feed_forward = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), feed_forward
        self.norms, self.shift = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2)), shift
        self.log_scale = nn.Parameter(torch.full((HEADS, 1, 1), 10.0).log())
        self.bias = nn.Parameter(torch.zeros(HEADS, WINDOW**2, WINDOW**2))
        region = torch.zeros(SIDE, SIDE)  # what is side by side only because rows and columns were rolled
        region[SIDE - shift :] += 1
        region[:, SIDE - shift :] += 2
        inside = windows(region[None, ..., None])[..., 0] if shift else torch.zeros(4, WINDOW**2)
        self.register_buffer("apart", (inside[:, :, None] != inside[:, None, :])[:, None], persistent=False)

    def attend(self, x: Tensor) -> Tensor:
        x = windows(x.roll((-self.shift, -self.shift), (1, 2)))  # [n windows, tokens, H]
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.log_scale.exp().clamp(max=100) + self.bias
        scores = scores.view(-1, len(self.apart), *scores.shape[1:]).masked_fill(self.apart, -torch.inf)
        x = self.out((scores.flatten(0, 1).softmax(-1) @ v).transpose(1, 2).flatten(2))
        side = SIDE // WINDOW
        x = x.view(-1, side, side, WINDOW, WINDOW, WIDTH).transpose(2, 3).reshape(-1, SIDE, SIDE, WIDTH)
        return x.roll((self.shift, self.shift), (1, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Routing]]:
        x = x + self.norms[0](self.attend(x))
        if isinstance(self.feed_forward, MoELayer):
            y, routing = self.feed_forward.forward_with_routing(x)
            return x + self.norms[1](y), [routing]
        return x + self.norms[1](self.feed_forward(x)), []


def windows(x: Tensor) -> Tensor:
    """[n, SIDE, SIDE, H] -> [n · 4, WINDOW², H]"""
    n, side = len(x), SIDE // WINDOW
    return x.view(n, side, WINDOW, side, WINDOW, -1).transpose(2, 3).reshape(n * side**2, WINDOW**2, -1)


class SwinMoE(nn.Module):
    """Pixels [n, 64] -> logits [n, 10]; experts, one for each token, in every second block, or in none."""

    def __init__(self, sparse: bool):
        super().__init__()
        self.inward, self.head = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 10)
        self.place = nn.Parameter(0.1 * torch.randn(SIDE, SIDE, WIDTH))
        self.blocks = nn.ModuleList(
            SwinBlock(experts() if sparse and b % 2 else FeedForward(WIDTH, 2 * WIDTH), b % 2 * (WINDOW // 2))
            for b in range(BLOCKS)
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Routing]]:
        x, routings = self.inward(pixels.view(-1, SIDE, SIDE, 1)) + self.place, []
        for block in self.blocks:
            x, routing = block(x)
            routings += routing
        return self.head(x.mean((1, 2))), routings


def experts() -> MoELayer:
    return Limited(TopKRouter(WIDTH, EXPERTS, 1), GluExperts(EXPERTS, WIDTH, 2 * WIDTH))


def step(model: SwinMoE, pixels: Tensor, labels: Tensor) -> None:
    logits, routings = model(pixels)
    sum((0.01 * load_balance_loss(routing) for routing in routings), F.cross_entropy(logits, labels)).backward()


def accuracy(sparse: bool, seed, progress) -> dict[str, float]:
    (x, y), (test_x, test_y) = split(seed)
    model = SwinMoE(sparse)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(seed)
    batches = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(6)]).split(64)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, len(batches))
    for number in progress.steps(len(batches)):
        step(model, x[batches[number]], y[batches[number]])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    with torch.no_grad():
        logits = model.eval()(test_x)[0]
    return {"accuracy": (logits.argmax(-1) == test_y).double().mean().item()}


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made inside, by any operator, hold at once."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self._seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in {t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)}:
            if storage not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.most = max(self.most, self.live)
        return out

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes


def most_bytes(form, x: Tensor, routing: Routing, C: int) -> int:
    """Of encode and decode, forward and backward, beside their arguments; on "meta" nothing is computed."""
    x, weights = x.detach().requires_grad_(), routing.weights.detach().requires_grad_()
    with Allocated() as allocated:
        form(x, Routing(routing.ids, weights, routing.num_experts), C).sum().backward()
    return allocated.most


def memory(T: int, E: int, k: int, H: int, device: str) -> float:
    """By index, of what the one-hot matrix takes."""
    routing, C = random_routing(T, E, k), k * -(-T // E)
    routing = Routing(routing.ids.to(device), routing.weights.to(device), E)
    x = torch.zeros(T, H, device=device)
    return most_bytes(by_index, x, routing, C) / most_bytes(by_one_hot, x, routing, C)


def compared(seed, progress) -> dict[str, float]:
    """What one-hot matrices take over what indices take, in turns."""
    T, E, k, H = (32, 4, 2, 8) if progress.quick else (4096, 64, 2, 256)
    torch.manual_seed(seed)
    x, routing = torch.randn(T, H), CapacityPolicy(1)(random_routing(T, E, k))
    C = CapacityPolicy(1).capacity(routing)
    torch.testing.assert_close(by_index(x, routing, C), by_one_hot(x, routing, C))
    with torch.no_grad():
        calls = [partial(form, x, routing, C) for form in (by_one_hot, by_index)]
        slow, fast = medians(calls, progress.steps(3))
    figures = {"encode, decode": slow / fast, "memory": memory(8 * T, E, k, H, "meta")}

    (pixels, labels), _ = split(seed)
    pixels, labels = (each[: 4 if progress.quick else 64] for each in (pixels, labels))
    model = SwinMoE(True)
    plain = SwinMoE(True)
    plain.load_state_dict(model.state_dict())
    for block in plain.blocks:
        if isinstance(block.feed_forward, MoELayer):
            block.feed_forward.experts = OneHotExperts(block.feed_forward.experts)
    torch.testing.assert_close(model(pixels)[0], plain(pixels)[0])
    both = [partial(step, each, pixels, labels) for each in (plain, model)]
    slow, fast = medians(both, progress.steps(3))
    figures["training"] = slow / fast
    with torch.no_grad():
        slow, fast = medians([partial(each, pixels) for each in (plain, model)], progress.steps(3))
    return figures | {"inference": slow / fast}


EXPERIMENT = Experiment(
    name="tutel",
    title="Tutel",
    paper="arXiv:2206.03382",
    classes=("CapacityPolicy", "MoELayer"),
    figures={
        "encode, decode": "times as fast as by a one-hot matrix",
        "memory": "of that with a one-hot matrix, at most, forward and backward",
        "training": "images per s / those by a one-hot matrix",
        "inference": "images per s / those by a one-hot matrix",
        "accuracy": "share of test digits",
    },
    claims=(
        Claim(
            "Encode and decode by index are ten times as fast, 4,096 tokens", "encode, decode", "higher", "index", 10.0
        ),
        Claim("and take a quarter of the memory at most, 32,768 tokens", "memory", "lower", "index", 0.25),
        Claim("A small SwinV2-MoE trains faster (paper: 1.55 x)", "training", "higher", "index", 1.55),
        Claim("and infers faster (paper: 2.11 x)", "inference", "higher", "index", 2.11),
        Claim("It is as accurate as its dense counterpart", "accuracy", "higher", "SwinV2-MoE", "dense"),
    ),
    equal="the same parameters, routing and room for choices; dense: the same blocks, with one expert for all tokens",
    notes="Encode and decode stand alone: E = 64, k = 2, H = 256, room for k T / E choices of each expert, float32. "
    "Memory is counted, every tensor that an operator makes while it lives, over tensors without data: 8.6 GB for a "
    "one-hot matrix of 32,768 tokens were not allocated. The model has 4 blocks of width 32, windows of 4 x 4, 8 "
    "experts in every second block, one for each token, room 1.25; a batch of 64 images are 4,096 tokens. The "
    "paper's 1.55 and 2.11 are for SwinV2-B on GPUs beside Fairseq, with attention and exchange in them. Adaptive "
    "parallelism, pipelining and 2DH are in docs/distributed.md.",
    timed=("index",),
    variants={
        "dense": partial(accuracy, False),
        "SwinV2-MoE": partial(accuracy, True),
        "index": compared,
    },
)

if __name__ == "__main__":
    main(EXPERIMENT)
