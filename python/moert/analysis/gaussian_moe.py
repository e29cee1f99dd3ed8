"""Softmax-gated mixtures of linear Gaussian experts: density, maximum likelihood, Fisher information.

p(y | x) = sum_i pi_i(x) N(y; a_i . x + b_i, sigma_i^2); the gate is linear, passes an activation (arXiv:2401.13875)
or keeps the K largest scores (2309.13850).  Letters: k experts, d inputs, n samples, P free parameters.  All float64.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = ("linear", "activation", "topk")
ACTS = {"identity": lambda z: z, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu}
BIASES = ("outside", "inside")
SIGMA_FLOOR = 1e-4


@dataclass(frozen=True)
class GaussianMoE:
    """k experts of d inputs: beta1 [k, d], beta0 [k], tau [], a [k, d], b [k], sigma [k].

    Parameters that are not given: tau and sigma 1, beta0[-1] 0, the others standard normal (torch.manual_seed).

    The gate is softmax((act(beta1 x) + beta0) / tau), or with bias "inside" act(beta1 x + beta0); "linear" has no act
    and "topk" keeps the K largest of beta1 x (+ beta0 if rank_with_bias), ties by the lower expert.  beta0[-1] (unless
    inside), and for gates without an activation beta1[-1], are fixed while fitting: a softmax does not see a common
    shift.
    """

    k: int
    gate: str = "linear"
    act: str = "identity"
    K: int | None = None
    rank_with_bias: bool = False
    bias: str = "outside"
    d: int = 1
    beta1: Tensor | None = None
    beta0: Tensor | None = None
    tau: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    sigma: Tensor | None = None

    def __post_init__(self):
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, got {self.gate}")
        if self.act not in ACTS:
            raise ValueError(f"act must be one of {', '.join(ACTS)}, got {self.act}")
        if (self.gate == "activation") == (self.act == "identity"):
            raise ValueError(f"act must be given with gate activation and no other, got {self.act} with {self.gate}")
        if self.bias not in BIASES or (self.bias == "inside" and self.gate != "activation"):
            raise ValueError(f"bias must be outside, or inside with gate activation, got {self.bias} with {self.gate}")
        if (self.gate == "topk") != (self.K is not None) or (self.K is not None and not 1 <= self.K <= self.k):
            raise ValueError(f"K must be in [1, k={self.k}] with gate topk and None without, got {self.K}")
        shapes = {"beta1": (self.k, self.d), "beta0": (self.k,), "tau": (), "a": (self.k, self.d), "b": (self.k,)}
        for name, shape in (shapes | {"sigma": (self.k,)}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, _initial(name, shape))
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(getattr(self, name).shape)}")

    def log_gate(self, x: Tensor) -> Tensor:
        """x [n, d] -> log pi [n, k], -inf where an expert is not among the K."""
        z = x @ self.beta1.T
        act = ACTS[self.act]
        scores = (act(z + self.beta0) if self.bias == "inside" else act(z) + self.beta0) / self.tau
        if self.gate == "topk":
            ranked = (z + self.beta0 if self.rank_with_bias else z).sort(descending=True, stable=True).indices
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ranked[:, : self.K], True)
            scores = scores.masked_fill(~kept, -torch.inf)
        return scores.log_softmax(-1)

    def log_joint(self, x: Tensor, y: Tensor) -> Tensor:
        """log of pi_i(x) N_i(y | x): [n, k]."""
        z = (y[:, None] - x @ self.a.T - self.b) / self.sigma
        return self.log_gate(x) - 0.5 * z.square() - self.sigma.log() - 0.5 * math.log(2 * math.pi)

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(y | x): x [n, d], y [n] -> [n]."""
        return self.log_joint(x, y).logsumexp(-1)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """y [n], drawn from p(y | x)."""
        expert = torch.multinomial(self.log_gate(x).exp(), 1, generator=generator)
        mean = (x @ self.a.T + self.b).gather(1, expert)[:, 0]
        noise = torch.randn(len(x), dtype=x.dtype, generator=generator)
        return mean + self.sigma[expert[:, 0]] * noise

    def draw(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x [n, d], uniform in [-4, 4], and y [n]."""
        x = 8 * torch.rand(n, self.d, dtype=torch.float64, generator=generator) - 4
        return x, self.sample(x, generator)

    @property
    def _biases(self) -> int:
        """How many of beta0 are free."""
        return self.k if self.bias == "inside" else self.k - 1

    def free(self) -> Tensor:
        """The free parameters [P]; tau and sigma by their logarithms."""
        gate = (self.beta1 if self.gate == "activation" else self.beta1[:-1]).flatten()
        parts = (gate, self.beta0[: self._biases], self.tau.log()[None], self.a.flatten(), self.b, self.sigma.log())
        return torch.cat(parts)

    def with_free(self, free: Tensor) -> "GaussianMoE":
        """The same model with other free parameters."""
        k, d = self.a.shape
        rows = k if self.gate == "activation" else k - 1
        sizes = (rows * d, self._biases, 1, k * d, k, k)
        beta1, beta0, log_tau, a, b, log_sigma = free.split(sizes)
        return replace(
            self,
            beta1=torch.cat([beta1.view(rows, d), self.beta1[rows:]]),
            beta0=torch.cat([beta0, self.beta0[self._biases :]]),
            tau=log_tau[0].exp(),
            a=a.view(k, d),
            b=b,
            sigma=log_sigma.exp().clamp_min(SIGMA_FLOOR),
        )

    def fisher(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """information of n draws."""
        return self.information(*self.draw(n, generator))

    def information(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean outer product of the scores of every parameter [Q, Q], with all of beta1 and tau itself free."""
        names = ("beta1", "beta0", "tau", "a", "b", "sigma")
        parts = [getattr(self, name) if name != "beta0" else self.beta0[: self._biases] for name in names]

        def of(flat, x, y):
            values = [v.view(p.shape) for v, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
            values[1] = torch.cat([values[1], self.beta0[self._biases :]])
            model = replace(self, **dict(zip(names, values, strict=True)))
            return model.log_density(x[None], y[None])[0]

        flat = torch.cat([p.flatten() for p in parts])
        scores = torch.func.vmap(torch.func.grad(of), (None, 0, 0))(flat, x, y)
        return scores.T @ scores / len(x)

    def fit(self, x: Tensor, y: Tensor, method: str = "bfgs", iterations: int = 200) -> "GaussianMoE":
        """Maximum likelihood from here on: "bfgs" on the likelihood, or "em"."""
        if method == "bfgs":
            return _ascend(self, lambda m: m.log_density(x, y).mean(), iterations)
        if method != "em":
            raise ValueError(f"method must be bfgs or em, got {method}")
        model, before = self, -math.inf
        for _ in range(iterations):
            joint = model.log_joint(x, y)
            likelihood = joint.logsumexp(-1).mean().item()
            if likelihood - before < 1e-8:
                break
            before = likelihood
            model = _maximise(model, x, y, (joint - joint.logsumexp(-1, keepdim=True)).exp())
        return model

    def voronoi_loss(self, true: "GaussianMoE") -> float:
        """Distance of two mixing measures: atoms count for the nearest true one, squared where several share it.

        Sum over true atoms of the difference of masses e^beta0 and of e^beta0_i times the distances of (beta1, a, b,
        sigma), plus |tau - tau'|.
        """
        atoms = [torch.cat([m.beta1, m.a, m.b[:, None], m.sigma[:, None]], 1) for m in (self, true)]
        cell, mass = torch.cdist(*atoms).argmin(1), self.beta0.exp()
        total = (self.tau - true.tau).abs()
        for j in range(true.k):
            mine = cell == j
            distance = (atoms[0][mine] - atoms[1][j]).abs()
            distance = distance if int(mine.sum()) < 2 else distance.square()
            total = total + (mass[mine].sum() - true.beta0[j].exp()).abs() + (mass[mine, None] * distance).sum()
        return total.item()


def matched(fitted: GaussianMoE, true: GaussianMoE) -> GaussianMoE:
    """fitted with its experts in the order of the true ones that they are nearest to (by a, b), as many as these."""
    distance = torch.cdist(*(torch.cat([m.a, m.b[:, None]], 1) for m in (true, fitted)))
    order, left = [], list(range(fitted.k))
    for j in range(true.k):
        order.append(left.pop(int(distance[j, left].argmin())))
    beta0, beta1 = fitted.beta0[order], fitted.beta1[order]
    if fitted.gate != "activation":  # the shift that the gate does not see
        beta1 = beta1 - beta1[-1] + true.beta1[-1]
    if fitted.bias == "outside":
        beta0 = beta0 - beta0[-1] + true.beta0[-1]
    rest = {name: getattr(fitted, name)[order] for name in ("a", "b", "sigma")}
    return replace(fitted, k=true.k, beta0=beta0, beta1=beta1, **rest)


def _initial(name: str, shape: tuple[int, ...]) -> Tensor:
    if name in ("tau", "sigma"):
        return torch.ones(shape, dtype=torch.float64)
    drawn = torch.randn(shape, dtype=torch.float64)
    if name == "beta0":
        drawn[-1:] = 0
    return drawn


def _ascend(model: GaussianMoE, value, iterations: int) -> GaussianMoE:
    """L-BFGS on the free parameters."""
    free = model.free().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def closure():
        optimizer.zero_grad()
        loss = -value(model.with_free(free))
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.with_free(free.detach())


def _maximise(model: GaussianMoE, x: Tensor, y: Tensor, shares: Tensor) -> GaussianMoE:
    """The M-step: weighted least squares for the experts, eight L-BFGS iterations for the gate."""
    design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    gram = torch.einsum("nk,nd,ne->kde", shares, design, design) + 1e-12 * torch.eye(design.shape[1], dtype=x.dtype)
    line = torch.linalg.solve(gram, torch.einsum("nk,nd,n->kd", shares, design, y)[..., None])[..., 0]
    squares = (shares * (y[:, None] - design @ line.T).square()).sum(0) / shares.sum(0).clamp_min(1e-300)
    model = replace(model, a=line[:, :-1], b=line[:, -1], sigma=squares.sqrt().clamp_min(SIGMA_FLOOR))

    def gate_likelihood(other):
        log_gate = other.log_gate(x)
        return torch.where(shares > 0, shares * log_gate, 0).sum(-1).mean()

    ascended = _ascend(model, gate_likelihood, 8)
    return replace(model, beta1=ascended.beta1, beta0=ascended.beta0, tau=ascended.tau)
