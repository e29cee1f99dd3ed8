import json
import subprocess
import sys
from argparse import Namespace

import pytest

import record
import run


def options(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["run.py", *arguments])
    return run.parse()


def test_sizes(monkeypatch):
    usual, quick, full = (options(monkeypatch, *size) for size in ([], ["--quick"], ["--full"]))
    assert usual.dtype == full.dtype == ["float32", "bfloat16"] and quick.dtype == ["bfloat16"]
    assert quick.seconds < usual.seconds < full.seconds
    assert len(run.cases(quick)) < len(run.cases(usual)) < len(run.cases(full))
    assert options(monkeypatch, "--quick", "--seconds", "2", "--dtype", "float32").seconds == 2


def test_the_usual_subset_has_every_operator_and_regime(monkeypatch):
    usual, full = options(monkeypatch), options(monkeypatch, "--full")
    cases = run.cases(usual)
    assert {(op, variant) for op, _, _, variant, _ in cases} == {
        (op, variant) for op, _, _, variant, _ in run.cases(full)
    }
    assert {shape for _, dtype, shape, _, _ in cases if dtype == "bfloat16"} == set(run.BENCH_SHAPES)
    assert {shape.T >= 1024 for _, _, shape, _, modes in cases if "forward_backward" in modes} == {True}
    fused = [case for case in cases if case[0] == "fused_experts"]
    assert len([case for case in fused if case[1] == "float32"]) == 2


def test_a_choice_has_everything_of_it(monkeypatch):
    asked, full = (options(monkeypatch, *more, "--op", "permute") for more in ([], ["--full"]))
    assert run.cases(asked) == run.cases(full) and not asked.subset
    smoke = options(monkeypatch, "--smoke")
    assert {tuple(modes) for *_, modes in run.cases(smoke)} == {("forward",), run.MODES}


def test_a_full_run_goes_on_where_it_was_cut_off(monkeypatch, tmp_path):
    timed, out = [], tmp_path / "rows.json"
    arguments = ["run.py", "--full", "--op", "gating", "--shapes", "1", "--out", str(out)]

    def bench(op, dtype, shape, variant, modes, *_):
        if len(timed) == 2:
            raise KeyboardInterrupt
        timed.append((variant, dtype))
        key = {"op": run.name_of(op, variant), "dtype": dtype, "shape": str(shape), "caches": "cold"}
        return [{**key, "mode": mode, "times": [1.0], "ideals": [1.0]} for mode in modes]

    monkeypatch.setattr(run, "bench", bench)
    monkeypatch.setattr(run, "Limits", lambda dtypes: Namespace(rates=lambda: {"read": 1.0, "copy": 1.0}))
    monkeypatch.setattr(run, "openmp_runtimes", lambda: ["one"])
    monkeypatch.setattr(run, "run_tests", lambda ops, quick: None)
    monkeypatch.setattr(run, "commit", lambda revision: f"commit of {revision}")
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(KeyboardInterrupt):
        run.main()
    before, timed[:] = list(timed), []
    with pytest.raises(KeyboardInterrupt):
        run.main()
    assert not set(before) & set(timed) and len(before) == len(timed) == 2
    value = json.loads(out.read_text())
    assert len(value["rows"]) == 8 and "times" not in value["rows"][0]
    assert value["machine"]["commit"] == "commit of HEAD"
    monkeypatch.setattr(run, "run_tests", lambda ops, quick: pytest.fail("must stop before anything runs"))
    monkeypatch.setattr("sys.argv", [*arguments, "--seconds", "2"])
    with pytest.raises(SystemExit, match="got rows of another seconds"):
        run.main()


def test_a_row_has_spread_and_share():
    made = run.row({"op": "gating"}, [4.0, 1.0, 2.0, 3.0, 5.0], [1.0] * 5)
    assert (made["p20"], made["p50"], made["p80"]) == (2.0, 3.0, 5.0)
    assert made["roofline_share"] == pytest.approx(1 / 3)


def test_a_provider_that_disagrees_is_no_baseline():
    import torch

    case = Namespace(inputs=(torch.ones(2, 3),), providers={"torch": lambda x: x, "moert": lambda x: 2 * x})
    with pytest.raises(SystemExit, match="moert must agree with torch"):
        run.check("gating", "T2", case)


def test_this_tree_and_another_take_turns(monkeypatch, tmp_path):
    asked = options(monkeypatch, "--smoke", "--base", "HEAD", "--op", "expert_choice", "--mode", "forward")
    monkeypatch.setattr(run, "build", lambda revision, folder: tmp_path)  # of nothing: this tree once more
    monkeypatch.setattr(run, "commit", lambda revision: f"commit of {revision}")
    rows = run.beside_base(asked)
    assert {row["provider"]: row["commit"] for row in rows}.keys() == {"moert", "base"}
    assert [row["commit"] for row in rows if row["provider"] == "base"] == ["commit of HEAD"] * (len(rows) // 2)
    assert all(row["samples"] == 1 and row["p50"] > 0 and "times" not in row for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(record.commit("HEAD") is None, reason="needs a repository")
def test_beside_another_commit(tmp_path):
    out, worktrees = tmp_path / "rows.json", ["git", "worktree", "list"]
    before, head = subprocess.check_output(worktrees, cwd=record.ROOT), record.commit("HEAD")
    command = [sys.executable, str(record.ROOT / "bench" / "run.py"), "--base", "HEAD", "--smoke", "--op", "gating"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    value = json.loads(out.read_text())
    assert {row["provider"] for row in value["rows"]} == {"moert", "base"}
    # Of this tree's rows it is whatever is checked out by then: the build takes minutes.
    assert {row["commit"] for row in value["rows"] if row["provider"] == "base"} == {head}
    assert subprocess.check_output(worktrees, cwd=record.ROOT) == before
