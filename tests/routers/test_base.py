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


def test_context_of_rows_that_are_some_of_the_tokens():
    bias = torch.arange(12.0).view(6, 2)
    context = RouterContext(
        mask=torch.tensor([[1, 1, 0], [1, 1, 1]]),
        modality=torch.arange(6).view(2, 3),
        conditional=torch.arange(6) > 2,
        group=torch.arange(6),
        logit_bias=bias,
        step=7,
        ranks=((1,),),
        state="left out",
        attention=torch.ones(1),
    )
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
    rows = context.at(torch.tensor([0, 2, -1, 3, 5], dtype=torch.int32), offsets)
    assert rows.mask.tolist() == [True, False, False, True, True] and rows.cu_seqlens is offsets
    assert rows.modality.tolist() == rows.group.tolist() == [0, 2, 0, 3, 5]
    assert rows.conditional.tolist() == [False, False, False, True, True]
    assert torch.equal(rows.logit_bias, bias[[0, 2, 0, 3, 5]]) and rows.step == 7 and rows.ranks == ((1,),)
    assert rows.state is None and rows.attention is None and rows.previous is None
    one = RouterContext(logit_bias=bias[0]).at(torch.tensor([-1, 4]), offsets)
    assert one.logit_bias is not None and one.mask.tolist() == [False, True] and one.modality is None
    empty = RouterContext(modality=torch.zeros(0, dtype=torch.int64)).at(torch.tensor([-1, -1]), offsets)
    assert empty.modality.shape == (2,) and not empty.mask.any()
