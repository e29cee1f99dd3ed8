import copy

import pytest
import torch
from torch import nn

import moert
from moert import Activation, ExpertLayout, GluExperts, MoELayer, Routing, TopKRouter, prepack_, unprepack_
from moert.ops.fused_experts import fused_experts_ref
from moert.testing import DTYPES, assert_rows_close, random_routing

E, H, I = 5, 192, 96  # whole panels of every instruction set


def experts(dtype=torch.float32, layout=ExpertLayout(), activation="swiglu", bias=True):
    return GluExperts(E, H, I, activation, bias, layout).to(dtype).requires_grad_(False)


def routed(tokens, dtype=torch.float32):
    routing = random_routing(tokens, E, 2)
    weights = routing.weights.to(torch.promote_types(dtype, torch.float32))
    return torch.randn(tokens, H).to(dtype), Routing(routing.ids, weights, E)


@pytest.mark.parametrize("tokens", [0, 1, 5, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_layer(dtype, tokens):
    module, (x, routing) = experts(dtype), routed(tokens, dtype)
    parameters = [p.double() for p in module.parameters()]
    assert prepack_(module) == [""] and module.gate_up_proj.dim() == module.down_proj.dim() == 5

    def reference(x, *parameters):
        w1, w2, b1, b2 = parameters
        weights = routing.weights.to(x.dtype)
        return fused_experts_ref(x, Routing(routing.ids, weights, E), w1, w2, (b1, b2))

    assert_rows_close(module(x, routing), reference, x, *(p.to(dtype) for p in parameters))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", Activation("swiglu_oai"), "relu2"], ids=str)
def test_layouts_and_what_is_saved(activation, transposed, interleaved):
    module = experts(layout=ExpertLayout(transposed, interleaved), activation=activation)
    before, (x, routing) = copy.deepcopy(module), routed(40)
    prepack_(module)
    torch.testing.assert_close(module(x, routing), before(x, routing), rtol=1e-5, atol=1e-6)
    saved = module.state_dict()
    assert list(saved) == list(before.state_dict())
    assert all(torch.equal(saved[name], value) for name, value in before.state_dict().items())
    assert module.gate_up_proj.dim() == 5  # saving does not undo it
    assert unprepack_(module) == [""] and unprepack_(module) == []
    assert torch.equal(module(x, routing), before(x, routing))


def test_a_row_does_not_depend_on_the_others():
    for dtype in (torch.float32, torch.bfloat16):
        module, (x, routing) = experts(dtype), routed(700, dtype)
        prepack_(module)
        whole = module(x, routing)
        for tokens in (1, 2, 3, 7, 16, 64, 257):
            part = Routing(routing.ids[:tokens], routing.weights[:tokens], E)
            assert torch.equal(module(x[:tokens], part), whole[:tokens]), (dtype, tokens)


def test_loading_puts_the_weights_back():
    module, other, (x, routing) = experts(), experts(), routed(9)
    prepack_(module)
    module.load_state_dict(other.state_dict())
    assert module.gate_up_proj.shape == (E, 2 * I, H)
    assert torch.equal(module(x, routing), other(x, routing))


def test_below_a_model_and_copied():
    model = nn.Sequential(*[MoELayer(TopKRouter(H, num_experts=E, k=2), GluExperts(E, H, I)) for _ in range(2)])
    x = torch.randn(7, H)
    with torch.no_grad():
        want = model(x)
        assert prepack_(model) == ["0.experts", "1.experts"] and prepack_(model) == []
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), model(x)) and unprepack_(copied) == ["0.experts", "1.experts"]
        assert torch.equal(copied(x), want)
        assert model[0].experts.gate_up_proj.dim() == 5


def test_compiles_for_any_number_of_tokens():
    module = experts()
    prepack_(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for tokens in (2, 5, 9):
        x, routing = routed(tokens)
        assert torch.equal(compiled(x, routing), module(x, routing))


def test_sizes_that_do_not_fill_panels_stay():
    module = GluExperts(E, 100, 36)
    before = copy.deepcopy(module.state_dict())
    assert prepack_(module) == []
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_errors():
    with pytest.raises(ValueError, match="module must hold experts that fused_experts runs, got none in Linear"):
        prepack_(nn.Linear(2, 2))
    module, (x, routing) = experts(), routed(3)
    prepack_(module)
    with pytest.raises(ValueError, match="w1 must not lie in panels where gradients are wanted"):
        module(x.requires_grad_(), routing)
    columns, depth = moert._C.panel("float64")
    got = rf"w1 in panels must be contiguous and have shape \[E, 2I / columns, H / depth, columns={columns}"
    with pytest.raises(RuntimeError, match=got):
        module.double()(x.detach().double(), Routing(routing.ids, routing.weights.double(), E))
    w1 = module.float().gate_up_proj
    with pytest.raises(RuntimeError, match=r"w1 must be \[E, 2I, H\], got shape"):
        moert.fused_experts(x.detach(), routing, w1, torch.zeros(E, H, I))
    half = torch.zeros(E, 3, H, moert._C.panel("float32")[0], 1)  # the up rows would begin within a panel
    down = torch.zeros(E, H // half.shape[3], half.shape[3] * 3 // 2, half.shape[3], 1)
    with pytest.raises(RuntimeError, match="w1 in panels must have its gate and up rows in panels of their own"):
        moert.fused_experts(x.detach(), routing, half, down)
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16, float16 or float64, got int8"):
        moert._C.panel("int8")
