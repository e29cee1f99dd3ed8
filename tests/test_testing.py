import pytest
import torch

from moert import GluExperts, MoELayer, TopKRouter
from moert.testing import (
    DTYPES,
    ID_DTYPES,
    LAYOUTS,
    ROUTINGS,
    OperatorsRan,
    Shape,
    assert_grads_close,
    assert_rows_close,
    random_routing,
    row_error,
    strided,
)


def product(x, w):
    return x @ w.T


@pytest.fixture(params=DTYPES, ids=str)
def case(request):
    """x [T, H], w [N, H] and their product in one dtype."""
    x, w = torch.randn(257, 64).to(request.param), torch.randn(48, 64).to(request.param)
    return x, w, product(x, w)


def test_rule_accepts_plain_torch(case):
    x, w, y = case
    assert_rows_close(y, product, x, w)


@pytest.mark.parametrize("fault", ["dropped", "swapped", "scaled", "nan"])
def test_rule_sees_one_faulty_row(case, fault):
    x, w, y = case
    if fault == "dropped":
        y[100] = 0
    elif fault == "swapped":
        y[[3, 200]] = y[[200, 3]]
    elif fault == "scaled":
        y[7] *= 1.02
    else:
        y[0, 5] = float("nan")
    with pytest.raises(AssertionError, match="worst row is off by"):
        assert_rows_close(y, product, x, w)


def test_rule_sees_a_wrong_shape():
    with pytest.raises(AssertionError, match="shape"):
        assert_rows_close(torch.zeros(2, 3), product, torch.zeros(2, 4), torch.zeros(5, 4))


def test_row_error_of_nothing():
    assert row_error(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


def test_gradient_rule_names_the_argument():
    x, w, dy = torch.randn(9, 8), torch.randn(5, 8), torch.randn(9, 5)
    assert_grads_close(product, product, dy, x, w)
    with pytest.raises(AssertionError, match="gradient of argument 1"):
        assert_grads_close(lambda x, w: product(x, w.detach() + 0.9 * (w - w.detach())), product, dy, x, w)


def test_operators_that_ran():
    layer = MoELayer(TopKRouter(8, 4, 2), GluExperts(4, 8, 16))
    with OperatorsRan() as ran:
        layer(torch.randn(5, 8)).sum().backward()
    assert ran.names == ["topk_gating", "fused_experts", "fused_experts_backward", "topk_gating_backward"]


@pytest.mark.parametrize("kind", ROUTINGS)
def test_random_routing(kind):
    routing = random_routing(300, 12, 3, kind)
    ids, weights = routing.ids, routing.weights
    assert ids.shape == weights.shape == (300, 3) and (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(300))
    counts = torch.bincount(ids[(ids >= 0) & (ids < 12)].long(), minlength=12)
    if kind == "one_expert":
        assert counts[6] == 900
    elif kind == "empty_experts":
        assert counts[1::2].sum() == 0 and (counts[::2] > 0).all()
    elif kind == "sentinels":
        assert (ids == -1).any() and (ids == 12).any() and 0.2 < 1 - counts.sum() / 900 < 0.45
    else:
        assert (ids.sort(-1).values.diff(dim=-1) > 0).all()  # different experts
        assert kind != "zipf" or counts[0] > 2 * counts[11]


def test_unknown_routing():
    with pytest.raises(ValueError, match="kind must be one of uniform, .*, got skewed"):
        random_routing(1, 1, 1, "skewed")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *ID_DTYPES], ids=str)
def test_strided_keeps_the_values(layout, dtype):
    x = (10 * torch.rand(5, 7)).to(dtype)
    y = strided(x, layout)
    assert torch.equal(x, y)
    assert (y.stride(), y.storage_offset()) != (x.stride(), x.storage_offset())


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout must be one of columns_first, .*, got rows"):
        strided(torch.zeros(1, 1), "rows")


def test_shape_names_its_case():
    assert str(Shape("", 7, 60, 4)) == "T7-E60-k4" and str(Shape("", 1, 2, 1, 8, kind="zipf")) == "T1-E2-k1-H8-zipf"
