"""Continuous batching by depth (Mixture-of-Recursions, arXiv:2507.10524): all depths share their weights, so that one
pass through the stack takes tokens of different depths, and a token that is done makes room for the next at once.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moert.layers.packed import Rows
from moert.routers.base import RouterContext
from moert.runtime.skippable_kv import Joined, ModelKV
from moert.types import Routing


@dataclass
class _InFlight:
    """A sequence, and the token of it (the whole prompt at first) that is on its way through the model."""

    number: int
    tokens: Tensor
    left: int
    kv: ModelKV
    pending: int  # tokens at the end of `tokens` that the model has not seen
    depth: int = -1  # -1: has not entered the stack
    x: Tensor | None = None
    start: Tensor | None = None
    next: object = None  # moert.layers.mor.Pass

    @property
    def positions(self) -> Tensor:
        return torch.arange(len(self.tokens) - self.pending, len(self.tokens), device=self.tokens.device)


class DepthBatcher:
    """Greedy or sampled decoding of many sequences with a MoRModel whose tokens decide for themselves (causal_()).

    embed(ids [n]) -> [n, H] and next_token(y [n, H]) -> ids [n] are the model's ends; at most `slots` sequences are in
    flight.  A prompt goes through as one group of rows.  passes counts runs of the stack, rows the rows in them.
    """

    def __init__(self, model, embed: Callable[[Tensor], Tensor], next_token: Callable[[Tensor], Tensor], slots=8):
        if not model.stack.causal:
            raise ValueError("model must decide token by token (stack.causal_()), got one that takes top-k")
        if any(each != model.stack.order[0] for each in model.stack.order):
            raise ValueError(f"model must run the same blocks at every depth, got {model.stack.order}")
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.model, self.embed, self.next_token, self.slots = model, embed, next_token, slots
        self.waiting, self.flying, self.finished = deque(), [], {}
        self.submitted = self.passes = self.rows = 0

    def submit(self, prompt: Tensor, max_new_tokens: int) -> int:
        """The number under which run() returns prompt and continuation; prompt [n] holds at least one id."""
        if prompt.dim() != 1 or len(prompt) == 0:
            raise ValueError(f"prompt must have shape [n] with n at least 1, got {list(prompt.shape)}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.waiting.append((self.submitted, prompt, max_new_tokens))
        self.submitted += 1
        return self.submitted - 1

    def run(self) -> dict[int, Tensor]:
        """Steps until every sequence is done; takes the results with it."""
        while self.waiting or self.flying:
            self.step()
        done, self.finished = self.finished, {}
        return done

    @torch.no_grad()
    def step(self) -> None:
        """Lets in what waits, runs the stack once over all rows in flight, and lets out what is through."""
        while self.waiting and len(self.flying) < self.slots:
            number, prompt, left = self.waiting.popleft()
            self.flying.append(_InFlight(number, prompt, left, self.model.new_kv(1), len(prompt)))
        if entering := [s for s in self.flying if s.depth < 0]:
            self._enter(entering)
        self._pass([s for s in self.flying if s.next is not None])
        if leaving := [s for s in self.flying if s.next is None]:
            self._leave(leaving)

    def _enter(self, group: Sequence[_InFlight]) -> None:
        x = self.embed(torch.cat([s.tokens[len(s.tokens) - s.pending :] for s in group]))
        x = self.model.first(x, _rows([s.positions for s in group]), Joined([s.kv.first for s in group]))
        for s, part in zip(group, x.split([s.pending for s in group]), strict=True):
            s.x, s.start, s.depth, s.next = part, part, 0, None
        self._decide(group)

    def _pass(self, group: Sequence[_InFlight]) -> None:
        if not group:
            return
        stack, active = self.model.stack, [s.next.active for s in group]
        rows = _rows([s.positions[on] for s, on in zip(group, active, strict=True)])
        kv = Joined([s.kv.stack.at(s.depth) for s in group])
        y = stack.run(torch.cat([s.x[on] for s, on in zip(group, active, strict=True)]), rows, 0, kv)
        self.passes, self.rows = self.passes + 1, self.rows + len(y)
        for s, on, part in zip(group, active, y.split([int(on.sum()) for on in active]), strict=True):
            s.x = s.next.residual.index_put((on,), (s.next.weights[on] * part).to(part.dtype), accumulate=True)
            s.depth += 1
        for s in (through := [s for s in group if s.depth == stack.depths]):
            s.next = None
        self._decide([s for s in group if s not in through])

    def _decide(self, group: Sequence[_InFlight]) -> None:
        """Which rows go on; the sequences of one depth are asked together.  next is None where none does."""
        for depth in sorted({s.depth for s in group}):
            same = [s for s in group if s.depth == depth]
            x, start = (torch.cat([getattr(s, name) for s in same]) for name in ("x", "start"))
            before = None if depth == 0 else _together([s.next for s in same])
            each = self.model.stack.decide(depth, x, start, RouterContext(), before)
            for s, part in zip(same, _apart(each, [len(s.x) for s in same]), strict=True):
                s.next = part if part.active.any() else None

    def _leave(self, group: Sequence[_InFlight]) -> None:
        x = torch.cat([s.x for s in group])
        y = self.model.last(x, _rows([s.positions for s in group]), Joined([s.kv.last for s in group]))
        ends = torch.tensor([s.pending for s in group], device=y.device).cumsum(0) - 1
        for s, token in zip(group, self.next_token(y[ends]), strict=True):
            s.tokens, s.left = torch.cat([s.tokens, token.view(1).to(s.tokens.dtype)]), s.left - 1
            s.pending, s.depth, s.x, s.start = 1, -1, None, None
            if s.left == 0:
                self.finished[s.number] = s.tokens
        self.flying = [s for s in self.flying if s.left]


def _rows(positions: Sequence[Tensor]) -> Rows:
    counts = torch.tensor([0, *map(len, positions)])
    return Rows(torch.cat(list(positions)), counts.cumsum(0))


def _together(passes):
    ids, weights, logits = (torch.cat([getattr(p.routing, n) for p in passes]) for n in ("ids", "weights", "logits"))
    routing = Routing(ids, weights, passes[0].routing.num_experts, logits)
    fields = (torch.cat([getattr(p, n) for p in passes]) for n in ("active", "residual", "weights"))
    return type(passes[0])(*fields, routing)


def _apart(whole, sizes: Sequence[int]):
    routing = whole.routing
    tensors = (whole.active, whole.residual, whole.weights, routing.ids, routing.weights, routing.logits)
    for active, residual, weights, ids, own, logits in zip(*(t.split(list(sizes)) for t in tensors), strict=True):
        yield type(whole)(active, residual, weights, Routing(ids, own, routing.num_experts, logits))
