"""A placement's file on every rank: it is taken where it fits, and ends all ranks at once where it does not on one."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from moert import GluExperts, MoELayer, TopKRouter
from moert.parallel import shard_experts_
from moert.placement import ExpertPlacement, PlacedLayer
from ranks import error_of, ranks

E, H = 5, 8
RIGHT = {"0.experts": [1, 0, 2, 0, 1], "1.experts": [2, 2, 0, 1, 0]}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(MoELayer(TopKRouter(H, E, 2), GluExperts(E, H, 8)) for _ in range(2)))


def write(path: Path, layers: dict[str, list[int]], num_ranks: int = 3, replicas=()) -> str:
    made = [PlacedLayer(name, np.array(where, dtype=np.int64), replicas) for name, where in layers.items()]
    ExpertPlacement(num_ranks, tuple(made)).save(path)
    return str(path)


def fits(path: str) -> None:
    """The path, what is read from it, and its mapping are the same; results are those of all experts here."""
    x = torch.randn(7, H, generator=torch.Generator().manual_seed(dist.get_rank()))
    for placement in (path, Path(path), ExpertPlacement.load(path), ExpertPlacement.load(path).by_module()):
        spread = shard_experts_(model(), placement=placement)
        for name, where in RIGHT.items():
            here = [expert for expert, rank in enumerate(where) if rank == dist.get_rank()]
            assert spread.get_submodule(name).expert_ids == here
        torch.testing.assert_close(spread(x), model()(x))


def test_a_file_that_fits(tmp_path):
    assert ranks(3, fits, write(tmp_path / "placement.json", RIGHT)) == [None] * 3


def wrong_on_one(paths: list[list[str | None]]) -> list[tuple[str, float]]:
    """The error where each rank is given its file, and the seconds until then; the group is usable afterwards."""
    told = []
    for of_ranks in paths:
        begun = time.monotonic()
        error = error_of(lambda: shard_experts_(model(), placement=of_ranks[dist.get_rank()]))
        told.append((error, time.monotonic() - begun))
        dist.barrier()
    return told


def test_a_file_that_does_not_fit_on_one_rank(tmp_path):
    right, odd = write(tmp_path / "right.json", RIGHT), 1
    (tmp_path / "broken.json").write_text(Path(right).read_text()[:40])
    another = write(tmp_path / "another.json", RIGHT | {"1.experts": [2, 1, 0, 2, 0]})
    names = "0.experts, 1.experts"
    wrong = {
        write(tmp_path / "experts.json", {"0.experts": [0, 1, 2, 0]}): "placement must have shape [E=5], got [4]",
        write(tmp_path / "rank.json", {"0.experts": [0, 1, 3, 2, 0]}, 4): (
            f"placement must be one of R=3 ranks, got 4 in {tmp_path / 'rank.json'}"
        ),
        write(tmp_path / "none.json", {"0.experts": [0, 0, 2, 0, 0]}): (
            "placement must give every rank an expert, got none for rank 1"
        ),
        write(tmp_path / "layers.json", RIGHT | {"2.experts": [0, 1, 2, 0, 1]}): (
            f"placement must name experts of the model ({names}), got 2.experts"
        ),
        write(tmp_path / "copies.json", {"0.experts": [0, 1, 2, 0]}, replicas=((0, 1),)): (
            "placement must have shape [E=5], got [4]"
        ),
        str(tmp_path / "broken.json"): f"{tmp_path / 'broken.json'} must be a placement of experts, got ",
    }
    given = [[path if rank == odd else right for rank in range(3)] for path in [*wrong, another, None]]
    told = ranks(3, wrong_on_one, given)
    for number, text in enumerate(wrong.values()):
        for rank in range(3):
            error, seconds = told[rank][number]
            others = "" if rank == odd else "placement must fit on every rank, got an error on rank 1: "
            assert error.startswith(others + text) and seconds < 10, (rank, error, seconds)
    for number, layers in enumerate(("1.experts", names), len(wrong)):
        differs = "placement must be the same on every rank, got one on ranks 0, 2 and another on rank 1 for "
        assert [told[rank][number][0] for rank in range(3)] == [differs + layers] * 3


def odd_mappings() -> None:
    """By hand what a file cannot have; an absent file."""
    alone, odd = dist.get_rank() == 1, {"0.experts": [0, 1, 3, 2, 0]}
    with pytest.raises((ValueError, RuntimeError), match=r"placement must hold ranks in \[0, R=3\), got 3$"):
        shard_experts_(model(), placement=odd if alone else RIGHT)
    with pytest.raises((FileNotFoundError, RuntimeError), match="No such file or directory: '/absent.json'$"):
        shard_experts_(model(), placement="/absent.json" if alone else None)
    with pytest.raises((TypeError, RuntimeError), match="must be a mapping, an ExpertPlacement or a path, got int$"):
        shard_experts_(model(), placement=3 if alone else None)


def test_errors():
    assert ranks(3, odd_mappings) == [None] * 3
