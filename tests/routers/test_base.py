import pytest
import torch

from moert import Router, RouterContext, Routing


class HashRouter(Router):
    """Token t goes to expert t mod E, masked tokens nowhere."""

    def forward(self, x, context=None):
        ids = torch.arange(len(x))[:, None] % self.num_experts
        if context is not None and context.mask is not None:
            ids = torch.where(context.mask[:, None], ids, self.num_experts)
        return Routing(ids, torch.ones(len(x), 1), self.num_experts)


def test_a_router_reads_what_it_knows_of_the_context():
    router, x = HashRouter(3), torch.zeros(4, 2)
    assert router(x).ids.tolist() == [[0], [1], [2], [0]]
    context = RouterContext(mask=torch.tensor([True, False, True, True]), step=7)
    assert router(x, context).ids.tolist() == [[0], [3], [2], [0]]


def test_logit_bias_is_a_parameter():
    assert HashRouter(3).logit_bias is None
    assert [(name, p.shape) for name, p in HashRouter(3, logit_bias=True).named_parameters()] == [("logit_bias", (3,))]


def test_biased_adds_both_biases():
    router, logits = HashRouter(3, logit_bias=True), torch.randn(4, 3).bfloat16()
    assert torch.equal(HashRouter(3).biased(logits, RouterContext()), logits)
    torch.nn.init.constant_(router.logit_bias, 2.0)
    assert router.biased(logits, None).dtype == torch.bfloat16
    for shape in ((3,), (4, 3)):
        delta = torch.full(shape, 1e-4, requires_grad=True)
        both = router.biased(logits, RouterContext(logit_bias=delta))
        assert torch.equal(both, (logits + 2).float() + 1e-4)
        both.sum().backward()
        assert delta.grad.sum() == 12


def test_errors():
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        HashRouter(0)
    with pytest.raises(TypeError, match=r"Router must define forward\(x, context\)"):
        Router(2)(torch.zeros(1, 1))


def test_wide_parameters_stay_float32_with_their_gradients():
    class Wide(Router):
        wide = ("weight", "logit_bias")

        def __init__(self):
            super().__init__(3)
            self.weight = torch.nn.Parameter(torch.full((3, 2), 1.001))

    router = Wide()
    router.weight.sum().backward()
    router.bfloat16()
    assert router.weight.dtype == router.weight.grad.dtype == torch.float32 and (router.weight == 1.001).all()
    assert router.double().weight.dtype == torch.float64


def test_counted_is_the_mask_by_rows():
    assert RouterContext().counted() is None
    assert RouterContext(mask=torch.tensor([[1, 0], [0, 1]])).counted().tolist() == [True, False, False, True]
