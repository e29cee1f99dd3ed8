import pytest
import torch

from moert import RouterContext
from moert.routers import LinearRouter
from moert.routers.linear import wide_dtype


def test_logits():
    router, x = LinearRouter(6, 4, logit_bias=True), torch.randn(5, 6)
    router.reset_parameters()
    assert router.weight.abs().max() <= 6**-0.5 and (router.logit_bias == 0).all()
    torch.nn.init.normal_(router.logit_bias)
    torch.testing.assert_close(router.unbiased_logits(x), x @ router.weight.T)
    bias = torch.randn(5, 4)
    expected = x @ router.weight.T + router.logit_bias + bias
    torch.testing.assert_close(router.logits(x, RouterContext(logit_bias=bias)), expected)


def test_inner_layer():
    router, x = LinearRouter(6, 4, inner=9), torch.randn(5, 6, dtype=torch.float64)
    router.reset_parameters()
    router.double()
    assert router.weight.shape == (4, 9) and router.inner_weight.abs().max() <= 6**-0.5
    h = x @ router.inner_weight.T
    expected = h * (1 + torch.erf(h / 2**0.5)) / 2 @ router.weight.T
    torch.testing.assert_close(router.logits(x, None), expected)


@pytest.mark.parametrize("logits_dtype", (None, torch.float32))
def test_dtype_of_the_logits(logits_dtype):
    router, x = LinearRouter(6, 4, logits_dtype=logits_dtype, dtype=torch.bfloat16), torch.randn(5, 6).bfloat16()
    router.reset_parameters()
    expected = logits_dtype or torch.bfloat16
    assert router.logits(x, None).dtype == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert router.logits(x.float(), None).dtype == expected
    assert (wide_dtype(torch.bfloat16), wide_dtype(None), wide_dtype(torch.float64)) == (
        torch.float32,
        torch.float32,
        torch.float64,
    )


def test_errors():
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        LinearRouter(0, 4)
    with pytest.raises(ValueError, match="inner must be at least 1, got 0"):
        LinearRouter(6, 4, inner=0)
