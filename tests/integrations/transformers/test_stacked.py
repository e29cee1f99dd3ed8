"""Parameters of separate modules in one piece of memory: the same values, the same objects, no copy to stack them."""

import copy

import pytest
import safetensors.torch
import torch
from outside import outside_model
from torch import nn

from moert.integrations.transformers import swap_
from moert.integrations.transformers.stacked import Stacked, lie_together, pack_, stack
from moert.integrations.transformers.swap import blocks


def parameters(E: int = 4, dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(3, 5, dtype=dtype)) for _ in range(E)]


def stacked(params, chosen=None) -> torch.Tensor:
    return stack(params.__getitem__, len(params), chosen)


def packed(E: int = 4) -> list[nn.Parameter]:
    params = parameters(E)
    pack_(params)
    return params


def test_pack_keeps_values_and_objects():
    params = parameters()
    before = [(id(p), p.detach().clone()) for p in params]
    assert not lie_together(params)
    pack_(params)
    assert lie_together(params)
    assert all(id(p) == i and torch.equal(p, x) and p.is_leaf for p, (i, x) in zip(params, before, strict=True))


def test_packing_again_moves_nothing():
    params = packed()
    addresses = [p.data_ptr() for p in params]
    pack_(params)
    assert addresses == [p.data_ptr() for p in params]


def test_stack_shares_memory_and_sees_updates():
    params = packed()
    with torch.no_grad():
        params[2].add_(1)
        whole = stacked(params)
        assert whole.data_ptr() == params[0].data_ptr()
        assert torch.equal(whole, torch.stack([p.detach() for p in params]))


@pytest.mark.parametrize("make", [parameters, packed])
def test_gradients(make):
    params = make()
    params[1].requires_grad_(False)
    cotangent = torch.randn(4, 3, 5)
    (stacked(params, [0, 3]) * cotangent).sum().backward()
    assert params[1].grad is None and params[2].grad is None, "frozen, and not chosen"
    assert torch.equal(params[0].grad, cotangent[0]) and torch.equal(params[3].grad, cotangent[3])
    (stacked(params) * cotangent).sum().backward()
    assert torch.equal(params[2].grad, cotangent[2]) and torch.equal(params[0].grad, 2 * cotangent[0])


def test_only_chosen_experts_need_lie_in_place():
    params = packed()
    params[2] = nn.Parameter(torch.randn(3, 5))
    assert stacked(params, [0, 3]).data_ptr() == params[0].data_ptr()
    assert torch.equal(stacked(params, [2, 3])[2], params[2])


def test_a_change_between_forward_and_backward_is_noticed():
    params = packed()
    y = stacked(params).square().sum()
    with torch.no_grad():
        params[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_nothing_is_recorded_for_frozen_parameters():
    params = [p.requires_grad_(False) for p in packed()]
    assert not stacked(params).requires_grad


@pytest.mark.parametrize("spoil", ["reorder", "replace", "dtype", "shape", "strides"])
def test_what_does_not_lie_together_is_copied(spoil):
    params = packed()
    if spoil == "reorder":
        params.reverse()
    elif spoil == "replace":
        params[2] = nn.Parameter(torch.randn(3, 5))
    elif spoil == "dtype":
        params[3] = nn.Parameter(params[3].double())
    elif spoil == "shape":
        params[3] = nn.Parameter(torch.randn(3, 4))
    else:
        params = [nn.Parameter(torch.randn(5, 3).T) for _ in range(4)]
    assert not lie_together(params)
    if spoil in ("dtype", "shape"):
        pack_(params)
        assert not lie_together(params), "what cannot be packed is left alone"
        return
    assert torch.equal(stacked(params), torch.stack(tuple(params)))


def test_tied_and_meta_parameters_are_left_alone():
    one = nn.Parameter(torch.randn(3, 5))
    tied = [one, nn.Parameter(torch.randn(3, 5)), one]
    address = one.data_ptr()
    pack_(tied)
    assert one.data_ptr() == address and torch.equal(stacked(tied), torch.stack(tied))
    stacked(tied).sum().backward()
    assert (one.grad == 2).all()
    meta = [nn.Parameter(torch.empty(3, 5, device="meta")) for _ in range(2)]
    pack_(meta)
    assert all(p.is_meta for p in meta)


def test_packed_in_inference_mode_they_can_still_be_trained():
    params = parameters()
    with torch.inference_mode():
        pack_(params)
    (stacked(params).square()).sum().backward()
    assert all(torch.allclose(p.grad, 2 * p) for p in params)


def test_gradients_can_be_detached_and_changed_in_place():
    params = packed()
    stacked(params).sum().backward()
    for p in params:
        p.grad.mul_(3)
        p.grad = p.grad.detach()
        p.grad.zero_()
    assert all((p.grad == 0).all() for p in params)


@pytest.fixture(params=["switch_transformers", "nllb_moe", "vitpose_backbone"])
def model(request):
    return swap_(outside_model(request.param))


def together(model) -> bool:
    stacks = [params for _, block in blocks(model) for params in block.stacks()]
    return bool(stacks) and all(map(lie_together, stacks))


def test_a_model_stays_packed_through_moves_and_copies(model):
    assert together(model)
    assert together(model.to(torch.bfloat16)) and next(model.parameters()).dtype == torch.bfloat16
    assert together(copy.deepcopy(model))
    model.share_memory()
    assert together(model) and all(p.is_shared() for p in model.parameters())


def test_a_load_that_replaces_parameters_is_packed_by_the_next_swap(model):
    model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    assert not together(model)
    assert together(swap_(model))


def test_safetensors_saves_packed_parameters(model, tmp_path):
    tied = set(model.all_tied_weights_keys)
    state = {name: x for name, x in model.state_dict().items() if name not in tied}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], x) for name, x in state.items())


def test_a_stacked_module_says_what_it_stacks():
    with pytest.raises(TypeError, match=r"Stacked must define stacks\(\)"):
        Stacked().stacks()
