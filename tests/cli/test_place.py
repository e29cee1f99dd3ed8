import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from analysis.traces import layer, random_trace
from moert.analysis import RoutingTrace
from moert.cli.app import app
from moert.placement import ExpertPlacement, Topology, moetuner_placement


def moert(*arguments):
    return CliRunner().invoke(app, ["place", *map(str, arguments)], env={"COLUMNS": "80"})


def test_command(tmp_path):
    trace, path, out = random_trace(T=400, calls=(200, 200)), tmp_path / "t.npz", tmp_path / "new" / "p.json"
    trace.save(path)
    done = moert(path, "--ranks", 4, "--nodes", 2, "--out", out)
    assert done.exit_code == 0, done.output
    expected = moetuner_placement(trace.halves()[0], Topology(4, 2)).placement
    written = ExpertPlacement.load(out)
    for mine, theirs in zip(written.layers, expected.layers, strict=True):
        assert mine.name == theirs.name and np.array_equal(mine.expert_to_rank, theirs.expert_to_rank)
    for part in (
        "contiguous",
        "round-robin",
        "moert",
        "→",
        "Gap to an optimum: clusters could be",
        str(out),
    ):
        assert part in done.stdout
    assert "assignment" in done.stderr and "4/4" in done.stderr  # the bar: three layers and their ranks
    table = [line for line in done.stdout.splitlines() if "│" in line]
    assert len(table) == 6 and all("…" not in line for line in table)  # two lines a placement, nothing cut
    assert sorted(each.name for each in out.parent.iterdir()) == ["p.json", "p.png"]
    assert out.with_suffix(".png").stat().st_size > 1000


def test_traces_of_several_ranks(tmp_path):
    parts = random_trace(T=200, calls=(200,)), random_trace(T=200, calls=(200,), seed=1)
    for i, part in enumerate(parts):
        part.save(tmp_path / f"{i}.npz")
    done = moert(tmp_path / "0.npz", tmp_path / "1.npz", "--ranks", 2, "--out", tmp_path / "p.json")
    assert done.exit_code == 0, done.output
    expected = moetuner_placement(RoutingTrace.of_ranks(parts).halves()[0], Topology(2)).placement
    written = ExpertPlacement.load(tmp_path / "p.json")
    for mine, theirs in zip(written.layers, expected.layers, strict=True):
        assert np.array_equal(mine.expert_to_rank, theirs.expert_to_rank)


def test_overfitting_is_said(tmp_path):
    """Even rows balance the contiguous placement of odd rows' mirror image."""
    ids = np.zeros((400, 1), dtype=int)
    ids[::2, 0] = np.arange(200) % 2  # experts 0 and 1 alone: one goes to each rank
    ids[1::2, 0] = np.tile([0, 2], 100)
    RoutingTrace((layer(ids, 4),)).save(tmp_path / "t.npz")
    done = moert(tmp_path / "t.npz", "--ranks", 2, "--out", tmp_path / "p.json")
    assert done.exit_code == 0
    place = ExpertPlacement.load(tmp_path / "p.json").layers[0].expert_to_rank
    assert ("the loads are less even" in done.stdout) == (place[0] == place[2])


@pytest.mark.parametrize(
    "options,message",
    [
        (("--ranks", 9), "ranks must be at most E=8, the experts of layers.0, got 9"),
        (("--ranks", 4, "--nodes", 3), "nodes must divide ranks=4, got 3"),
        (("--ranks", 4, "--slots", "x"), "slots must be one of equal, any, got x"),
        (("--ranks", 4, "--method", "x"), "method must be one of auto, viterbi, milp, local, got x"),
    ],
)
def test_bad_options_are_one_line(options, message, tmp_path):
    random_trace().save(tmp_path / "t.npz")
    done = moert(tmp_path / "t.npz", *options, "--out", tmp_path / "p.json")
    assert done.exit_code == 2 and done.stderr.splitlines()[-1] == f"moert place: {message}"
    assert not (tmp_path / "p.json").exists()


def test_the_picture_is_not_the_placement(tmp_path):
    done = moert(tmp_path / "t.npz", "--ranks", 2, "--out", tmp_path / "p.png")
    assert done.exit_code == 2 and "out must be the placement, whose picture is beside it as .png" in done.output


def test_bad_files_are_one_line(tmp_path):
    done = moert(tmp_path / "none.npz", "--ranks", 2)
    assert done.exit_code == 2 and done.stderr.startswith("moert place: TRACE must be a readable file, got")
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04")
    done = moert(tmp_path / "t.npz", "--ranks", 2)
    assert done.exit_code == 2 and "must be an npz file of plain arrays, got" in done.stderr
    random_trace().save(tmp_path / "t.npz")
    (tmp_path / "file").touch()
    done = moert(tmp_path / "t.npz", "--ranks", 2, "--out", tmp_path / "file" / "p.json")
    assert done.exit_code == 2 and "must be writable" in done.stderr.splitlines()[-1]


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    random_trace().save(tmp_path / "t.npz")
    monkeypatch.setitem(sys.modules, "highspy", None)
    done = moert(tmp_path / "t.npz", "--ranks", 2, "--out", tmp_path / "p.json")
    assert done.exit_code == 2 and "placement needs highspy, got none: pip install 'moert[place]'" in done.stderr
