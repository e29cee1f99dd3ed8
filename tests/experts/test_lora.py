import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moert import GluExperts, MoELayer, QuantizedExperts, TopKRouter, quantize_
from moert.experts import add_lora_, load_lora_, lora_state_dict
from moert.experts.lora import ExpertLora, PackedWeights
from moert.ops.fused_experts import fused_experts_ref
from moert.quant import Int4, Int8, Ternary2
from moert.testing import assert_grads_close, assert_rows_close, random_routing

T, E, k, H, I, r = 31, 5, 2, 64, 40, 3


def adapted(activation="swiglu"):
    """Experts with random adapters."""
    formats = Int4(), Int8()
    owner = nn.ModuleDict({"experts": QuantizedExperts.pack(GluExperts(E, H, I, activation, bias=True), formats)})
    assert add_lora_(owner, r, alpha=6.0) == ["experts"]
    experts = owner["experts"]
    with torch.no_grad():
        for adapter in experts.adapters:
            adapter.B.normal_(std=0.1)
    return experts


@pytest.mark.parametrize("kind", ["uniform", "one_expert", "sentinels"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_forward_and_gradients(activation, kind):
    experts, x, routing = adapted(activation), torch.randn(T, H), random_routing(T, E, k, kind)
    w1, w2 = (w.format.unpack(w) for w in experts.packed())
    bias = experts.gate_up_proj_bias, experts.down_proj_bias
    first, second = experts.adapters

    def ref(x, *factors):
        A1, B1, A2, B2 = factors
        weights = w1.to(x.dtype) + 2 * B1 @ A1, w2.to(x.dtype) + 2 * B2 @ A2
        return fused_experts_ref(x, routing, *weights, tuple(b.to(x.dtype) for b in bias), experts.activation)

    def mine(x, *factors):
        names = ("lora_w1.A", "lora_w1.B", "lora_w2.A", "lora_w2.B")
        return torch.func.functional_call(experts, dict(zip(names, factors, strict=True)), (x, routing))

    args = x, first.A.detach(), first.B.detach(), second.A.detach(), second.B.detach()
    assert_rows_close(experts(x, routing), ref, *args)
    # Gradients pass through two factors, each rounded in float32: sums of products instead of a product of sums.
    assert_grads_close(mine, ref, torch.randn(T, H), *args, factor=4)


def test_bfloat16_rows():
    experts, routing = adapted(), random_routing(T, E, k)
    x = torch.randn(T, H)
    y = experts.bfloat16()(x.bfloat16(), routing)
    want = experts.float()(x, routing)
    assert y.dtype == torch.bfloat16 and (y - want).norm() / want.norm() < 0.02


def test_new_adapters_change_nothing():
    experts, x = QuantizedExperts.pack(GluExperts(E, H, I), (Int4(), Int4()), "full"), torch.randn(T, H)
    routing = random_routing(T, E, k)
    before = experts(x, routing)
    add_lora_(experts)
    torch.testing.assert_close(experts(x, routing), before, rtol=1e-4, atol=1e-6)


def model():
    """Two layers whose rows keep their size."""
    net = nn.Sequential(*[MoELayer(TopKRouter(H, num_experts=E, k=k), GluExperts(E, H, I)) for _ in range(2)])
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=2 * p.shape[-1] ** -0.5)
    return net


def test_training_moves_adapters_alone():
    """Adapters over ternary experts learn what the rounding lost."""
    net, x = model(), torch.randn(256, H)
    target = net(x).detach()
    quantize_(net, Ternary2())
    add_lora_(net, rank=8)
    before = copy.deepcopy(net.state_dict())
    adapters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(adapters, lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    grads = {name for name, p in net.named_parameters() if p.grad is not None}
    assert grads == set(lora_state_dict(net)) and len(grads) == 8
    after = net.state_dict()
    assert all(torch.equal(value, after[name]) != (name in grads) for name, value in before.items())


def test_state_dict(tmp_path):
    from safetensors.torch import load_file, save_file

    net = model()
    quantize_(net, "int8")
    other = copy.deepcopy(net)
    add_lora_(net, rank=2)
    with torch.no_grad():
        net[1].experts.lora_w2.B.normal_()
    save_file(lora_state_dict(net), tmp_path / "adapters.safetensors")
    add_lora_(other, rank=2)
    load_lora_(other, load_file(tmp_path / "adapters.safetensors"))
    x = torch.randn(T, H)
    assert torch.equal(net(x), other(x)) and net[1].experts.lora_w2.B.abs().sum() > 0
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))
    with pytest.raises(ValueError, match=r"state must hold the model's 8 .* a difference in 0.experts.lora_w1.A"):
        load_lora_(other, {})
    state = lora_state_dict(net) | {"0.experts.lora_w1.A": torch.zeros(E, 3, H)}
    with pytest.raises(ValueError, match=r"0.experts.lora_w1.A must have shape \[5, 2, 64\], got \[5, 3, 64\]"):
        load_lora_(other, state)


def test_freeze():
    net = model()
    quantize_(net, "int8")
    add_lora_(net, freeze=False)
    assert all(p.requires_grad for p in net.parameters())
    assert "rank=8, scaling=2" in repr(net[0].experts.lora_w1)


def test_errors():
    with pytest.raises(ValueError, match=r"model must hold packed experts \(quantize_\), got none in Sequential"):
        add_lora_(model())
    net = model()
    quantize_(net, "int8")
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_lora_(net, rank=0)
    add_lora_(net)
    with pytest.raises(ValueError, match="model must have no adapters yet, got some in 0.experts"):
        add_lora_(net)
    with pytest.raises(TypeError, match="PackedWeights must define packed_pair"):
        PackedWeights().packed_pair()
    assert isinstance(net[0].experts.lora_w1, ExpertLora)


def test_an_error_leaves_no_adapter():
    net = nn.Sequential(*[MoELayer(TopKRouter(H, num_experts=E, k=2), GluExperts(E, H, 32)) for _ in range(2)])
    quantize_(net, "int4")
    add_lora_(net[1], r)
    with pytest.raises(ValueError, match="model must have no adapters yet, got some in 1.experts"):
        add_lora_(net, r)
    assert not any(net[0].experts.adapters) and any(net[1].experts.adapters)
