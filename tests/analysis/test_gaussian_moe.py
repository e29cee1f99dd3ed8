import math
from dataclasses import replace

import pytest
import torch

from moert.analysis.gaussian_moe import GaussianMoE, matched


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def model(act="identity", gate=None, K=None):
    gate = gate or ("linear" if act == "identity" else "activation")
    experts = {"a": tensor(-2, 2)[:, None], "b": tensor(1, -1), "sigma": tensor(0.3, 0.4)}
    gates = {"beta1": tensor(2, 0.7)[:, None], "beta0": tensor(0.5, 0), "tau": tensor(0.2)[0]}
    return GaussianMoE(2, gate, act, K, **gates, **experts)


def data(true, n=400, seed=0):
    return true.draw(n, torch.Generator().manual_seed(seed))


def test_parameters_not_given():
    """Four experts of three inputs, drawn anew by seed; what they say of data is a density."""
    torch.manual_seed(3)
    one = GaussianMoE(4, gate="activation", act="gelu", d=3)
    assert one.beta1.shape == one.a.shape == (4, 3) and one.beta0[-1] == 0 and one.tau == 1
    assert torch.equal(one.sigma, torch.ones(4, dtype=torch.float64)) and not torch.equal(one.a[0], one.a[1])
    x, y = data(one, 50)
    assert x.shape == (50, 3) and x.abs().max() <= 4 and one.log_density(x, y).isfinite().all()
    torch.manual_seed(3)
    assert torch.equal(GaussianMoE(4, gate="activation", act="gelu", d=3).a, one.a)
    information = one.fisher(50, torch.Generator().manual_seed(0))
    assert torch.equal(information, one.information(x, y))
    with pytest.raises(ValueError, match=r"a must have shape \[4, 3\], got \[4, 1\]"):
        replace(one, a=one.a[:, :1])


def test_density_against_a_loop():
    true = model("tanh")
    x, y = data(true, 20)
    for t in range(20):
        z = [(math.tanh(true.beta1[i] * x[t]) + true.beta0[i].item()) / 0.2 for i in (0, 1)]
        p = 0
        for i in (0, 1):
            gate = math.exp(z[i]) / sum(math.exp(v) for v in z)
            s = true.sigma[i].item()
            p += (
                gate
                * math.exp(-(((y[t] - true.a[i] * x[t] - true.b[i]).item() / s) ** 2) / 2)
                / s
                / math.sqrt(2 * math.pi)
            )
        assert true.log_density(x, y)[t].item() == pytest.approx(math.log(p))
    grid = torch.linspace(-30, 30, 20001, dtype=torch.float64)
    total = true.log_density(torch.full((20001, 1), 0.7, dtype=torch.float64), grid).exp().sum() * (grid[1] - grid[0])
    assert total.item() == pytest.approx(1, abs=1e-6)


def test_the_bias_may_be_inside_the_activation():
    """Then no shift is common to all scores: every bias is free."""
    inside = replace(model("tanh"), bias="inside", beta0=tensor(0.5, -0.3))
    x, y = data(inside, 3000)
    expected = (torch.tanh(x @ inside.beta1.T + inside.beta0) / inside.tau).log_softmax(-1)
    torch.testing.assert_close(inside.log_gate(x), expected)
    free = inside.free()
    assert len(free) == len(model("tanh").free()) + 1
    again = inside.with_free(free)
    for name in ("beta1", "beta0", "tau", "a", "b", "sigma"):
        torch.testing.assert_close(getattr(again, name), getattr(inside, name))
    information = inside.information(x, y)
    assert information.shape == (11, 11) and torch.linalg.eigvalsh(information)[0] > 1e-5
    best = inside.with_free(free + 0.05).fit(x, y)
    assert best.beta0[-1] != inside.beta0[-1] and (best.a - inside.a).abs().max() < 0.05
    assert best.log_density(x, y).mean() >= inside.log_density(x, y).mean()
    swapped = replace(inside, **{n: getattr(inside, n).flip(0) for n in ("beta1", "beta0", "a", "b", "sigma")})
    assert torch.equal(matched(swapped, inside).beta0, inside.beta0)


@pytest.mark.parametrize("c", (0.5, 2.0, 10.0))
def test_a_linear_gate_does_not_know_its_temperature(c):
    x, y = data(model())
    for act in ("identity", "tanh", "sigmoid", "gelu"):
        one = model(act)
        other = replace(one, beta1=c * one.beta1, beta0=c * one.beta0, tau=c * one.tau)
        difference = (one.log_density(x, y) - other.log_density(x, y)).abs()
        assert difference.max() <= 1e-9 if act == "identity" else difference.mean() > 1e-4


def test_information():
    # Linear: the ray, and the common shift of beta1; an activation leaves no direction without information.
    assert torch.linalg.eigvalsh(model().information(*data(model(), 10_000)))[:2].abs().max() < 1e-10
    for act in ("tanh", "gelu", "sigmoid"):
        assert torch.linalg.eigvalsh(model(act).information(*data(model(act), 10_000)))[0] > 1e-5


def test_topk_gate_keeps_k_experts():
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    gate = model(gate="topk", K=1).log_gate(x)
    assert torch.equal(gate == 0, torch.stack([x[:, 0] >= 0, x[:, 0] < 0], 1))
    both = model(gate="topk", K=2).log_gate(x)
    torch.testing.assert_close(both, model().log_gate(x))
    by_bias = replace(model(gate="topk", K=1), rank_with_bias=True).log_gate(x)
    assert torch.equal(by_bias[:, 0] == 0, 1.3 * x[:, 0] + 0.5 >= 0)


@pytest.mark.parametrize("method", ("bfgs", "em"))
def test_fit_climbs_and_comes_near(method):
    true = model("tanh")
    x, y = data(true, 2000)
    start = true.with_free(true.free() + 0.1 * torch.randn(len(true.free()), dtype=torch.float64))
    best = start.fit(x, y, method)
    assert best.log_density(x, y).mean() >= true.log_density(x, y).mean() > start.log_density(x, y).mean()
    assert (best.a - true.a).abs().max() < 0.05 and (best.b - true.b).abs().max() < 0.1
    assert best.beta0[-1] == true.beta0[-1]


def test_both_methods_find_the_same():
    true = model()
    x, y = data(true, 1000)
    one, other = (true.fit(x, y, method, 500) for method in ("bfgs", "em"))
    torch.testing.assert_close(one.a, other.a, rtol=0, atol=1e-3)
    assert one.log_density(x, y).mean().item() == pytest.approx(other.log_density(x, y).mean().item(), abs=1e-5)


def test_matching_and_voronoi_loss():
    true = model()
    swapped = replace(true, **{n: getattr(true, n).flip(0) for n in ("beta1", "beta0", "a", "b", "sigma")})
    back = matched(swapped, true)
    for name in ("beta1", "beta0", "a", "b", "sigma"):
        torch.testing.assert_close(getattr(back, name), getattr(true, name))
    shifted = replace(swapped, beta1=swapped.beta1 + 3, beta0=swapped.beta0 - 2)  # which a linear gate does not see
    torch.testing.assert_close(matched(shifted, true).beta1, true.beta1)
    torch.testing.assert_close(matched(shifted, true).beta0, true.beta0)
    assert true.voronoi_loss(true) == 0 and swapped.voronoi_loss(true) == 0
    moved = replace(true, a=true.a + tensor(0.1, 0)[:, None], tau=true.tau + 0.3)
    assert moved.voronoi_loss(true) == pytest.approx(0.3 + 0.1 * math.exp(0.5))
    twice = {n: torch.cat([getattr(true, n)[:1], getattr(true, n)]) for n in ("beta1", "a", "b", "sigma")}
    split = replace(true, k=3, beta0=tensor(0.5 - math.log(2), 0.5 - math.log(2), 0), **twice)
    assert split.voronoi_loss(true) == pytest.approx(0, abs=1e-12)
    near = replace(split, b=split.b + tensor(0.1, 0, 0))
    assert near.voronoi_loss(true) == pytest.approx(0.01 * math.exp(0.5) / 2)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"gate": "dense"}, "gate must be one of linear, activation, topk, got dense"),
        ({"act": "relu"}, "act must be one of identity, sigmoid, tanh, gelu, got relu"),
        ({"act": "tanh"}, "act must be given with gate activation and no other, got tanh with linear"),
        ({"bias": "inside"}, "bias must be outside, or inside with gate activation, got inside with linear"),
        ({"bias": "none"}, "bias must be outside, or inside with gate activation, got none with linear"),
        ({"gate": "topk"}, r"K must be in \[1, k=2\] with gate topk and None without, got None"),
        ({"gate": "topk", "K": 3}, r"K must be in \[1, k=2\] with gate topk and None without, got 3"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        replace(model(), **options)
    with pytest.raises(ValueError, match="method must be bfgs or em, got sgd"):
        model().fit(*data(model(), 5), method="sgd")
