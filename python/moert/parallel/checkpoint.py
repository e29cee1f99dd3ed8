"""Checkpoints of torch.distributed.checkpoint with an entry for each expert, whatever rank it lies on.

So what one number of ranks saved another loads, with any placement, and one process that has all experts too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from moert.experts.glu import GluExperts
from moert.parallel.expert_parallel import ExpertParallel

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_INSIDE = (".module.", "._orig_mod.")  # of what wraps a model: its state dict leaves the name out


def save_checkpoint(folder: str | PathLike, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Write the model, and what its optimizer knows, to folder: every rank calls it, each writes what it holds.

    The folder is complete when this returns (.metadata is written last).
    """
    entries = {}
    for part in _states(model, optimizer).values():
        entries |= _entries(part, _stacks(model))
    dcp.save(entries, checkpoint_id=folder)


def load_checkpoint(folder: str | PathLike, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Read into the model, and its optimizer, what save_checkpoint wrote, each rank what it holds now.

    A tensor that the folder lacks, or has in another shape, is a ValueError on every rank.
    """
    states = _states(model, optimizer)
    stacks, entries = _stacks(model), {}
    for part in states.values():
        entries |= _entries(part, stacks)
    try:
        dcp.load(entries, checkpoint_id=folder)  # tensors in place, the experts' through views of them
    except CheckpointException as error:  # no Exception: nothing but its own name would catch it
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise ValueError(f"folder must hold all of model and optimizer, got on rank {rank}: {cause}") from error
    for part in states.values():
        for key in part:
            part[key] = entries.get(_lasting(key, stacks)[0], part[key])
    set_model_state_dict(model, states["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, states["optimizer"], options=_FLAT)


def _states(model: nn.Module, optimizer: Optimizer | None) -> dict[str, dict]:
    states = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        with _without_gradients(optimizer):
            states["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    return states


@contextmanager
def _without_gradients(optimizer: Optimizer) -> Iterator[None]:
    """torch makes the state of a new optimizer, to load into, only where no parameter has a gradient."""
    gradients = [(parameter, parameter.grad) for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _entries(part: dict, stacks: dict) -> dict:
    """Under the names of a checkpoint, stacked experts in an entry for each: "<module>.gate_up_proj.<expert>"."""
    entries = {}
    for key, value in part.items():
        name, ids = _lasting(key, stacks)
        if ids is None or not isinstance(value, Tensor) or value.dim() == 0:
            entries[name] = value
        else:
            entries |= {f"{name}.{expert}": rows for expert, rows in zip(ids, value, strict=True)}
    return entries


def _lasting(key: str, stacks: dict) -> tuple[str, list[int] | None]:
    """The name of an entry wherever its experts lie, and which they are; None where it is not one of experts."""
    for name, (lasting, ids) in stacks.items():
        for prefix in ("", "state.", "param_groups."):
            if key == prefix + name or (prefix and key.startswith(f"{prefix}{name}.")):
                return prefix + lasting + key[len(prefix + name) :], ids
    return key, None


def _stacks(model: nn.Module) -> dict[str, tuple[str, list[int]]]:
    """Name of each parameter that holds experts -> its name wherever the experts lie, and the ids of its rows."""
    stacks, spread = {}, {}
    for name, module in model.named_modules(remove_duplicate=False):  # the state dict has all names of what is shared
        if isinstance(module, ExpertParallel):
            spread[f"{name}.local" if name else "local"] = (name, module.expert_ids)
        elif isinstance(module, GluExperts):
            lasting, ids = spread.get(name, (name, list(range(module.num_experts))))
            for key, _ in module.named_parameters():
                stacks[_clean(f"{name}.{key}")] = (_clean(f"{lasting}.{key}"), ids)
    return stacks


def _clean(name: str) -> str:
    """As the state dict of the whole model has it: wrappers are not part of names."""
    name = f".{name}"
    for inside in _INSIDE:
        name = name.replace(inside, ".")
    return name[1:]
