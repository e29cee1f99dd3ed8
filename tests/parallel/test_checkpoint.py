import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.parallel.test_expert_parallel import H, block, expert_parameters, shard_experts_, train, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moert.parallel import load_checkpoint, save_checkpoint
from ranks import ranks

PLACEMENTS = {4: [3, 0, 1, 2, 1, 0, 3], 2: [0, 1, 1, 1, 0, 0, 1]}


def spread(R: int, wrap: str):
    """The model of a rank, as one hands it to an optimizer."""
    model = shard_experts_(block(), placement={"moe.experts": PLACEMENTS[R]}, gradients="mean")
    own = expert_parameters(model)
    if wrap == "DDP":
        model._ddp_params_and_buffers_to_ignore = list(own)
        return model, DistributedDataParallel(model)
    if wrap == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (R,)), ignored_params=set(own.values()))
    return model, model


def batch() -> torch.Tensor:
    return torch.randn(8, H, generator=torch.Generator().manual_seed(7))


def some_steps(model, optimizer, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def rows_of_rank(R: int) -> torch.Tensor:
    return batch().chunk(R)[dist.get_rank()]


def save_after_two_steps(folder: str, wrap: str, R: int) -> None:
    model, wrapped = spread(R, wrap)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    some_steps(wrapped, optimizer, rows_of_rank(R), 2)
    save_checkpoint(folder, wrapped, optimizer)


def go_on_with_others(folder: str, wrap: str, R: int, expected: str) -> None:
    """Two more steps on R ranks: the weights of one process that made four."""
    model, wrapped = spread(R, wrap)
    for parameter in model.parameters():
        parameter.detach().zero_()
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.5)  # what is saved is what counts
    load_checkpoint(folder, wrapped, optimizer)
    some_steps(wrapped, optimizer, rows_of_rank(R), 2)
    for name, weight in load_file(expected).items():
        if ".experts." in name:
            got = model.get_parameter(name.replace("experts.", "experts.local."))
            weight = weight[model.moe.experts.expert_ids]
        else:
            got = whole(model.get_parameter(name))
        assert (got - weight).norm() <= 1e-4 * weight.norm(), name


@pytest.mark.parametrize("saved,loaded", [("DDP", "FSDP2"), ("FSDP2", "DDP")])
def test_four_ranks_save_and_two_go_on(tmp_path, saved, loaded):
    alone = block()
    train(alone, batch(), 4)
    save_file(alone.state_dict(), tmp_path / "expected.safetensors")
    folder = str(tmp_path / "checkpoint")
    ranks(4, save_after_two_steps, folder, saved, 4)
    ranks(2, go_on_with_others, folder, loaded, 2, str(tmp_path / "expected.safetensors"))
    # One process, and what it writes is a plain file in Hugging Face's layout.
    model = block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    load_checkpoint(folder, model, optimizer)
    some_steps(model, optimizer, batch(), 2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    got, expected = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "expected.safetensors")
    assert got.keys() == expected.keys() and got["moe.experts.gate_up_proj"].shape == (7, 20, 12)
    for name, weight in expected.items():
        assert (got[name] - weight).norm() <= 1e-4 * weight.norm(), name
    # And what one process saves it loads again.
    save_checkpoint(tmp_path / "again", model)
    again = block()
    load_checkpoint(tmp_path / "again", again)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def shared_experts_are_one(folder: str) -> None:
    """What has two names in the model keeps its experts apart under both."""

    def model():
        blocks = nn.ModuleList([block(), block()])
        blocks[1].moe.experts = blocks[0].moe.experts
        return shard_experts_(blocks)

    saved, loaded = model(), model()
    loaded[0].moe.experts.local.down_proj.detach().zero_()
    save_checkpoint(folder, saved)
    load_checkpoint(folder, loaded)
    assert torch.equal(loaded[1].moe.experts.local.down_proj, saved[0].moe.experts.local.down_proj)


def test_a_module_with_two_names(tmp_path):
    ranks(2, shared_experts_are_one, str(tmp_path / "checkpoint"))


def test_a_new_optimizer_is_loaded_beside_gradients(tmp_path):
    model, again = block(), block()
    optimizer, new = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, again))
    some_steps(model, optimizer, batch(), 2)
    save_checkpoint(tmp_path / "checkpoint", model, optimizer)
    again(batch()).sum().backward()
    gradients = [p.grad.clone() for p in again.parameters()]
    load_checkpoint(tmp_path / "checkpoint", again, new)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert new.state[b]["step"] == 2 and torch.equal(new.state[b]["exp_avg"], optimizer.state[a]["exp_avg"])
    assert all(map(torch.equal, (p.grad for p in again.parameters()), gradients))


def test_errors(tmp_path):
    model, told = block(), "folder must hold all of model and optimizer, got on rank 0: "
    save_checkpoint(tmp_path / "checkpoint", model)
    with pytest.raises(ValueError, match=f"{told}Missing key in checkpoint state_dict: "):
        load_checkpoint(tmp_path / "checkpoint", model, torch.optim.AdamW(model.parameters()))
    model.inner = torch.nn.Linear(H, H + 1)
    with pytest.raises(ValueError, match=f"{told}Size mismatch"):
        load_checkpoint(tmp_path / "checkpoint", model)
    with pytest.raises(ValueError, match=f"{told}.*absent"):
        load_checkpoint(tmp_path / "absent", model)
