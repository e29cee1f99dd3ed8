"""Experts whose kind of parallelism may be another at each call, while no parameter moves (Tutel, arXiv 2206.03382).

Letters: E experts, R ranks, s slices of each expert, k choices per token.
"""

import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from moert.experts.base import Experts, check_added
from moert.experts.glu import GluExperts
from moert.ops.all_to_all import agree, exchange_counts, refusing
from moert.ops.kinds import expect
from moert.ops.ranks import Ranks
from moert.parallel.options import check_local_size, checksum, replicas_of, telling
from moert.parallel.pulse import Group, Pulse, process_group
from moert.parallel.settings import DEGREES, Setting, SettingsCache, check_window
from moert.parallel.slices import SlicedExperts, divisors
from moert.types import Onto, Routing

AUTO = "auto"
NAMES = Setting._fields
MADE = ("window", "local_size", "E", "H", "I")  # with what; the rest is compared by ExpertParallel, and at each call
FACTS = (
    *(f'{name} == "auto"' for name in NAMES), *NAMES, "window", "the checksum of allowed", "the need for gradients",
)  # fmt: skip


class AdaptiveExperts(Experts):
    """This rank's part of `experts`, which every rank of the group makes alike: same results whatever r and degree are.

    A rank holds E / R whole experts, or where E < R one of the s = R / E equal slices of an expert's intermediate size
    (s = 1 otherwise).  r, degree and levels, attributes that may be set between calls, alike on every rank, say what
    travels:

        r = 0       every rank gathers all parameters and computes its own tokens; no token travels
        r = 1       a token travels to one rank for each of its experts, which has gathered that expert's slices
        1 < r < s   to r ranks, each of which has gathered s / r slices; r must divide s
        r = s       to the s ranks that hold the expert's slices; no parameter travels
        degree      into how many parts tokens are cut, as in ExpertParallel: 1, 2, 4 or 8 (r = 0: no matter)
        levels      1: tokens travel straight, or 2: within nodes of local_size ranks first (Ranks.in_nodes)

    "auto": the best for the load, which is the most choices (T * k) of any rank, is learnt for each `window` of them by
    a SettingsCache, apart for calls with and without gradients.  While it is not known each call tries a setting; what
    counts is the time of the slowest rank, by time.perf_counter: from the call to its return, and where gradients flow
    from that of the output until all those of the inputs and parameters are there.  allowed holds what may be tried; it
    may be narrowed, alike on every rank: r copies of each token need memory.

    Every rank must call forward, and backward where it called forward, equally often.  gradients, replicas and pulse
    are those of ExpertParallel; so is `added`.  Where r, degree, levels, window, allowed or the need for gradients
    differ between ranks, or one has an error of its own, all raise one that names the ranks, before anything else
    travels.
    """

    def __init__(
        self,
        experts: GluExperts,
        group: Group = None,
        r: int | str = AUTO,
        degree: int | str = AUTO,
        levels: int | str = AUTO,
        window: int = 128,
        local_size: int | None = None,
        gradients: str = "sum",
        replicas: Group = None,
        pulse: Pulse | None = None,
    ):
        super().__init__()
        self.group = process_group(group)
        ranks = Ranks(self.group, None if pulse is None else pulse.exchanging)
        self.r, self.degree, self.levels, self.window = r, degree, levels, window
        with refusing(ranks, MADE):
            others = replicas_of(self.group, replicas)
        with telling(others):
            with refusing(ranks, MADE):
                self.s = _slices_of_each(experts, ranks.size)
                check_window(window)
                check_local_size(local_size, ranks.size)
                near = local_size is not None and 1 < local_size < ranks.size
                self.allowed = {"r": (0, *divisors(self.s)), "degree": DEGREES, "levels": (1, 2)[: 1 + near]}
                self._check_settings()
            made = window, local_size, experts.num_experts, experts.hidden, experts.intermediate
            agree(dict(zip(MADE, made, strict=True)), ranks)
        self.num_experts, self.hidden = experts.num_experts, experts.hidden
        self.slices = SlicedExperts(experts, self.s, self.group, gradients=gradients, replicas=replicas, pulse=pulse)
        self._ways = [self.slices.ranks]
        if local_size is not None:
            in_nodes = Ranks.in_nodes(local_size, self.group, pulse and pulse.exchanging, self.slices.ranks.layer)
            self._ways += [in_nodes] if near else []
        self.caches: dict[tuple, SettingsCache] = {}  # by r, degree, levels and whether gradients flow
        self._clocks: dict[tuple, _Clock] = {}

    @torch.compiler.disable  # a graph holds one way, and no clock
    def forward(self, x: Tensor, routing: Routing, added: Onto | nn.Module | None = None) -> Tensor:
        (r, degree, levels), clock = self._agree(x, routing, added)
        if clock is not None:
            x, routing = clock.start(x, routing, self.parameters())
        if r == 0:
            onto = Onto(added(x)) if isinstance(added, nn.Module) else added
            check_added(None if onto is None else onto.rows, x)
            y = self.slices.here(x, routing, onto)
        else:
            slices = self.slices
            slices.degree, slices.together, slices.ranks = degree, self.s // r, self._ways[levels - 1]
            y = slices(x, self._to_slices(routing, r), added)
        return y if clock is None else clock.stop(y)

    def onto(self, x: Tensor, routing: Routing, onto: Onto) -> Tensor:
        return self(x, routing, onto)

    def beside(self, x: Tensor, routing: Routing, shared: nn.Module) -> Tensor:
        return self(x, routing, shared)

    def whole(self) -> dict[str, Tensor]:
        """Parameters of all experts by name, [E, ...] as in GluExperts; every rank of the group must ask for them."""
        return self.slices.whole()

    def _to_slices(self, routing: Routing, r: int) -> Routing:
        """Each choice as r, of slices on ranks that lie s / r apart; which of these s / r the token's place decides."""
        if self.s == 1:
            return routing
        n, ids = self.s // r, routing.ids.long()
        first = ids * self.s + (torch.arange(len(ids), device=ids.device) % n)[:, None]
        known = (ids >= 0) & (ids < self.num_experts)
        slices = torch.where(known, first, -1)[:, :, None] + torch.arange(r, device=ids.device) * n
        slices = torch.where(known[:, :, None], slices, -1).flatten(1)
        return Routing(slices, routing.weights.repeat_interleave(r, 1), self.num_experts * self.s)

    def _agree(self, x: Tensor, routing: Routing, added) -> tuple[Setting, "_Clock | None"]:
        """The setting of this call, the same on every rank, and a clock where it is to be timed."""
        ranks = self._ways[0]
        with refusing(ranks, FACTS):
            self._check(x, routing, added)
            learnt = self.window, checksum([tuple(self.allowed[name]) for name in NAMES])
        asked = [getattr(self, name) for name in NAMES]
        inputs = (x, routing.weights, *self.parameters())
        needs = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        autos, numbers = (_yes(spec == AUTO) for spec in asked), (0 if spec == AUTO else spec for spec in asked)
        facts = zip(FACTS, (*autos, *numbers, *learnt, _yes(needs)), strict=True)
        counts = torch.full((ranks.size,), routing.ids.numel())
        size = max(exchange_counts(counts, dict(facts), ranks).received)
        candidates = [self.allowed[n] if spec == AUTO else (spec,) for n, spec in zip(NAMES, asked, strict=True)]
        if all(len(each) == 1 for each in candidates):
            return Setting(*(each[0] for each in candidates)), None
        key = *asked, needs
        cache, fresh = self.caches.get(key), SettingsCache(*candidates, self.window)
        clock = self._clocks.pop(key, None)
        if cache is None or (cache.candidates, cache.window) != (fresh.candidates, fresh.window):  # set anew
            cache = self.caches[key] = fresh
            if clock is not None:
                clock.forget()
        elif clock is not None:
            self._record(clock, cache)
        setting = cache.choose(size)
        if cache.knows(size):
            return setting, None
        self._clocks[key] = _Clock(size)
        return setting, self._clocks[key]

    def _record(self, clock: "_Clock", cache: SettingsCache) -> None:
        """Unless a rank has not come to the end of its backward: then the same setting is tried again."""
        taken = torch.inf if clock.seconds is None else clock.seconds
        seconds = torch.tensor(taken, dtype=torch.float64, device=self._ways[0].device)
        with self._ways[0].guarded():
            dist.all_reduce(seconds, dist.ReduceOp.MAX, group=self.group)
        clock.forget()
        if seconds.isfinite():
            cache.record(clock.size, seconds.item())

    def _check(self, x: Tensor, routing: Routing, added) -> None:
        expect(Tensor, x=x)
        expect(Routing, routing=routing)
        expect((Onto, nn.Module, type(None)), added=added)
        check_window(self.window)
        self._check_settings()
        if x.dim() != 2 or x.shape[1] != self.hidden:
            raise ValueError(f"x must have shape [T, H={self.hidden}], got {list(x.shape)}")
        if routing.num_experts != self.num_experts:
            raise ValueError(f"routing must be to E={self.num_experts} experts, got {routing.num_experts}")
        if isinstance(added, Onto):
            check_added(added.rows, x)

    def _check_settings(self) -> None:
        for name, allowed in self.allowed.items():
            got = getattr(self, name)
            if got != AUTO and not (type(got) is int and got in allowed):
                raise ValueError(f'{name} must be "auto" or one of {", ".join(map(str, allowed))}, got {got}')

    def extra_repr(self) -> str:
        asked = ", ".join(f"{name}={getattr(self, name)}" for name in NAMES)
        return f"num_experts={self.num_experts}, slices_of_each={self.s}, {asked}"


def _slices_of_each(experts: GluExperts, num_ranks: int) -> int:
    expect(GluExperts, experts=experts)
    E, R = experts.num_experts, num_ranks
    if E % R and R % E:
        raise ValueError(f"experts must be a multiple or a divisor of the R={R} ranks, got {E}")
    s = max(1, R // E)
    if experts.intermediate % s:
        raise ValueError(f"experts must have an intermediate size that {s} divides, got {experts.intermediate}")
    if experts.down_proj_bias is not None and experts.hidden % s:
        raise ValueError(f"experts with bias must have a hidden size that {s} divides, got {experts.hidden}")
    return s


def _yes(true: bool) -> str:
    return "yes" if true else "no"


class _Clock:
    """How long a call took on this rank, with its backward where it has one; None until that has ended."""

    def __init__(self, size: int):
        self.size, self.seconds = size, None
        self._inputs, self._hooks, self._began, self._forward = [], [], 0.0, 0.0
        self._turned = False

    def start(self, x: Tensor, routing: Routing, parameters) -> tuple[Tensor, Routing]:
        # Views, whose gradients are those of this call alone.
        x, routing = x.view_as(x), replace(routing, weights=routing.weights.view_as(routing.weights))
        self._inputs = [t for t in (x, routing.weights, *parameters) if t.requires_grad]
        self._began = time.perf_counter()
        return x, routing

    def stop(self, y: Tensor) -> Tensor:
        self._forward = time.perf_counter() - self._began
        if y.requires_grad:
            self._hooks = [y.register_hook(self._turn), register_multi_grad_hook(self._inputs, self._end)]
        else:
            self.seconds = self._forward
        self._inputs = []
        return y

    def _turn(self, grad: Tensor) -> None:
        self._began, self._turned = time.perf_counter(), True

    def _end(self, grads) -> None:
        if not self._turned:  # gradients of another call
            return
        self.seconds = self._forward + time.perf_counter() - self._began
        self.forget()

    def forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
