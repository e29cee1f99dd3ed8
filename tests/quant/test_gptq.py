import pytest
import torch

from moert.quant import Int4, Int4Asymmetric, Int8, Mxfp4, Ternary2, Ternary5
from moert.quant.gptq import GPTQ, _round_columns, gptq, inverse_factor
from moert.quant.grid import Grid, grids_of

FORMATS = [
    *(Int8(group) for group in (None, 32, 64, 128)),
    *(kind(group) for kind in (Int4, Int4Asymmetric) for group in (32, 64, 128)),
    *(Mxfp4(), Ternary2(), Ternary2(64), Ternary5()),
]


def inputs(G=3, R=24, C=96, rows=200):
    """Weights and the rows that they multiply, whose columns are correlated and of unlike sizes."""
    x = torch.randn(G, rows, C // 3) @ torch.randn(G, C // 3, C) + 0.3 * torch.randn(G, rows, C)
    x = x * torch.randn(G, 1, C).exp()
    return torch.randn(G, R, C), x.mT @ x / rows


def cost(w, q, hessian):
    """tr((w - q) H (w - q)ᵀ) of each matrix."""
    return torch.einsum("grc,gcd,grd->g", w - q, hessian, w - q)


def gptq_ref(w, hessian, fmt, settings):
    """One matrix in float64, without a factor: after each column the best values of the others, by least squares.

    Given the columns that are rounded, those still free minimise the cost against the weights as they came.
    """
    w, h = w.double(), hessian.double()
    h = h + settings.damp * h.diagonal().mean() * torch.eye(len(h))
    order = h.diagonal().argsort(dim=0, descending=True, stable=True) if settings.act_order else torch.arange(len(h))
    tried = []
    for grid in grids_of(fmt, w[None].float()):
        q = torch.zeros_like(w)
        for n, column in enumerate(order):
            done, free = order[:n], order[n:]
            best = w[:, free]
            if n:
                off = (w[:, done] - q[:, done]) @ h[done][:, free]
                best = best + torch.linalg.solve(h[free][:, free], off.T).T
            q[:, column] = grid.round(best[None, :, 0].float(), column[None])[1][0].double()
        tried.append((torch.einsum("rc,cd,rd->r", w - q, h, w - q), q))
    return torch.stack([min((cost[r], q[r]) for cost, q in tried)[1] for r in range(len(w))])


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_as_constrained_least_squares(fmt, act_order):
    w, hessian = inputs(G=2, R=12)
    settings = GPTQ(block=40, act_order=act_order)
    q = fmt.unpack(gptq(w, hessian, fmt, settings))
    expected = torch.stack([gptq_ref(*each, fmt, settings) for each in zip(w, hessian, strict=True)]).float()
    # float32 may round a value that lies between two codes the other way, and the columns after it follow.
    same = (q == expected).all(-1)
    assert same.float().mean() >= 0.9
    torch.testing.assert_close(cost(w, q, hessian), cost(w, expected, hessian), rtol=0.02, atol=0)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_diagonal_hessian_gives_rounding(fmt):
    w = torch.randn(2, 12, 200)
    w[0, 0] = 0
    w[0, 1, :128] = 0
    rounded = fmt.pack(w)
    hessians = [torch.eye(200).expand(2, 200, 200), torch.diag_embed(torch.rand(2, 200) + 0.1)]
    # Columns that count more than others may ask for another scale, where there is a choice.
    for hessian in hessians[:1] if fmt.name.startswith("ternary") else hessians:
        packed = gptq(w, hessian, fmt)
        assert torch.equal(packed.codes, rounded.codes) and torch.equal(packed.scales, rounded.scales)
        assert packed.zeros is None or torch.equal(packed.zeros, rounded.zeros)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_error_is_below_rounding_s(fmt):
    w, hessian = inputs(G=8)
    rounding = cost(w, fmt.unpack(fmt.pack(w)), hessian)
    for act_order in (False, True):
        mine = cost(w, fmt.unpack(gptq(w, hessian, fmt, GPTQ(act_order=act_order))), hessian)
        assert mine.mean() < 0.8 * rounding.mean()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_exact_for_what_the_format_holds(fmt):
    w, hessian = inputs()
    # What rounds to itself: scales that are a mean or the better of two may differ once more.
    for _ in range(4):
        w = fmt.unpack(fmt.pack(w))
    assert torch.equal(fmt.unpack(fmt.pack(w)), w)
    assert torch.equal(fmt.unpack(gptq(w, hessian, fmt)), w)


def test_wider_ternary_grids_where_they_leave_less():
    w, hessian = inputs(G=4, C=128)
    packed = gptq(w, hessian, Ternary2())
    times = (packed.scales.float() / Ternary2().pack(w).scales.float()).flatten()
    assert {round(t, 1) for t in times.tolist()} == {1.0, 1.5, 2.0}
    q = Ternary2().unpack(packed)
    grid = Grid(Ternary2(), w)
    narrow = _round_columns(w, *_factor_of(hessian), grid, 128)[0]
    assert cost(w, q, hessian).mean() < 0.7 * cost(w, Ternary2().unpack(grid.pack(narrow)), hessian).mean()


def _factor_of(hessian):
    return torch.stack([inverse_factor(h, 0.01) for h in hessian]), torch.arange(128).expand(4, 128)


def test_the_cost_is_that_of_the_damped_hessian():
    w, hessian = inputs(G=2, C=64)
    settings = GPTQ(act_order=False)
    damped = hessian + 0.01 * hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(64)
    factor = torch.stack([inverse_factor(h, 0.01) for h in hessian])
    codes, costs = _round_columns(w, factor, torch.arange(64).expand(2, 64), Grid(Int4(), w), settings.block)
    q = Int4().unpack(Grid(Int4(), w).pack(codes))
    torch.testing.assert_close(costs.sum(1), cost(w, q, damped), rtol=1e-3, atol=0)


def test_matrices_do_not_see_each_other():
    w, hessian = inputs()
    together = gptq(w, hessian, Int4())
    for g in range(len(w)):
        alone = gptq(w[g : g + 1], hessian[g : g + 1], Int4())
        assert torch.equal(alone.codes[0], together.codes[g])
    again = gptq(w, hessian, Int4())
    assert torch.equal(again.codes, together.codes)


def test_singular_hessians_and_dead_columns():
    w = torch.randn(2, 16, 64)
    x = torch.randn(5, 64)  # fewer rows than columns
    x[:, 7] = 0
    hessian = torch.stack([x.T @ x, torch.eye(64)])
    q = Int4().unpack(gptq(w, hessian, Int4()))
    rounded = Int4().unpack(Int4().pack(w))
    assert torch.equal(q[1], rounded[1]) and torch.equal(q[0, :, 7], rounded[0, :, 7])
    assert cost(w, q, hessian)[0] < 0.1 * cost(w, rounded, hessian)[0]


def test_inverse_factor():
    _, hessian = inputs(G=1, C=48)
    damped = hessian[0].double() + 0.1 * hessian[0].diagonal().mean() * torch.eye(48)
    upper = inverse_factor(hessian[0], 0.1).double()
    assert (upper.tril(-1) == 0).all() and (upper.diagonal() > 0).all()
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-4)


def test_settings():
    for damp in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"damp must be above 0 and finite, got {damp}"):
            GPTQ(damp=damp)
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        GPTQ(block=0)
