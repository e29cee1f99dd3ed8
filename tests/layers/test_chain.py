import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moert import GluExperts, MoELayer
from moert.layers import ChainMoELayer, FeedForward, losses_of
from moert.routers import DeepSeekRouter
from moert.testing import OperatorsRan, row_error
from moert.types import Onto

H, I, E = 12, 10, 8


def gates(C, k=2):
    routers = [DeepSeekRouter.v1(H, E, k) for _ in range(C)]
    for router in routers:
        nn.init.normal_(router.weight, std=0.5)
    return routers


def chain(C=2, k=2, shared=False, **options):
    layer = ChainMoELayer(gates(C, k), GluExperts(E, H, I), FeedForward(H, I) if shared else None, **options)
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.4)  # large enough that a wrong layout shows
    return layer


def naive_moe(router, experts, x):
    """Token by token, expert by expert."""
    p = (x @ router.weight.T).softmax(-1)
    out = []
    for t in range(len(x)):
        best = p[t].argsort(descending=True, stable=True)[: router.k]
        gate_up, down = experts.gate_up_proj[best] @ x[t], experts.down_proj[best]
        gate, up = gate_up.chunk(2, -1)
        out.append((p[t, best, None] * torch.einsum("khi,ki->kh", down, nn.functional.silu(gate) * up)).sum(0))
    return torch.stack(out)


def test_one_iteration_is_the_layer_and_its_input():
    layer, x = chain(1, shared=True), torch.randn(7, H)
    plain = MoELayer(layer.routers[0], layer.experts, layer.shared_experts)
    assert torch.equal(layer(x), plain(x) + x)


def test_two_iterations_are_two_layers_that_share_experts():
    layer, x = chain(2, shared=True), torch.randn(7, H, requires_grad=True)
    first, second = (MoELayer(r, layer.experts, layer.shared_experts) for r in layer.routers)
    h = first(x) + x
    expected = second(h) + h
    assert row_error(layer(x), expected) < 1e-6
    inputs = [x, *layer.parameters()]
    dy = torch.randn(7, H)
    got, want = (torch.autograd.grad(y, inputs, dy) for y in (layer(x), expected))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("checkpoint", (False, True))
@pytest.mark.parametrize("C", (2, 4))
def test_gradients_of_the_iterations_are_added_in_float32(C, checkpoint, dtype):
    """And rounded once: beside experts and shared experts of its own for each iteration, bit for bit."""
    layer, x = chain(C, shared=True, checkpoint=checkpoint).to(dtype), torch.randn(9, H).to(dtype)
    own = [(copy.deepcopy(layer.experts), copy.deepcopy(layer.shared_experts)) for _ in range(C)]
    y = x
    for router, (experts, shared) in zip(layer.routers, own, strict=True):
        y = experts.onto(y, router(y), Onto(shared(y))) + y
    got, dy = layer(x), torch.randn(9, H).to(dtype)
    assert torch.equal(got, y)
    y.backward(dy)
    layer.zero_grad()
    got.backward(dy)
    for part, of_iterations in zip((layer.experts, layer.shared_experts), zip(*own, strict=True), strict=True):
        for name, weight in part.named_parameters():
            grads = [each.get_parameter(name).grad for each in of_iterations]
            # The last iteration's gradient comes first; float32 sums of few numbers hardly depend on it.
            sums = sum(g.double() for g in grads).to(dtype), sum(g.float() for g in grads).to(dtype)
            assert any(torch.equal(weight.grad, each) for each in sums)


def test_experts_add_the_residual_in_their_own_way(monkeypatch):
    """As those on several ranks do: by their onto, which is asked once an iteration."""
    layer, calls, onto = chain(2), [], GluExperts.onto
    monkeypatch.setattr(GluExperts, "onto", lambda self, *args: calls.append(args[0].shape) or onto(self, *args))
    layer(torch.randn(5, H))
    assert calls == [(5, H)] * 2


@pytest.mark.parametrize("layout", ("renorm", "released", "prenorm"))
def test_layouts_agree_with_their_formula(layout):
    norm, x = nn.RMSNorm(H), torch.randn(5, H)
    nn.init.uniform_(norm.weight)
    layer = chain(2, norm=norm, layout=layout)
    n = norm(x)
    if layout == "renorm":
        expected = x
        for router in layer.routers:
            expected = expected + naive_moe(router, layer.experts, norm(expected))
    else:
        first = naive_moe(layer.routers[0], layer.experts, n)
        second = naive_moe(layer.routers[1], layer.experts, n + first)
        expected = (n if layout == "released" else x) + first + second
    assert row_error(layer(x), expected) < 1e-5
    others = {"renorm", "released", "prenorm"} - {layout}
    for other in others:
        layer.layout = other
        assert row_error(layer(x), expected) > 0.01


def test_outer_residual_is_added_once():
    layer, x = chain(2, residual="outer"), torch.randn(5, H)
    h = naive_moe(layer.routers[0], layer.experts, x)
    assert row_error(layer(x), x + naive_moe(layer.routers[1], layer.experts, h)) < 1e-5


@pytest.mark.parametrize("layout", ("released", "prenorm"))
def test_outer_residual_is_that_of_the_loops_own_input(layout):
    norm, x = nn.RMSNorm(H), torch.randn(5, H)
    nn.init.uniform_(norm.weight)
    layer, n = chain(2, residual="outer", norm=norm, layout=layout), norm(x)
    h = naive_moe(layer.routers[0], layer.experts, n)
    loop = n + naive_moe(layer.routers[1], layer.experts, h)
    assert row_error(layer(x), loop if layout == "released" else x + loop - n) < 1e-5


def test_rows_and_parameters_of_equal_compute():
    coe, moe = chain(2, k=2), MoELayer(gates(1, 4)[0], GluExperts(E, H, I))
    x = torch.randn(11, H)
    rows = sum(r.ids.numel() for r in coe.forward_with_routing(x)[1])
    assert rows == moe.forward_with_routing(x)[1].ids.numel() == 44
    size = [sum(p.numel() for p in m.parameters()) for m in (coe, moe)]
    assert size[0] - size[1] == E * H


def test_losses_add_up_and_one_router_may_serve_all():
    layer, x = chain(3), torch.randn(9, H)
    routings = layer.forward_with_routing(x)[1]
    losses = losses_of(routings)
    assert set(losses) == {"sequence", "sequence/0", "sequence/1", "sequence/2"}
    torch.testing.assert_close(losses["sequence"], sum(r.losses["sequence"] for r in routings))
    single = ChainMoELayer(gates(1), GluExperts(E, H, I), iterations=3)
    assert len(single.forward_with_routing(x)[1]) == 3


@pytest.mark.parametrize("layout", ("renorm", "released", "prenorm"))
def test_inside_a_block_that_adds_its_input(layout):
    """A Llama block with the layer as its feed-forward part computes what the layer alone makes of the stream."""
    config = LlamaConfig(hidden_size=H, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1, vocab_size=20)
    model, seen = LlamaForCausalLM(config).eval(), []
    (block,) = model.model.layers
    block.mlp = chain(norm=block.post_attention_layernorm, layout=layout, subtract_input=True)
    block.post_attention_layernorm = nn.Identity()
    block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.register_forward_hook(lambda _, args, out: seen.append(out))
    model(torch.randint(20, (2, 6)))
    stream, out = seen
    block.mlp.subtract_input = False
    torch.testing.assert_close(out, block.mlp(stream), rtol=1e-5, atol=1e-5)


def test_checkpointed_iterations():
    """The same output, losses and gradients; the routers run once more each."""
    layer, x, calls = chain(3, shared=True), torch.randn(7, H), []
    for router in layer.routers:
        router.register_forward_hook(lambda *_: calls.append(1))

    def run():
        y, routings = layer.forward_with_routing(x)
        loss = y.square().sum() + losses_of(routings)["sequence"]
        return [y, loss, *torch.autograd.grad(loss, list(layer.parameters()))]

    plain = run()
    layer.checkpoint = True
    for got, expected in zip(run(), plain, strict=True):
        torch.testing.assert_close(got, expected)
    assert len(calls) == 3 + 6


def test_checkpointed_iterations_compile():
    torch._dynamo.reset()
    layer = chain(2, shared=True, checkpoint=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T in (5, 9):  # the second of any length
        x = torch.randn(T, H)
        got, expected = (torch.autograd.grad(f(x).square().sum(), list(layer.parameters())) for f in (compiled, layer))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_more_choices_than_experts():
    layer, x = chain(3, k=E // 2), torch.randn(5, H)
    assert sum(r.ids.shape[1] for r in layer.forward_with_routing(x)[1]) > E
    n = x
    for router in layer.routers:
        n = n + naive_moe(router, layer.experts, n)
    assert row_error(layer(x), n) < 1e-5


def test_empty_dtype_compile_state_and_operators():
    layer, x = chain(), torch.randn(2, 4, H)
    assert torch.equal(layer(x[:0]), x[:0])
    with OperatorsRan() as ran:
        layer(x)
    assert ran.names == ["topk_gating", "fused_experts"] * 2
    other = chain()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x)) and torch.equal(compiled(x[:, :3]), layer(x[:, :3]))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: ChainMoELayer([], None), "routers must be 1 or iterations=0 >= 1, got 0"),
        (lambda: ChainMoELayer(gates(2), None, iterations=3), "routers must be 1 or iterations=3 >= 1, got 2"),
        (lambda: chain(residual="none"), "residual must be inner or outer, got none"),
        (lambda: chain(layout="post"), "layout must be one of renorm, released, prenorm, got post"),
        (
            lambda: chain(residual="outer", norm=nn.RMSNorm(H)),
            "layout must be released or prenorm for residual outer, got renorm",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
