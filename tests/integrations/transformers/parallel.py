"""What each rank of a job does to compare a model that transformers has spread over the ranks with one process.

In float64, where the order of sums does not matter: what is compared is which rank computes what.  FSDP2 is compared in
float32: it wants one dtype, and some classes keep parameters in float32; with expert parallelism the gradients of the
experts come out halved in float64, those of eager too.
Every rank also computes the one-process run itself, so nothing but words passes between processes.
"""

import contextlib
import functools
import inspect
import json
from pathlib import Path

import torch
import torch.distributed as dist
from compare import InDouble
from families import Family, families, tiny_inputs, tiny_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import moert.integrations.transformers  # noqa: F401  registers "moert"

# How a model is spread over two ranks, and over four: arguments of DistributedConfig.
LAYOUTS = {
    "tensor parallel": {"tp_size": 2},
    "expert parallel, all_reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "expert parallel, all_to_all": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "expert parallel, moert": {"tp_size": 2, "ep_size": 2, "ep_implementation": "moert"},
    "FSDP2": {"fsdp_size": 2},
    "FSDP2 and expert parallel": {"fsdp_size": 2, "ep_size": 2},
    "FSDP2 and expert parallel, moert": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "moert"},
}
LAYOUTS_OF_4 = {
    "tensor parallel and FSDP2": {"tp_size": 2, "fsdp_size": 2},
    "tensor and expert parallel and FSDP2": {"tp_size": 2, "fsdp_size": 2, "ep_size": 2},
    "tensor and expert parallel and FSDP2, moert": {
        "tp_size": 2,
        "fsdp_size": 2,
        "ep_size": 2,
        "ep_implementation": "moert",
    },
}
STEPS = 3


def compare(folder: str, kinds: dict[str, list[str]], bound: float) -> dict[str, str]:
    """kind: layout -> what differs from one process by more than the bound, or did not change; "" if nothing."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    told = {}
    for kind, layouts in kinds.items():
        alone = functools.cache(lambda dtype: train(load(kind, folder, dtype), slice(None))[0])
        for name in layouts:
            layout = (LAYOUTS | LAYOUTS_OF_4)[name]
            tensor, data = layout.get("tp_size", 1), layout.get("fsdp_size", 1)
            dtype = torch.float32 if data > 1 else torch.float64
            model = load(kind, folder, dtype, distributed_config=DistributedConfig(**layout))
            together, idle = train(model, slice(dist.get_rank() // tensor, None, data))
            if data > 1:
                together["logits"] = whole_batch(together["logits"], tensor)
            told[f"{kind}: {name}"] = "; ".join([*differences(together, alone(dtype), bound), *idle])
    return told


def save(kind: str, folder: str) -> None:
    tiny_model(by_id(kind)).save_pretrained(Path(folder, kind))


def load(kind: str, folder: str, dtype: torch.dtype, **options) -> nn.Module:
    (name,) = json.loads(Path(folder, kind, "config.json").read_text())["architectures"]
    model_class = getattr(inspect.getmodule(by_id(kind).experts), name)
    options |= {"dtype": dtype, "experts_implementation": "moert"}
    model = model_class.from_pretrained(Path(folder, kind), **options).eval()
    for p in model.parameters():  # what a class keeps in float32 is float64 here too
        p.data = p.data.double() if dtype == torch.float64 else p.data
    return model


def by_id(kind: str) -> Family:
    return next(family for family in families() if family.id == kind)


def train(model: nn.Module, rows: slice) -> tuple[dict[str, Tensor], list[str]]:
    """Logits and gradients of the first of a few steps on these rows of the batch, and the weights after the last.

    Also which experts' weights on this rank did not change.
    """
    results, double = {}, model.dtype == torch.float64
    batch = {name: x[rows] for name, x in tiny_inputs(model).items()}
    before = {name: local(p) for name, p in model.named_parameters() if ".experts." in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with InDouble() if double else contextlib.nullcontext():
            logits = model(**batch, use_cache=False)[0]
        logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
        cotangent = torch.randn(2, *logits.shape[1:], generator=torch.Generator().manual_seed(2))
        # A mean over the rows of the batch: what data parallelism averages over ranks.
        (logits * cotangent[rows]).sum(-1).mean().backward()
        if not results:
            results["logits"] = logits.detach()
            results |= {f"d{name}": full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    weights = dict(model.named_parameters())
    results |= {f"weight {name}": full(p) for name, p in weights.items()}
    return results, [f"{name} did not change" for name, p in before.items() if torch.equal(local(weights[name]), p)]


@torch.no_grad()
def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


@torch.no_grad()
def local(x: Tensor) -> Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).clone()


def whole_batch(rows: Tensor, copies: int) -> Tensor:
    """The rows of all ranks, of which every `copies` in a row hold the same."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts[::copies])


def differences(together: dict[str, Tensor], alone: dict[str, Tensor], bound: float) -> list[str]:
    if together.keys() != alone.keys():
        return [f"there are results on one side only: {sorted(together.keys() ^ alone.keys())}"]
    wrong = []
    for kind in ("logits", "d", "weight "):
        names = [name for name in alone if name.startswith(kind)]
        allowed = bound * STEPS if kind == "weight " else bound  # every step adds an error of its own
        largest = max(alone[name].norm().item() for name in names)
        for name in names:
            # A gradient that is zero but for rounding is compared with the size of the largest.
            size = max(alone[name].norm().item(), 1e-3 * largest)
            error = (together[name] - alone[name]).norm().item() / size
            if not error <= allowed:
                wrong.append(f"{name} is off by {error:.2g}")
    return wrong
