import copy

import pytest
import torch
from torch import nn

from moert import GluExperts, MoELayer, QuantizedExperts, TopKRouter, quantize_
from moert.experts import HeteroExperts
from moert.experts.calibrated import FloatGluExperts
from moert.layers import ChainMoELayer
from moert.quant import GPTQ, Int4
from moert.quant.calibration import calibrate_, called, evaluating, rows_of
from moert.quant.float_experts import pack_experts

E, H = 4, 64


def model(layers=3):
    return nn.Sequential(*[MoELayer(TopKRouter(H, num_experts=E, k=2), GluExperts(E, H, 32)) for _ in range(layers)])


def batches(count=3, T=60):
    return [torch.randn(T, H // 4) @ torch.randn(H // 4, H) for _ in range(count)]


def sources(net):
    return {f"{i}.experts": FloatGluExperts(layer, "experts") for i, layer in enumerate(net)}


def test_layer_by_layer_behind_the_packed_ones():
    net, data = model(), batches()
    float_net = copy.deepcopy(net)
    names = quantize_(net, "int4", calibration=data)
    assert names == ["0.experts", "1.experts", "2.experts"] == [layer.name for layer in names.layers]
    assert all(isinstance(layer.experts, QuantizedExperts) for layer in net)
    assert all(sum(layer.rows) == 3 * 60 * 2 and layer.rounded == () for layer in names.layers)
    with torch.no_grad():
        for i, layer in enumerate(float_net):
            x = torch.cat(data)
            for packed in net[:i]:
                x = torch.cat([packed(part) for part in x.split(60)])
            experts = FloatGluExperts(layer, "experts")
            expected = pack_experts(experts, x, layer.router(x).ids, (Int4(), Int4()))[0]
            for mine, want in zip(net[i].experts.packed(), expected, strict=True):
                assert torch.equal(mine.codes, want.codes)


def test_output_is_nearer_than_rounded():
    net, data = model(), batches()
    rounded, calibrated = copy.deepcopy(net), copy.deepcopy(net)
    quantize_(rounded, "ternary2")
    quantize_(calibrated, "ternary2", calibration=data)
    x = torch.cat(data)
    with torch.no_grad():
        routing = net[0].router(x)
        y = net[0].experts(x, routing)
        errors = [(other[0].experts(x, routing) - y).norm() / y.norm() for other in (rounded, calibrated)]
    assert errors[1] < 0.9 * errors[0]


def test_two_runs_give_the_same_bits():
    data, states = batches(), []
    net = model()
    for _ in range(2):
        again = copy.deepcopy(net)
        quantize_(again, "int4", group=64, calibration=iter(data), method=GPTQ(act_order=False))
        states.append(again.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_few_rows_are_reported():
    net = model(2)
    with torch.no_grad():
        net[0].router.weight.zero_()
        net[0].router.weight[:2] = torch.ones(2, H)  # experts 2 and 3 of the first layer see negative tokens only
    with pytest.warns(UserWarning, match=r"2 of 4 experts of 0.experts had fewer than min_rows=32 rows .*: 2, 3"):
        names = quantize_(net, "int4", calibration=[x.abs() for x in batches()], method=GPTQ())
    assert names.layers[0].rounded == (2, 3) and names.layers[0].rows == (180, 180, 0, 0)


class Loop(nn.Module):
    """Calls one layer twice, and another only for long batches."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.never = model()

    def forward(self, x, long=False):
        x = self.one(x)
        return self.one(self.other(x)) if long else self.one(x)


def test_calls_in_a_loop_and_none_at_all():
    net = Loop()
    experts = {name: FloatGluExperts(getattr(net, name), "experts") for name in ("never", "other", "one")}
    data = [{"x": batches(1)[0]}, (batches(1)[0], True)]
    assert [called(net, batch, experts) for batch in data] == [["one", "one"], ["one", "other", "one"]]
    x, ids = rows_of(net, data, [2, 2], experts["one"])
    assert x.shape == (240, H) and ids.shape == (240, 2) and torch.equal(x[120:180], data[1][0])
    assert rows_of(net, data, [0, 1], experts["other"])[0].shape == (60, H)
    with pytest.warns(UserWarning, match="4 of 4 experts of never had fewer"):
        reports = calibrate_(net, experts, data, Int4(), GPTQ(min_rows=1))
    assert [report.name for report in reports] == ["one", "other", "never"]
    assert reports[2].rows == (0,) * E and isinstance(net.never.experts, QuantizedExperts)


def test_modes_are_given_back():
    net = model()
    net.train()
    net[1].eval()
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    assert [layer.training for layer in net] == [True, False, True] and not net[1].experts.training


def test_what_is_refused():
    net = model()
    for one in (torch.zeros(3, H), {"x": 1}, "text"):
        with pytest.raises(
            TypeError, match=f"calibration must be an iterable of batches, got one {type(one).__name__}"
        ):
            quantize_(net, calibration=one)
    with pytest.raises(ValueError, match="calibration must hold at least one batch, got none"):
        quantize_(net, calibration=[])
    with pytest.raises(TypeError, match="calibration must hold tensors, mappings or sequences, got int"):
        quantize_(net, calibration=[3])
    with pytest.raises(ValueError, match="method must be \"gptq\" or a GPTQ, got 'awq'"):
        quantize_(net, method="awq")
    with pytest.raises(ValueError, match="0.experts: calibration must give expert . finite rows, got inf or nan"):
        quantize_(net, calibration=[torch.full((50, H), 1e30)])
    assert all(isinstance(layer.experts, GluExperts) for layer in net)


def test_new_experts_are_in_the_mode_of_the_old_ones():
    net = model().train()
    net[1].eval()
    quantize_(net, "int4", calibration=batches())
    assert [layer.experts.training for layer in net] == [True, False, True]


@pytest.mark.parametrize("calibrated", [False, True])
def test_weights_that_are_not_finite_change_nothing(calibrated):
    net = model()
    with torch.no_grad():
        net[2].experts.down_proj[1, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="2.experts must have finite weights, got inf or nan in expert 1"):
        quantize_(net, "int4", calibration=batches() if calibrated else None)
    assert all(isinstance(layer.experts, GluExperts) for layer in net)


@pytest.mark.parametrize(
    "layer",
    [
        MoELayer(TopKRouter(H, num_experts=E, k=2), GluExperts(E, H, 32), nn.Linear(H, H)),
        ChainMoELayer([TopKRouter(H, num_experts=E, k=2)], GluExperts(E, H, 32)),
        MoELayer(
            TopKRouter(H, num_experts=E + 2, k=2),
            HeteroExperts(GluExperts(E, H, 32), ["ffn"] * E + ["copy", "const"], H),
        ),
    ],
    ids=["shared", "chain", "free"],
)
def test_experts_whose_combine_adds_more(layer):
    x = torch.randn(200, H)
    with torch.no_grad():
        y = layer(x)
        quantize_(layer, "int8", calibration=[x])
        assert any(isinstance(module, QuantizedExperts) for module in layer.modules())
        assert (layer(x) - y).norm() < 0.05 * y.norm()
