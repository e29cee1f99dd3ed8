"""A placement of a model's experts as every rank of a group is given it: read, fitted to the model, alike on all."""

from collections.abc import Callable, Mapping
from os import PathLike, fspath

import torch.distributed as dist

from moert.ops.ranks import Ranks, named
from moert.parallel.copies import Copies

Names = tuple[str, ...]  # of one module: the first is its own


def placed(
    given,
    sizes: Callable[[], Mapping[Names, int]],
    ranks: Ranks,
    prepare: Callable[[dict[str, object]], dict[str, int]] | None = None,
) -> dict[str, object]:
    """Name of each experts module -> expert_to_rank or a PlacedLayer; without those that given leaves out.

    given: such a mapping, by any of a module's names, an ExpertPlacement, the path of its file, or None.  sizes() says
    how many experts each module has, prepare(what is returned) more that must be the same on every rank.  Every rank of
    the group must call it: where one fails, also in those two, or has another placement, all raise an error.
    """
    own, said, failed = {}, "", None
    try:
        experts = sizes()
        own = _by_first_name(_read(given, ranks.size), list(experts))
        said = {names[0]: _checksum(own.get(names[0]), E, ranks.size) for names, E in experts.items()}
        said |= prepare(own) if prepare else {}
    except Exception as error:  # of any kind: the others must not wait for this rank
        failed, said = error, str(error)
    heard = [said] * ranks.size
    if ranks.size > 1:
        with ranks.guarded():
            dist.all_gather_object(heard, said, ranks.group)
    if failed is not None:
        raise failed
    _raise_difference(heard, ranks.group)
    return own


def _read(given, num_ranks: int) -> Mapping[str, object]:
    if given is None or isinstance(given, Mapping):
        return given or {}
    from moert.placement.expert_placement import ExpertPlacement  # NumPy, traces: not for those who need no placement

    where = f" in {fspath(given)}" if isinstance(given, (str, PathLike)) else ""
    placement = ExpertPlacement.load(given) if where else given
    if not isinstance(placement, ExpertPlacement):
        raise TypeError(f"placement must be a mapping, an ExpertPlacement or a path, got {type(given).__name__}")
    if placement.num_ranks != num_ranks:
        raise ValueError(f"placement must be one of R={num_ranks} ranks, got {placement.num_ranks}{where}")
    return placement.by_module()


def _by_first_name(placement: Mapping[str, object], names: list[Names]) -> dict[str, object]:
    known = [name for each in names for name in each]
    unknown = sorted(set(placement) - set(known))
    if unknown:
        raise ValueError(f"placement must name experts of the model ({', '.join(known)}), got {unknown[0]}")
    first = {}
    for each in names:
        given = [name for name in each if name in placement]
        if len(given) > 1:
            raise ValueError(f"placement must name a module once, got {', '.join(given)} for the same")
        if given:
            first[each[0]] = placement[given[0]]
    return first


def _checksum(placement, num_experts: int, num_ranks: int) -> int:
    return Copies.placed(placement, num_experts, num_ranks, 0, None).map.checksum


def _raise_difference(heard: list[str | dict[str, int]], group: dist.ProcessGroup | None) -> None:
    """What every rank said: its checksums, or the text of its error."""
    for rank, said in enumerate(heard):
        if isinstance(said, str):
            raise RuntimeError(f"placement must fit on every rank, got an error on {named([rank], group)}: {said}")
    holders: dict[str, list[int]] = {}
    for rank, said in enumerate(heard):
        holders.setdefault(repr(said), []).append(rank)
    if len(holders) > 1:
        most, *_, least = sorted(holders.values(), key=len, reverse=True)
        here, there = heard[most[0]], heard[least[0]]
        different = sorted(name for name in here | there if here.get(name) != there.get(name))
        raise RuntimeError(
            f"placement must be the same on every rank, got one on {named(most, group)} and another on "
            f"{named(least, group)} for {', '.join(different[:3])}"
        )
