import copy

import pytest
import torch

from moert import ExpertLayout, GluExperts, QuantizedExperts
from moert.ops.fused_experts_quantized import fused_experts_quantized, fused_experts_quantized_ref
from moert.quant import BitNested, Fp8, Int4, Int4Asymmetric, Int8, Mxfp4, Ternary2, Ternary5
from moert.testing import assert_rows_close, random_routing

T, E, k, H, I = 21, 6, 2, 72, 40
PAIRS = [(Int8(), Int8()), (Int4(), Int8()), (Mxfp4(), Int4Asymmetric(64)), (Ternary5(), Mxfp4()), (Fp8(), BitNested())]


@pytest.mark.parametrize("formats", PAIRS, ids=str)
@pytest.mark.parametrize("layout", [ExpertLayout(), ExpertLayout(True, True)], ids=["ENK", "EKN-interleaved"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_forward(formats, layout, activation):
    experts = GluExperts(E, H, I, activation, True, layout)
    packed = QuantizedExperts.pack(experts, formats, "full")
    x, routing = torch.randn(T, H), random_routing(T, E, k)
    w1, w2 = experts.gate_up_proj, experts.down_proj
    w1, w2 = (w1.mT, w2.mT) if layout.transposed else (w1, w2)
    b1 = experts.gate_up_proj_bias
    if layout.interleaved and activation == "swiglu":
        w1, b1 = torch.cat([w1[:, ::2], w1[:, 1::2]], 1), torch.cat([b1[:, ::2], b1[:, 1::2]], 1)
    expected = formats[0].pack(w1), formats[1].pack(w2)
    for got, want in zip(packed.packed(), expected, strict=True):
        assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
    bias = b1.detach(), experts.down_proj_bias.detach()

    def ref(x, b1, b2):
        return fused_experts_quantized_ref(x, routing, *expected, (b1, b2), activation, "full")

    assert_rows_close(packed(x, routing), ref, x, *bias)
    packed.precision = "auto"
    assert torch.equal(packed(x, routing), fused_experts_quantized(x, routing, *expected, bias, activation))


def test_nothing_is_trained_but_gradients_pass():
    packed = QuantizedExperts.pack(GluExperts(E, H, I, bias=True), PAIRS[1])
    x = torch.randn(T, H, requires_grad=True)
    packed(x, random_routing(T, E, k)).sum().backward()
    assert not list(packed.parameters()) and x.grad.abs().sum() > 0


@pytest.mark.parametrize("formats", PAIRS, ids=str)
def test_state_dict_round_trip(formats, tmp_path):
    from safetensors.torch import load_file, save_file

    packed = QuantizedExperts.pack(GluExperts(E, H, I, bias=True), formats)
    save_file(packed.state_dict(), tmp_path / "experts.safetensors")
    again = QuantizedExperts(E, H, I, formats, bias=True)
    again.load_state_dict(load_file(tmp_path / "experts.safetensors"))
    x, routing = torch.randn(T, H), random_routing(T, E, k)
    assert torch.equal(packed(x, routing), again(x, routing))
    other = QuantizedExperts(E, H, I, (Int4(128), formats[1]), bias=True)
    with pytest.raises(
        (ValueError, RuntimeError), match="state_dict must hold experts in int4 group 128|size mismatch"
    ):
        other.load_state_dict(packed.state_dict())


def test_another_format_of_the_same_sizes_is_refused():
    packed = QuantizedExperts.pack(GluExperts(E, H, I), (Mxfp4(), Mxfp4()))
    other = QuantizedExperts(E, H, I, (Int4(), Int4()))
    with pytest.raises(ValueError, match="state_dict must hold experts in int4 group 32, .*, got mxfp4 group 32"):
        other.load_state_dict(packed.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_conversions_leave_the_packed_bits(dtype):
    packed = QuantizedExperts.pack(GluExperts(E, H, I, bias=True), PAIRS[1])
    before = copy.deepcopy(packed.state_dict())
    packed.to(dtype)
    for name, t in packed.state_dict().items():
        assert t.dtype == dtype if name.endswith("bias") else torch.equal(t, before[name])
    routing = random_routing(T, E, k, dtype=torch.promote_types(dtype, torch.float32))
    y = packed(torch.randn(T, H, dtype=dtype), routing)
    assert y.dtype == dtype and y.isfinite().all()


def test_sizes():
    packed = QuantizedExperts.pack(GluExperts(E, H, I), (Int4(), Int4()))
    assert packed.nbytes == Int4().nbytes((E, 2 * I, H)) + Int4().nbytes((E, H, I))


def test_extra_repr():
    packed = QuantizedExperts(E, H, I, (Int4(), Int8()), "relu2")
    text = "activation=relu2, bias=False, formats=(int4 group 32, int8 group row), precision=auto"
    assert "num_experts=6, hidden=72, intermediate=40" in repr(packed) and text in repr(packed)


def test_values_that_the_format_does_not_have_are_refused():
    packed = QuantizedExperts.pack(GluExperts(2, 64, 32), (Int4Asymmetric(), Int8()))
    state = packed.state_dict()
    zeros = state["gate_up_proj_zeros"].clone()
    zeros[1, 2, 0] = 16
    with pytest.raises((ValueError, RuntimeError), match="zeros must be at most 15 for Int4Asymmetric.*, got 16"):
        copy.deepcopy(packed).load_state_dict(state | {"gate_up_proj_zeros": zeros})
    scales = torch.full_like(state["down_proj_scales"], float("nan"))
    with pytest.raises((ValueError, RuntimeError), match="scales must be finite for Int8.*, got inf or nan"):
        copy.deepcopy(packed).load_state_dict(state | {"down_proj_scales": scales})
    packed = QuantizedExperts.pack(GluExperts(2, 64, 32), (Fp8(), BitNested()))
    state = packed.state_dict()
    for name, value, message in [
        ("gate_up_proj_scales", torch.nan, "scales must be finite for Fp8"),
        ("gate_up_proj_codes", 0x7F, "codes must be those of Fp8.*, got byte 127"),
        ("down_proj_scales", torch.inf, "scales must be finite for BitNested"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            copy.deepcopy(packed).load_state_dict(state | {name: torch.full_like(state[name], value)})


@pytest.mark.parametrize("named", [True, False], ids=["formats-named", "formats-not-named"])
@pytest.mark.parametrize("fmt", [Ternary2(), Ternary5()], ids=str)
def test_bytes_that_are_no_codes_are_refused(fmt, named):
    packed = QuantizedExperts.pack(GluExperts(2, 100, 48), (fmt, fmt))
    state = packed.state_dict()
    if not named:
        del state["_extra_state"]
    again = QuantizedExperts(2, 100, 48, (fmt, fmt))
    again.load_state_dict(state, strict=named)
    assert torch.equal(again.down_proj_codes, packed.down_proj_codes)
    for byte, message in [(60, "codes must be those of Ternary.*, got byte 60"), (255, "codes must be 0 after column")]:
        codes = state["gate_up_proj_codes"].clone()
        codes[..., : 100 // fmt.codes_per_byte if byte == 60 else None] = byte
        with pytest.raises(ValueError, match=message):
            again.load_state_dict(state | {"gate_up_proj_codes": codes}, strict=named)


def test_a_state_dict_that_names_no_formats_is_checked_too():
    packed = QuantizedExperts.pack(GluExperts(2, 64, 32), (Int8(), Int8()))
    scales = torch.full_like(packed.down_proj_scales, torch.inf)
    with pytest.raises(ValueError, match="scales must be finite for Int8"):
        packed.load_state_dict({"down_proj_scales": scales}, strict=False)
    with pytest.raises(ValueError, match="gate_up_proj_codes must be torch.uint8, got torch.float32"):
        packed.load_state_dict({"gate_up_proj_codes": packed.gate_up_proj_codes.float()}, strict=False)


@pytest.mark.parametrize("assign", [False, True])
def test_a_refused_state_dict_leaves_the_experts_as_they_were(assign):
    packed = QuantizedExperts.pack(GluExperts(2, 64, 32), (Ternary2(), Int8()))
    before = copy.deepcopy(packed.state_dict())
    state = QuantizedExperts.pack(GluExperts(2, 64, 32), (Ternary2(), Int8())).state_dict()
    scales, codes = state["down_proj_scales"], state["gate_up_proj_codes"]
    other = torch.tensor(list(b"int8 group row, int8 group row"), dtype=torch.uint8)
    for name, value, message in [
        ("gate_up_proj_codes", codes.int(), "gate_up_proj_codes must be torch.uint8, got torch.int32"),
        ("down_proj_scales", scales.double(), "down_proj_scales must be torch.float16, got torch.float64"),
        ("down_proj_scales", torch.full_like(scales, torch.nan), "scales must be finite for Int8"),
        ("gate_up_proj_codes", torch.full_like(codes, 255), "codes must be those of Ternary2"),
        ("_extra_state", other, "state_dict must hold experts in ternary2 .*, got int8 group row"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed.load_state_dict(state | {name: value}, assign=assign)
        assert all(torch.equal(value, before[name]) for name, value in packed.state_dict().items())
    packed.load_state_dict(state, assign=assign)
    assert all(torch.equal(value, state[name]) for name, value in packed.state_dict().items())


def test_a_state_dict_without_packed_parts_checks_none(monkeypatch):
    packed = QuantizedExperts.pack(GluExperts(2, 64, 32, bias=True), (Int8(), Int8()))
    monkeypatch.setattr(Int8, "check_values", lambda self, packed: pytest.fail("values were checked"))
    packed.load_state_dict({"down_proj_bias": torch.ones(2, 64)}, strict=False)
    assert packed.down_proj_bias.eq(1).all()


def test_experts_on_the_meta_device_take_a_checked_state_dict():
    state = QuantizedExperts.pack(GluExperts(2, 64, 32), (Ternary2(), Int8())).state_dict()
    with torch.device("meta"):
        packed = QuantizedExperts(2, 64, 32, (Ternary2(), Int8()))
    with pytest.raises(ValueError, match="codes must be those of Ternary2"):
        packed.load_state_dict(
            state | {"gate_up_proj_codes": torch.full_like(state["gate_up_proj_codes"], 255)}, assign=True
        )
    packed.load_state_dict(state, assign=True)
    assert torch.equal(packed.gate_up_proj_codes, state["gate_up_proj_codes"])
