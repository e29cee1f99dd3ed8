import json

import numpy as np
import pytest

from analysis.traces import layer, random_trace
from moert.analysis import RoutingTrace
from moert.placement import ExpertPlacement, PlacedLayer, Topology, contiguous, round_robin

PLACEMENT = ExpertPlacement(
    3, (PlacedLayer("a", np.array([0, 2, 1, 0]), ((0, 1), (3, 2))), PlacedLayer("b", np.array([1, 0])))
)


def same(a, b):
    return a.num_ranks == b.num_ranks and all(
        m.name == n.name and m.replicas == n.replicas and np.array_equal(m.expert_to_rank, n.expert_to_rank)
        for m, n in zip(a.layers, b.layers, strict=True)
    )


def test_files_come_back(tmp_path):
    path = tmp_path / "p.json"
    PLACEMENT.save(path)
    assert same(ExpertPlacement.load(path), PLACEMENT) and list(tmp_path.iterdir()) == [path]


def test_usual_placements():
    trace = RoutingTrace((layer([[0]], 5), layer([[0]], 2, name="b")))
    assert [each.expert_to_rank.tolist() for each in contiguous(trace, 2).layers] == [[0, 0, 0, 1, 1], [0, 1]]
    assert [each.expert_to_rank.tolist() for each in round_robin(trace, 2).layers] == [[0, 1, 0, 1, 0], [0, 1]]
    assert list(round_robin(trace, 2).by_module()) == ["a", "b"]


def test_replicas_are_not_lost():
    by_module = PLACEMENT.by_module()
    assert by_module["a"] is PLACEMENT.layers[0] and by_module["a"].replicas


def test_tokens_go_to_the_nearest_holder_in_turn():
    placed = PlacedLayer("a", np.array([3, 0]), ((0, 0), (0, 2)))
    ids = np.array([[0, 1]] * 4 + [[0, -1]] * 4)
    homes = np.array([0, 1, 1, 3, 2, 3, 0, 1])
    ranks = placed.ranks(ids, homes, Topology(4, 2))
    # At home where there is a copy (ranks 0, 2, 3); rank 1 asks rank 0 of its node.
    assert ranks.tolist() == [[0, 0], [0, 0], [0, 0], [3, 0], [2, -1], [3, -1], [0, -1], [0, -1]]
    # Without one in its node: rank 1 of (0, 1) when only 2 and 3 hold the expert, in turn.
    far = PlacedLayer("a", np.array([2]), ((0, 3),)).ranks(np.zeros((4, 1), int), np.ones(4, int), Topology(4, 2))
    assert far[:, 0].tolist() == [2, 3, 2, 3]


def test_without_replicas_the_map_is_all():
    (recorded,) = random_trace(layers=1).layers
    place = np.arange(8) % 3
    ranks = PlacedLayer("a", place).ranks(recorded.ids, np.zeros(60, int), Topology(3))
    for t, ids in enumerate(recorded.ids):
        assert ranks[t].tolist() == [place[e] if e >= 0 else -1 for e in ids]


GOOD = {"moert_placement": 1, "num_ranks": 2, "layers": [{"name": "a", "expert_to_rank": [0, 1], "replicas": []}]}


def changed(**change):
    return {**GOOD, "layers": [{**GOOD["layers"][0], **change}]}


@pytest.mark.parametrize(
    "value,message",
    [
        ({**GOOD, "moert_placement": 2}, "got version 2, where 1 is known"),
        ({}, "got nothing for 'moert_placement'"),
        ([], "list indices"),
        ({**GOOD, "num_ranks": 0}, "num_ranks must be at least 1, got 0"),
        ({**GOOD, "num_ranks": True}, "got True where an integer is expected"),
        ({**GOOD, "num_ranks": 2**40}, "where an integer is expected"),
        ({**GOOD, "layers": GOOD["layers"] * 2}, "layers must have names of their own, got"),
        (changed(expert_to_rank=[0, 2]), r"expert_to_rank of a must be ranks in \[0, R=2\) \[E\], got \[0, 2\]"),
        (changed(expert_to_rank=[0, -1]), "must be ranks in"),
        (changed(expert_to_rank=[]), "must be ranks in"),
        (changed(expert_to_rank=[0.0, 1]), "got 0.0 where an integer is expected"),
        (changed(expert_to_rank=[[0], 1]), "where an integer is expected"),
        (changed(name=3), "got a name 3"),
        (changed(replicas=[[0, 0]]), r"replicas of a must be other \(expert, rank\) in .*, got \(0, 0\)"),
        (changed(replicas=[[2, 0]]), r"got \(2, 0\)"),
        (changed(replicas=[[0, 1], [0, 1]]), r"got \(0, 1\)"),
        (changed(replicas=[[0]]), "not enough values"),
        (changed(replicas=3), "not iterable"),
    ],
)
def test_broken_files_say_so(value, message, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(value))
    with pytest.raises(
        ValueError, match=f"{path} must be a placement of experts, got .*{message.removeprefix('got ')}"
    ):
        ExpertPlacement.load(path)


def test_broken_bytes(tmp_path):
    path = tmp_path / "p.json"
    text = json.dumps(GOOD)
    for data in (*(text[:i].encode() for i in range(len(text))), b"[" * 100000, b"\xff\xfe", b"1" * 5000, b"NaN"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="must be a placement of experts"):
            ExpertPlacement.load(path)
    with open(path, "wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match="must be a placement of at most 268435456 bytes, got 268435457"):
        ExpertPlacement.load(path)
    with pytest.raises(OSError):
        ExpertPlacement.load(tmp_path / "none")
