import pytest
import torch
import torch.nn.functional as F

from moert import GluExperts, MoELayer, Routing, permute_plan, quantize_
from moert.experts import HeteroExperts, QuantizedExperts
from moert.routers import GatingResidualRouter
from moert.testing import OperatorsRan, random_routing

H, KINDS = 16, ["ffn"] * 4 + ["const"] * 2 + ["copy", "zero"]


def experts(kinds=KINDS, **options):
    return HeteroExperts(GluExperts(kinds.count("ffn"), H, 12), kinds, H, **options)


def all_outputs(layer, x):
    """What every expert makes of every token: E tensors [T, H]."""
    out = []
    for w1, w2 in zip(layer.ffn.gate_up_proj, layer.ffn.down_proj, strict=True):
        gate, up = (x @ w1.T).chunk(2, -1)
        out.append((F.silu(gate) * up) @ w2.T)
    constants = 0
    for kind in layer.kinds[layer.num_ffn :]:
        if kind == "const":
            a = (x @ layer.mix_weight[constants].T).softmax(-1)
            out.append(a[:, :1] * x + a[:, 1:] * layer.constant[constants])
            constants += 1
        else:
            out.append(x if kind == "copy" else torch.zeros_like(x))
    return out


def loop(layer, x, routing):
    outputs = all_outputs(layer, x)
    rows = [
        sum(w * outputs[e][t] for e, w in zip(routing.ids[t].tolist(), routing.weights[t], strict=True) if 0 <= e < 8)
        for t in range(len(x))
    ]
    return torch.stack([torch.zeros(H) + row for row in rows]) if rows else x + 0 * layer.constant.sum()


@pytest.mark.parametrize("renorm", ("paper", "released"))
@pytest.mark.parametrize("T", (0, 1, 7, 256))
def test_layer_against_a_loop_over_tokens(T, renorm):
    layer = MoELayer(GatingResidualRouter(H, 8, kinds=KINDS, renorm=renorm), experts())
    x = torch.randn(T, H)
    y, routing = layer.forward_with_routing(x)
    expected = loop(layer.experts, x, routing)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    parameters = [p for name, p in layer.named_parameters() if "residual" not in name]
    dy = torch.randn(T, H)
    got = torch.autograd.grad(y, parameters, dy, retain_graph=True)
    for one, other in zip(got, torch.autograd.grad(expected, parameters, dy, allow_unused=True), strict=True):
        other = torch.zeros_like(one) if other is None else other
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-9


@pytest.mark.parametrize("kinds", (KINDS, ["ffn", "copy"], ["ffn", "ffn", "const"], ["ffn", "zero"]), ids=str)
def test_free_experts_are_added_in_the_combine(kinds):
    layer, x = experts(kinds), torch.randn(50, H, requires_grad=True)
    routing = random_routing(50, len(kinds), 2 if len(kinds) > 2 else 1)
    with OperatorsRan() as ran:
        y = layer(x, routing)
    assert ran.names == ["fused_experts"]
    want = [x, *layer.parameters()]
    got = torch.autograd.grad(y.square().sum(), want, allow_unused=True)
    layer.ffn.fuses_onto = False
    apart = layer(x, routing)
    torch.testing.assert_close(y, apart)
    for one, other in zip(got, torch.autograd.grad(apart.square().sum(), want, allow_unused=True), strict=True):
        torch.testing.assert_close(one, other)
    # One rounding instead of three: closer to the sum in float32.
    layer, small = layer.bfloat16(), x.detach().bfloat16()
    exact = layer.float()(small.float(), routing)
    layer.bfloat16()
    error = (layer(small, routing) - exact).norm()
    layer.ffn.fuses_onto = True
    assert (layer(small, routing) - exact).norm() <= error


def test_other_experts_add_what_is_free():
    layer, x, routing = experts(), torch.randn(40, H), random_routing(40, 8, 2)
    expected = layer(x, routing)
    quantize_(layer, "int8")
    assert isinstance(layer.ffn, QuantizedExperts)
    torch.testing.assert_close(layer(x, routing), expected, rtol=0, atol=0.02)


def test_dropped_choices_add_nothing():
    layer, routing, x = experts(), random_routing(40, 8, 3, "sentinels"), torch.randn(40, H)
    torch.testing.assert_close(layer(x, routing), loop(layer, x, routing), rtol=0, atol=1e-5)


def test_only_feed_forward_choices_reach_the_feed_forward_experts():
    seen, layer, x = [], experts(), torch.randn(60, H)
    layer.ffn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    routing = random_routing(60, 8, 2)
    with OperatorsRan() as ran:
        layer(x, routing)
    rows = permute_plan(seen[0].ids, seen[0].num_experts).offsets[-1]
    assert rows == (routing.ids < 4).sum() < 120 and ran.names == ["fused_experts"]
    free = Routing(torch.tensor([[6, 7]]).expand(60, 2), torch.rand(60, 2), 8)
    torch.testing.assert_close(layer(x, free), free.weights[:, :1] * x)
    assert permute_plan(seen[1].ids, seen[1].num_experts).offsets.tolist() == [0] * 5


def test_without_constants_and_without_free_experts():
    x = torch.randn(9, H)
    for kinds in (["ffn", "copy"], ["ffn"] * 3):
        layer, routing = experts(kinds), random_routing(9, len(kinds), 1)
        assert sorted(layer.state_dict()) == ["ffn.down_proj", "ffn.gate_up_proj"]
        torch.testing.assert_close(layer(x, routing), loop(layer, x, routing), rtol=0, atol=1e-5)


def test_constants_start_as_in_the_paper():
    torch.manual_seed(0)
    layer = HeteroExperts(GluExperts(1, 256, 4), ["ffn", "const", "const"], 256)
    assert abs(layer.constant.std() - 1) < 0.1 and abs(layer.constant.mean()) < 0.1
    assert layer.mix_weight.shape == (2, 2, 256) and layer.mix_weight.abs().max() <= 1 / 16


def test_input_scale_is_seen_by_all_experts():
    layer, routing, x = experts(input_scale=2.0), random_routing(9, 8, 2), torch.randn(9, H)
    before = x.clone()
    torch.testing.assert_close(layer(x, routing), loop(layer, 2 * x, routing), rtol=0, atol=1e-5)
    assert torch.equal(x, before)


def test_bfloat16_compile_and_state():
    layer = MoELayer(GatingResidualRouter(H, 8, kinds=KINDS), experts()).bfloat16()
    x = torch.randn(9, H, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), y)
    other = MoELayer(GatingResidualRouter(H, 8, kinds=KINDS), experts()).bfloat16()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)


def test_errors():
    with pytest.raises(ValueError, match="ffn must have 4 experts, as many as kinds, got 3"):
        HeteroExperts(GluExperts(3, H, 12), KINDS, H)
    with pytest.raises(ValueError, match="routing must be over 8 experts, got 4"):
        experts()(torch.randn(3, H), random_routing(3, 4, 2))
    with pytest.raises(ValueError, match=r"kinds\[1\] must be zero, copy, const after the first ffn experts, got skip"):
        experts(["ffn", "skip"])
