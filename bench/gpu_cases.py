"""What bench/gpu.py times: each operator on the shapes that users run, beside every peer that can be imported.

Letters: T tokens, H hidden, I intermediate, E experts, k choices per token, S = T*k rows.
"""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import gpu_peers
import moert
from gpu_more import Problem, more
from gpu_packed import packed
from moert import ExpertLayout, Routing
from moert.quant import BitNested, Fp8, Int4, Int8, Mxfp4, SubOneBit, Ternary2, Ternary5
from moert.quant.format import Format, RowFormat


@dataclass(frozen=True)
class Layer:
    name: str
    H: int
    I: int
    E: int
    k: int
    turned: bool = False  # its weights lie [E, H, 2I], gates and ups in turns, and [E, I, H]


MODELS = (
    Layer("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Layer("Mixtral-8x7B", 4096, 14336, 8, 2),
    Layer("OLMoE", 2048, 1024, 64, 8),
    Layer("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
    Layer("gpt-oss-20b", 2880, 2880, 32, 4, turned=True),
)
# The shapes of the SonicMoE paper (arXiv:2512.14080), T = 32768.
SONIC = (
    Layer("SonicMoE I=256", 4096, 256, 256, 16),
    Layer("SonicMoE I=512", 4096, 512, 128, 8),
    Layer("SonicMoE I=1024", 4096, 1024, 64, 4),
    Layer("SonicMoE I=2048", 4096, 2048, 64, 4),
)
QUANTIZED = (Int4(32), Int4(128), Int8(), Mxfp4(), Fp8(), Ternary2(), Ternary5(), BitNested(), SubOneBit())


def problems(layer: Layer, T: int, routing: str, device: str, step: bool) -> Iterator[Problem]:
    """One at a time: what a graph keeps is gone before the next; step: also the experts' backward and both ways."""
    made = _Inputs(layer, T, routing, device)
    yield made.gating()
    yield made.plan()
    yield made.permute()
    yield made.unpermute()
    yield made.grouped_gemm()
    yield made.experts()
    for fmt in QUANTIZED:
        yield made.quantized(fmt)
    yield from more(made, step)
    if step:
        yield made.step()
        yield made.backward()
        yield made.quantized_step(QUANTIZED[0])


class _Inputs:
    def __init__(self, layer: Layer, T: int, routing: str, device: str):
        self.layer, self.T, self.shape = layer, T, f"{layer.name} T={T} {routing}"
        self.generator = torch.Generator(device).manual_seed(0)
        self.random = functools.partial(torch.randn, generator=self.generator, device=device)
        H, I, E, k = layer.H, layer.I, layer.E, layer.k
        self.logits = self.random(T, E)
        if routing == "zipf":  # expert e as likely as 1 / (e + 1)
            uniform = torch.rand(T, E, generator=self.generator, device=device)
            self.logits = -(-uniform.log()).log() - torch.arange(1, E + 1, device=device).log()
        self.weights, self.ids = moert.topk_gating(self.logits, k, renormalize=True)
        self.plan_ = moert.permute_plan(self.ids, E)
        self.x = self.random(T, H).bfloat16()
        self.w1 = (self.random(E, 2 * I, H, dtype=torch.bfloat16)) * H**-0.5
        self.w2 = (self.random(E, H, I, dtype=torch.bfloat16)) * I**-0.5
        self.rows = moert.permute(self.x, self.plan_)
        self.order = self.ids.flatten().argsort(stable=True)
        self.used = len(self.ids.unique())

    def gating(self) -> Problem:
        k, logits = self.layer.k, self.logits

        def plain():
            weights = logits.softmax(-1).topk(k).values
            return weights / weights.sum(-1, keepdim=True)

        moved = logits.nbytes + self.T * k * 8
        return Problem(
            "topk_gating",
            self.shape,
            moved,
            0,
            {"moert": lambda: moert.topk_gating(logits, k, renormalize=True)[0], "torch": plain},
        )

    def plan(self) -> Problem:
        ids, E, k = self.ids, self.layer.E, self.layer.k
        numbers = torch.arange(E, device=ids.device)

        def plain():
            order = ids.flatten().argsort(stable=True)
            torch.searchsorted(ids.flatten()[order], numbers)
            return (order // k).int()

        moved = 3 * 4 * self.T * k
        return Problem(
            "permute_plan",
            self.shape,
            moved,
            0,
            {"moert": lambda: moert.permute_plan(ids, E).tokens, "torch": plain},
            exact=True,
        )

    def permute(self) -> Problem:
        tokens = self.plan_.tokens.long()
        return Problem(
            "permute",
            self.shape,
            self.x.nbytes + self.rows.nbytes,
            0,
            {"moert": lambda: moert.permute(self.x, self.plan_), "index_select": lambda: self.x[tokens]},
        )

    def unpermute(self) -> Problem:
        tokens, shares = self.plan_.tokens.long(), self.weights.flatten()[self.order, None]

        def plain():
            return torch.zeros_like(self.x).index_add_(0, tokens, (self.rows * shares).to(self.x.dtype))

        return Problem(
            "unpermute",
            self.shape,
            self.x.nbytes + self.rows.nbytes,
            0,
            {"moert": lambda: moert.unpermute(self.rows, self.plan_, self.weights), "index_add": plain},
        )

    def grouped_gemm(self) -> Problem:
        offsets, ends = self.plan_.offsets, self.plan_.offsets[1:].contiguous()
        bounds = offsets.tolist()
        S, N, K = len(self.rows), self.w1.shape[1], self.w1.shape[2]

        def loop():
            parts = zip(bounds[:-1], bounds[1:], self.w1, strict=True)
            return torch.cat([self.rows[begin:end] @ w.T for begin, end, w in parts])

        providers = {"moert": lambda: moert.grouped_gemm(self.rows, self.w1, offsets), "loop": loop}
        providers["moert persistent"] = _asking("MOERT_PERSISTENT_GEMM", providers["moert"])
        if hasattr(F, "grouped_mm"):
            providers["grouped_mm"] = lambda: F.grouped_mm(self.rows, self.w1.transpose(1, 2), offs=ends)
        moved = self.used * N * K * 2 + self.rows.nbytes + S * N * 2
        return Problem("grouped_gemm", self.shape, moved, 2.0 * S * N * K, providers)

    def experts(self) -> Problem:
        forwards = self._forwards()
        for name in ("moert", "moert persistent"):
            forwards[f"{name} fused combine"] = _asking("MOERT_FUSED_COMBINE", forwards[name])
            if self.layer.turned:
                forwards[f"{name} turned"] = self._turned(forwards[name])
        providers = {}
        for name, forward in (forwards | gpu_peers.inference_peers(self.layer, self.ids)).items():
            providers[name] = torch.inference_mode()(functools.partial(forward, self.x, self.weights, self.w1, self.w2))
        return Problem("fused_experts", self.shape, self._moved(), self._flop(), providers)

    def _turned(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same experts with their weights as the layer's checkpoints have them."""
        E, I, H = self.layer.E, self.layer.I, self.layer.H
        w1 = self.w1.view(E, 2, I, H).transpose(1, 2).reshape(E, 2 * I, H).mT.contiguous()
        w2, layout = self.w2.mT.contiguous(), ExpertLayout(transposed=True, interleaved=True)
        return lambda x, weights, *_: forward(x, weights, w1, w2, layout)

    def quantized(self, fmt: Format | SubOneBit) -> Problem:
        """Beside the same weights in bfloat16."""
        (first, w1), (second, w2) = packed(fmt, self.w1, self.generator), packed(fmt, self.w2, self.generator)
        routing = Routing(self.ids, self.weights, self.layer.E)
        op = functools.partial(moert.fused_experts_quantized, self.x, routing, first, second)
        providers = {"moert": functools.partial(op, precision="full")}
        if isinstance(fmt, RowFormat):
            providers |= {f"moert {rows}": functools.partial(op, precision=rows) for rows in ("int8", "int8_group32")}
        if isinstance(fmt, Fp8):
            providers["moert fp8_group128"] = functools.partial(op, precision="fp8_group128")
        providers["moert bf16"] = lambda: moert.fused_experts(self.x, routing, w1, w2)
        moved = self.used * (first.nbytes + second.nbytes) / self.layer.E + 2 * self.x.nbytes
        return Problem(f"fused_experts {fmt}", self.shape, moved, self._flop(), providers)

    def quantized_step(self, fmt: RowFormat) -> Problem:
        """Forward and the gradients of x and the routing weights; compared by that of x."""
        (first, w1), (second, w2) = packed(fmt, self.w1, self.generator), packed(fmt, self.w2, self.generator)
        dy = self.random(*self.x.shape).bfloat16()

        def provider(forward, *matrices):
            leaves = [x.detach().requires_grad_() for x in (self.x, self.weights)]

            def run():
                y = forward(leaves[0], Routing(self.ids, leaves[1], self.layer.E), *matrices)
                return torch.autograd.grad(y, leaves, dy)[0]

            return run

        providers = {
            "moert": provider(moert.fused_experts_quantized, first, second),
            "moert bf16": provider(moert.fused_experts, w1, w2),
        }
        moved = 3 * self.used * (first.nbytes + second.nbytes) / self.layer.E + 6 * self.x.nbytes
        return Problem(f"fused_experts {fmt} step", self.shape, moved, 3 * self._flop(), providers)

    def step(self) -> Problem:
        """Forward and the gradients of x, the routing weights and the weights; compared by that of x."""
        dy = self.random(*self.x.shape).bfloat16()

        def provider(forward):
            leaves = [x.detach().requires_grad_() for x in (self.x, self.weights, self.w1, self.w2)]
            return lambda: torch.autograd.grad(forward(*leaves), leaves, dy)[0]

        forwards = {name: forward for name, forward in self._forwards().items() if not name.endswith("batched_mm")}
        providers = {name: provider(forward) for name, forward in forwards.items()}
        return Problem("fused_experts step", self.shape, 3 * self._moved(), 3 * self._flop(), providers)

    def backward(self) -> Problem:
        """The same gradients of a forward that has been: made, or with moert also added to float32 main_grads."""
        dy = self.random(*self.x.shape).bfloat16()
        tensors = (self.x, self.ids, self.weights, self.w1, self.w2, None, None)
        choices = ("swiglu", 1.702, 7.0, False, False, "output")
        _, h = torch.ops.moert.fused_experts(*tensors, *choices, True)
        sums = [torch.zeros(w.shape, device=w.device) for w in (self.w1, self.w2)]
        ops = torch.ops.moert

        def provider(forward):
            leaves = [x.detach().requires_grad_() for x in (self.x, self.weights, self.w1, self.w2)]
            y = forward(*leaves)
            return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)[0]

        def adding():
            return ops.fused_experts_backward_(dy, *tensors, h, *sums, None, None, *choices, 0b1111)[0]

        providers = {
            "moert": lambda: ops.fused_experts_backward(dy, *tensors, h, *choices, 0b1111)[0],
            "moert main_grad": adding,
        }
        for name, forward in self._forwards().items():
            if not name.startswith("moert") and not name.endswith("batched_mm"):
                providers[name] = provider(forward)
        return Problem("fused_experts backward", self.shape, 2 * self._moved(), 2 * self._flop(), providers)

    def _moved(self) -> float:
        matrices = self.used * (self.w1[0].nbytes + self.w2[0].nbytes)
        return matrices + 2 * self.x.nbytes

    def _flop(self) -> float:
        return 6.0 * self.T * self.layer.k * self.layer.H * self.layer.I

    def _forwards(self) -> dict[str, Callable[..., Tensor]]:
        """forward(x, weights, w1, w2) of all that has gradients."""
        ids, E = self.ids, self.layer.E
        forwards = {
            "moert": lambda x, weights, w1, w2, layout=ExpertLayout(): moert.fused_experts(
                x, Routing(ids, weights, E), w1, w2, layout=layout
            ),
            **gpu_peers.peers(self.layer, ids, self.T),
        }
        forwards["moert persistent"] = _asking("MOERT_PERSISTENT_GEMM", forwards["moert"])
        return forwards


def _asking(name: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The call with what `name` in the environment asks for, where the device and the call have it."""

    @functools.wraps(call)
    def run(*args):
        before = os.environ.get(name, "")
        os.environ[name] = "1"
        try:
            return call(*args)
        finally:
            os.environ[name] = before

    return run
