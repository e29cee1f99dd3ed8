"""The rank of every expert in each layer, and its file.  Letters: E experts, R ranks, T tokens, k choices."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moert.analysis.trace import RoutingTrace
from moert.files import write_atomically
from moert.placement.topology import Topology

_VERSION = 1
_MOST_BYTES = 2**28  # of a file: a thousand layers of ten thousand experts have less


@dataclass(frozen=True)
class PlacedLayer:
    """expert_to_rank int64 [E] of the experts module `name`; replicas are further (expert, rank), copies of weights."""

    name: str
    expert_to_rank: np.ndarray
    replicas: tuple[tuple[int, int], ...] = ()

    def holders(self, num_ranks: int) -> np.ndarray:
        """bool [E, R]: who has the weights."""
        held = np.zeros((len(self.expert_to_rank), num_ranks), dtype=bool)
        held[np.arange(len(held)), self.expert_to_rank] = True
        for expert, rank in self.replicas:
            held[expert, rank] = True
        return held

    def ranks(self, ids: np.ndarray, homes: np.ndarray, topology: Topology) -> np.ndarray:
        """int64 [T, k]: where the choices ids [T, k] of tokens from homes [T] are computed, -1 for a dropped one.

        At home where it can be, else in the home's node, else anywhere; several holders take tokens in turn.
        """
        dropped = ids < 0
        found = np.asarray(self.expert_to_rank)[ids]
        held, cost = self.holders(topology.num_ranks), topology.row_cost()
        for expert in {expert for expert, _ in self.replicas}:
            token, choice = np.nonzero(ids == expert)
            ranks = np.flatnonzero(held[expert])
            for home in np.unique(homes[token]):
                nearest = ranks[cost[home, ranks] == cost[home, ranks].min()]
                mine = homes[token] == home
                found[token[mine], choice[mine]] = nearest[token[mine] % len(nearest)]
        return np.where(dropped, -1, found)


@dataclass(frozen=True)
class ExpertPlacement:
    """A PlacedLayer for each layer; checked when it is made."""

    num_ranks: int
    layers: tuple[PlacedLayer, ...]

    def __post_init__(self):
        if self.num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, got {self.num_ranks}")
        names = [layer.name for layer in self.layers]
        if len(set(names)) < len(names):
            raise ValueError(f"layers must have names of their own, got {names}")
        for layer in self.layers:
            _check(layer, self.num_ranks)

    def by_module(self) -> "dict[str, np.ndarray | PlacedLayer]":
        """Name of the experts module -> expert_to_rank [E], or the layer where it has replicas: for shard_experts_."""
        return {layer.name: layer if layer.replicas else layer.expert_to_rank for layer in self.layers}

    def save(self, path: Path | str) -> None:
        """JSON, there whole or not at all."""
        layers = [
            {
                "name": layer.name,
                "expert_to_rank": np.asarray(layer.expert_to_rank).tolist(),
                "replicas": [list(map(int, pair)) for pair in layer.replicas],
            }
            for layer in self.layers
        ]
        text = json.dumps({"moert_placement": _VERSION, "num_ranks": self.num_ranks, "layers": layers}) + "\n"
        write_atomically(Path(path), lambda temporary: temporary.write_text(text))

    @classmethod
    def load(cls, path: Path | str) -> "ExpertPlacement":
        """What save wrote; a ValueError names the file and what is wrong with it."""
        path = Path(path)
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path} must be a placement of at most {_MOST_BYTES} bytes, got {path.stat().st_size}")
        data = path.read_bytes()
        try:
            value = json.loads(data)
            if value["moert_placement"] != _VERSION:
                raise ValueError(f"version {value['moert_placement']}, where {_VERSION} is known")
            return cls(_integer(value["num_ranks"]), tuple(map(_layer, value["layers"])))
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            what = f"nothing for {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{path} must be a placement of experts, got {' '.join(str(what).split())[:200]}"
            ) from error


def contiguous(trace: RoutingTrace, num_ranks: int) -> ExpertPlacement:
    """Experts in their order, E/R to a rank, the first ranks one more where that leaves a rest."""
    return _everywhere(trace, num_ranks, lambda E: np.sort(np.arange(E) % num_ranks))


def round_robin(trace: RoutingTrace, num_ranks: int) -> ExpertPlacement:
    """Expert e on rank e mod R."""
    return _everywhere(trace, num_ranks, lambda E: np.arange(E) % num_ranks)


def _everywhere(trace: RoutingTrace, num_ranks: int, rule) -> ExpertPlacement:
    return ExpertPlacement(num_ranks, tuple(PlacedLayer(each.name, rule(each.num_experts)) for each in trace.layers))


def _check(layer: PlacedLayer, num_ranks: int) -> None:
    ranks = np.asarray(layer.expert_to_rank)
    if ranks.ndim != 1 or ranks.dtype.kind != "i" or not ranks.size or ranks.min() < 0 or ranks.max() >= num_ranks:
        raise ValueError(
            f"expert_to_rank of {layer.name} must be ranks in [0, R={num_ranks}) [E], got {ranks.tolist()}"
        )
    held = set(enumerate(ranks.tolist()))
    for expert, rank in layer.replicas:
        if not (0 <= expert < len(ranks) and 0 <= rank < num_ranks) or (expert, rank) in held:
            raise ValueError(
                f"replicas of {layer.name} must be other (expert, rank) in [0, E={len(ranks)}) x [0, R={num_ranks}), "
                f"got ({expert}, {rank})"
            )
        held.add((expert, rank))


def _layer(value: dict) -> PlacedLayer:
    if not isinstance(value["name"], str):
        raise TypeError(f"a name {value['name']}")
    ranks = np.array([_integer(rank) for rank in value["expert_to_rank"]], dtype=np.int64)
    pairs = tuple((_integer(expert), _integer(rank)) for expert, rank in value["replicas"])
    return PlacedLayer(value["name"], ranks, pairs)


def _integer(value) -> int:
    if type(value) is not int or abs(value) >= 2**31:
        raise TypeError(f"{value!r} where an integer is expected")
    return value
