import copy

import pytest
import torch
from torch import nn

from moert import GluExperts, MoELayer, TopKRouter, batch_invariant, quantize_
from moert.experts import SubOneBitExperts, add_lora_
from moert.ops.fused_experts import fused_experts_ref
from moert.quant import GPTQ, SubOneBit
from moert.testing import assert_rows_close, random_routing

T, E, k, H, I = 23, 5, 2, 96, 40


def packed(**options):
    experts = GluExperts(E, H, I, **options)
    weights = experts.gate_up_proj, experts.down_proj
    return experts, SubOneBitExperts.holding(experts, tuple(SubOneBit().pack(w) for w in weights))


@pytest.mark.parametrize("kind", ["uniform", "one_expert", "sentinels"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_forward(activation, kind):
    experts, mine = packed(activation=activation, bias=True)
    x, routing = torch.randn(T, H), random_routing(T, E, k, kind)
    w1, w2 = (SubOneBit().unpack(w) for w in mine.packed_pair())
    bias = experts.gate_up_proj_bias.detach(), experts.down_proj_bias.detach()

    def ref(x, w1, w2, b1, b2):
        return fused_experts_ref(x, routing, w1, w2, (b1, b2), experts.activation)

    with batch_invariant(True):  # rows stay float32 on every CPU
        assert_rows_close(mine(x, routing), ref, x, w1, w2, *bias)
    assert mine.nbytes < 0.16 * 4 * (experts.gate_up_proj.numel() + experts.down_proj.numel())


def test_state_dict(tmp_path):
    from safetensors.torch import load_file, save_file

    _, mine = packed(bias=True)
    save_file(mine.state_dict(), tmp_path / "experts.safetensors")
    again = SubOneBitExperts(E, H, I, bias=True)
    again.load_state_dict(load_file(tmp_path / "experts.safetensors"))
    x, routing = torch.randn(T, H), random_routing(T, E, k)
    assert torch.equal(mine(x, routing), again(x, routing))
    state = mine.state_dict()
    other = state | {"_extra_state": torch.tensor(list(b"another"), dtype=torch.uint8)}
    with pytest.raises(ValueError, match="state_dict must be coded with dictionary .*, got another"):
        again.load_state_dict(other)
    for name, broken, message in [
        ("gate_up_proj_matrix_base", state["gate_up_proj_matrix_base"] + 1, "matrix_base must rise by the codewords"),
        ("gate_up_proj_row_ptr", state["gate_up_proj_row_ptr"].flip(1), "row_ptr must rise from 0 in every matrix"),
        ("down_proj_minmax", torch.full_like(state["down_proj_minmax"], 0x7F80), "minmax must be finite, got inf"),
        ("down_proj_codes", state["down_proj_codes"][1:], "codes must hold .* codewords, got"),
    ]:
        with pytest.raises(ValueError, match=message):
            copy.deepcopy(mine).load_state_dict(state | {name: broken})


def test_conversions_leave_the_packed_bits():
    _, mine = packed()
    before = copy.deepcopy(mine.state_dict())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        mine.to(dtype)
        assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
        routing = random_routing(T, E, k, dtype=torch.promote_types(dtype, torch.float32))
        y = mine(torch.randn(T, H, dtype=dtype), routing)
        assert y.dtype == dtype and y.isfinite().all()


def model():
    net = nn.Sequential(*[MoELayer(TopKRouter(H, num_experts=E, k=k), GluExperts(E, H, I)) for _ in range(2)])
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=p.shape[-1] ** -0.5)
    return net


def test_calibrated_is_nearer_than_rounded():
    """The sheet of QMoE asks for an output error at least 20 % lower, on inputs of low rank."""
    net, x = model(), torch.randn(400, H // 6) @ torch.randn(H // 6, H)
    rounded, calibrated = copy.deepcopy(net), copy.deepcopy(net)
    assert quantize_(rounded, "sub1") == ["0.experts", "1.experts"]
    names = quantize_(calibrated, "sub1", calibration=x.split(100), method=GPTQ(damp=0.1))
    assert names.layers[0].rounded == () and isinstance(calibrated[1].experts, SubOneBitExperts)
    w = net[0].experts.gate_up_proj.detach()
    assert torch.equal(rounded[0].experts.packed_pair()[0].codes, SubOneBit().pack(w).codes)
    with torch.no_grad():
        routing = net[0].router(x)
        y = net[0].experts(x, routing)
        errors = [(other[0].experts(x, routing) - y).norm() / y.norm() for other in (rounded, calibrated)]
    assert errors[1] < 0.8 * errors[0]


def test_adapters():
    net, x = model(), torch.randn(T, H)
    quantize_(net, SubOneBit())
    with batch_invariant(True):  # rows stay float32 on every CPU, as they are beside adapters
        before = net(x)
    assert add_lora_(net) == ["0.experts", "1.experts"]
    torch.testing.assert_close(net(x), before)
    net(x).sum().backward()
    assert net[0].experts.lora_w1.B.grad.abs().sum() > 0


def test_errors():
    with pytest.raises(ValueError, match="group must be None for sub1, whose values belong to rows, got 32"):
        quantize_(model(), "sub1", group=32)
    _, mine = packed()
    with pytest.raises(ValueError, match="w1 must have E=routing.num_experts=4 experts, got 5"):
        mine(torch.randn(T, H), random_routing(T, 4, k))
    with pytest.raises(RuntimeError, match="SubOneBitExperts must hold codes, got none: load a state_dict"):
        SubOneBitExperts(2, 64, 32)(torch.randn(T, 64), random_routing(T, 2, 1))
    state = mine.state_dict()
    state["gate_up_proj_codes"] = torch.full_like(state["gate_up_proj_codes"].view(torch.int16), -1).view(torch.uint16)
    with pytest.raises(ValueError, match=rf"codes must hold {H} columns a row, got others in row 0 of 0"):
        mine.load_state_dict(state)
    del state["_extra_state"]
    with pytest.raises(ValueError, match=rf"codes must hold {H} columns a row, got others in row 0 of 0"):
        mine.load_state_dict(state, strict=False)


@pytest.mark.parametrize("assign", [False, True])
def test_a_refused_state_dict_leaves_the_experts_as_they_were(assign):
    (_, mine), (_, other) = packed(), packed()
    before, state = copy.deepcopy(mine.state_dict()), other.state_dict()
    ptr, codes = state["down_proj_row_ptr"], state["gate_up_proj_codes"]
    for name, value, message in [
        ("down_proj_row_ptr", ptr.long(), "down_proj_row_ptr must be torch.int32, got torch.int64"),
        ("gate_up_proj_codes", codes.int(), "gate_up_proj_codes must be torch.uint16, got torch.int32"),
        ("gate_up_proj_codes", codes[1:], "codes must hold .* codewords, got"),
        ("_extra_state", torch.tensor(list(b"another"), dtype=torch.uint8), "dictionary .*, got another"),
    ]:
        with pytest.raises(ValueError, match=message):
            mine.load_state_dict(state | {name: value}, assign=assign)
        assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    mine.load_state_dict(state, assign=assign)
    assert all(torch.equal(value, state[name]) for name, value in mine.state_dict().items())
