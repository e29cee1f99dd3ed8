"""Which experts every token of a running model went to: recorded by hooks, kept in npz files.

Letters: T tokens (rows of all calls), k choices, E experts, n calls.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from moert.experts.base import Experts
from moert.files import read_arrays, write_arrays
from moert.types import Routing

_VERSION = 1
_MOST_EXPERTS = 2**20  # of a layer: counts of them are made whatever a file says of their number
_MOST_PAIRS = 2**26


@dataclass(frozen=True)
class LayerTrace:
    """ids [T, k] of one layer, -1 where a choice was dropped; calls [n]: how many of the T rows each call had."""

    name: str
    num_experts: int
    ids: np.ndarray
    calls: np.ndarray

    def __post_init__(self):
        E, ids, calls = self.num_experts, self.ids, self.calls
        if not 1 <= E <= _MOST_EXPERTS:
            raise ValueError(f"num_experts must be in [1, {_MOST_EXPERTS}], got {E}")
        if ids.ndim != 2 or ids.dtype.kind != "i" or ids.shape[1] < 1:
            raise ValueError(f"ids must be signed integers [T, k >= 1], got {ids.dtype} {list(ids.shape)}")
        if ids.size and not (ids.min() >= -1 and ids.max() < E):
            raise ValueError(f"ids must be in [-1, E={E}), got {ids.min()} to {ids.max()}")
        if calls.ndim != 1 or calls.dtype.kind != "i" or (calls < 0).any() or calls.sum(dtype=object) != len(ids):
            raise ValueError(f"calls must be integers [n] that sum to T={len(ids)}, got {calls.dtype} {calls.tolist()}")

    def loads(self) -> np.ndarray:
        """int64 [E]: how many choices each expert was."""
        return np.bincount(self.ids[self.ids >= 0], minlength=self.num_experts)

    def call_of_row(self) -> np.ndarray:
        """int64 [T]: the call that each row was part of."""
        return np.repeat(np.arange(len(self.calls)), self.calls)


@dataclass(frozen=True)
class RoutingTrace:
    """The layers of a model in the order in which they ran first."""

    layers: tuple[LayerTrace, ...]

    def pairs(self, layer: int) -> np.ndarray:
        """int64 [E, E']: tokens that chose e in the layer and e' in the next one, each of a token's k x k' pairs."""
        here, after = self.layers[layer], self.layers[layer + 1]
        if len(here.ids) != len(after.ids) or not np.array_equal(here.calls, after.calls):
            raise ValueError(
                f"layers must have seen the same rows, got {len(here.ids)} in {here.name} and {len(after.ids)} in "
                f"{after.name}"
            )
        E, next_E = here.num_experts, after.num_experts
        if E * next_E > _MOST_PAIRS:
            raise ValueError(f"pairs of experts must be at most {_MOST_PAIRS}, got {E} x {next_E}")
        total = np.zeros(E * next_E, dtype=np.int64)
        for j in range(here.ids.shape[1]):
            for i in range(after.ids.shape[1]):
                both = (here.ids[:, j] >= 0) & (after.ids[:, i] >= 0)
                index = here.ids[both, j].astype(np.int64) * next_E + after.ids[both, i]
                total += np.bincount(index, minlength=E * next_E)
        return total.reshape(E, next_E)

    @classmethod
    def of_ranks(cls, traces: Sequence["RoutingTrace"]) -> "RoutingTrace":
        """What data parallel ranks recorded, each of its own rows: a call has the rows of rank 0's, then rank 1's, …"""
        if not traces:
            raise ValueError("traces must be at least one, got none")
        first = [(layer.name, layer.num_experts, len(layer.calls)) for layer in traces[0].layers]
        for rank, trace in enumerate(traces):
            if (found := [(layer.name, layer.num_experts, len(layer.calls)) for layer in trace.layers]) != first:
                raise ValueError(f"traces must have the same layers and calls, got {found} of rank {rank} and {first}")
        return cls(tuple(_joined(layers) for layers in zip(*(trace.layers for trace in traces), strict=True)))

    def halves(self) -> tuple["RoutingTrace", "RoutingTrace"]:
        """Even and odd rows of every call: one to decide by, one to judge with."""
        return self._rows(0), self._rows(1)

    def _rows(self, first: int) -> "RoutingTrace":
        def of(layer: LayerTrace) -> LayerTrace:
            starts = np.cumsum(layer.calls) - layer.calls
            kept = (np.arange(len(layer.ids)) - starts[layer.call_of_row()]) % 2 == first
            return LayerTrace(layer.name, layer.num_experts, layer.ids[kept], (layer.calls + 1 - first) // 2)

        return RoutingTrace(tuple(map(of, self.layers)))

    def save(self, path: Path | str) -> None:
        """Plain arrays; the file is there whole or not at all."""
        arrays = {
            "moert_trace": np.array([_VERSION]),
            "layers": np.array([layer.name for layer in self.layers], dtype=np.str_),
            "num_experts": np.array([layer.num_experts for layer in self.layers], dtype=np.int64),
        }
        for i, layer in enumerate(self.layers):
            arrays |= {f"ids_{i}": layer.ids, f"calls_{i}": layer.calls}
        write_arrays(Path(path), arrays)

    @classmethod
    def load(cls, path: Path | str) -> "RoutingTrace":
        """What save wrote; a ValueError names the file and what is wrong with it."""
        arrays = read_arrays(Path(path))
        try:
            return cls(_layers_of(arrays))
        except (ValueError, KeyError) as error:
            what = f"no array {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} must be a routing trace of moert, got {what}") from error


def _joined(layers: tuple[LayerTrace, ...]) -> LayerTrace:
    k = max(layer.ids.shape[1] for layer in layers)
    padded = [np.pad(layer.ids, ((0, 0), (0, k - layer.ids.shape[1])), constant_values=-1) for layer in layers]
    order = np.argsort(np.concatenate([layer.call_of_row() for layer in layers]), kind="stable")
    calls = np.sum([layer.calls for layer in layers], axis=0, dtype=np.int64)
    return LayerTrace(layers[0].name, layers[0].num_experts, np.concatenate(padded)[order], calls)


def _layers_of(arrays: dict[str, np.ndarray]) -> tuple[LayerTrace, ...]:
    version, names, experts = arrays["moert_trace"], arrays["layers"], arrays["num_experts"]
    if version.shape != (1,) or version[0] != _VERSION:
        raise ValueError(f"version {version.tolist()}, where {_VERSION} is known")
    if names.ndim != 1 or experts.shape != names.shape or names.dtype.kind != "U" or experts.dtype.kind != "i":
        raise ValueError(f"layers {list(names.shape)} with num_experts {list(experts.shape)}")
    of_each = zip(names.tolist(), experts.tolist(), strict=True)
    return tuple(LayerTrace(name, E, arrays[f"ids_{i}"], arrays[f"calls_{i}"]) for i, (name, E) in enumerate(of_each))


class RoutingRecorder:
    """What record_routings fills; everything stays on the model's device until trace() is called."""

    def __init__(self, keep_ids: bool):
        self._keep_ids = keep_ids
        self._ids: dict[str, list[Tensor]] = {}
        self._loads: dict[str, Tensor] = {}

    def see(self, name: str, ids: Tensor, num_experts: int) -> None:
        """Counts ids [T, k] (any leading dimensions) without waiting for the device."""
        if ids.is_floating_point() or ids.is_complex():
            raise TypeError(f"ids of {name} must be integers, got {ids.dtype}")
        ids = ids.detach().flatten(0, -2).long()
        ids = torch.where((ids >= 0) & (ids < num_experts), ids, -1)
        if name not in self._loads:
            self._loads[name] = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
        # The last row takes the -1s; torch.bincount would read the largest id on the host.
        slots = ids.flatten() % (num_experts + 1)
        self._loads[name].scatter_add_(0, slots, torch.ones_like(slots))
        if self._keep_ids:
            kept = ids.to(torch.int16 if num_experts < 2**15 else torch.int32)
            self._ids.setdefault(name, []).append(kept)

    def loads(self) -> dict[str, Tensor]:
        """int64 [E] of each layer so far, on its device: how many choices each expert was."""
        return {name: counted[:-1].clone() for name, counted in self._loads.items()}

    def trace(self) -> RoutingTrace:
        """All calls so far, copied to the host; choices of calls that had fewer than others are -1."""
        if not self._keep_ids:
            raise ValueError("keep_ids must be True for a trace, got False")
        layers = []
        for name, calls in self._ids.items():
            k = max(ids.shape[1] for ids in calls)
            rows = [nn.functional.pad(ids, (0, k - ids.shape[1]), value=-1) for ids in calls]
            counts = np.array([len(ids) for ids in rows], dtype=np.int64)
            num_experts = len(self._loads[name]) - 1
            layers.append(LayerTrace(name, num_experts, torch.cat(rows).cpu().numpy(), counts))
        return RoutingTrace(tuple(layers))


@contextmanager
def record_routings(model: nn.Module, keep_ids: bool = True) -> Iterator[RoutingRecorder]:
    """Inside, the recorder that is yielded sees each call of the model's experts, moert's and Hugging Face's.

    keep_ids=False keeps the loads alone, in constant memory.  Rows that activation checkpointing computes again are
    counted again.
    """
    experts = experts_in(model)
    if not experts:
        raise ValueError(f"model must have experts of moert or of transformers' interface, got {type(model).__name__}")
    recorder = RoutingRecorder(keep_ids)
    with ExitStack() as stack:
        for name, module in experts.items():
            second = list(inspect.signature(module.forward).parameters)[1]
            hook = module.register_forward_pre_hook(_seeing(recorder, name, second), with_kwargs=True)
            stack.callback(hook.remove)
        yield recorder


def experts_in(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost experts modules by name, in the order of the modules."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        within = any(name.startswith(f"{other}." if other else "") for other in found)
        # transformers' interface sets is_concatenated on its classes; moert does not import transformers for this.
        if not within and (isinstance(module, Experts) or hasattr(module, "is_concatenated")):
            found[name] = module
    return found


def _seeing(recorder: RoutingRecorder, name: str, second: str):
    """second: the name of forward's second argument, which a call may spell out."""

    def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
        routed = args[1] if len(args) > 1 else kwargs[second]
        if isinstance(routed, Routing):
            recorder.see(name, routed.ids, routed.num_experts)
        else:
            # Where transformers spreads experts over ranks this is of all of them, and num_experts of this one alone.
            spread = getattr(module, "_is_expert_parallel", False)
            recorder.see(name, routed, next(module.parameters()).shape[0] if spread else module.num_experts)

    return see
