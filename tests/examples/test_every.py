import json
import subprocess
import sys

import pytest

from experiment import every, page
from experiment.run import ROOT


def test_goes_on_where_one_fails_and_times_each(tmp_path):
    for name, text in (("one", "import sys; open(sys.argv[1], 'a').write('1')"), ("two", "raise SystemExit(3)")):
        (tmp_path / f"{name}.py").write_text(text)
    files = [tmp_path / f"{name}.py" for name in ("one", "two", "one")]
    found = every.run(files, [str(tmp_path / "ran")])
    assert [(name, status) for name, _, status in found] == [("one", 0), ("two", 3), ("one", 0)]
    assert (tmp_path / "ran").read_text() == "11" and all(0 < seconds < 600 for _, seconds, _ in found)
    rows = [list(column.cells) for column in every.table(found).columns]
    assert rows[0] == ["one", "two", "one"] and rows[2] == ["through", "failed, exit status 3", "through"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Experiments of one line, and a page that only says that it was written."""
    systems, build = tmp_path / "systems", tmp_path / "build"
    systems.mkdir()
    build.mkdir()
    (systems / "a_b.py").write_text("")
    (systems / "c.py").write_text("raise ArithmeticError")
    written = []
    monkeypatch.setattr(every, "SYSTEMS", systems)
    monkeypatch.setattr(every, "BUILD", build)
    monkeypatch.setattr(page, "main", lambda but: written.append(but))
    return build, written


def test_the_page_is_written_in_any_case_and_the_status_tells(elsewhere, capfd):
    build, written = elsewhere
    for name in ("a-b", "c", "d"):
        (build / f"{name}.json").write_text("{}")
    assert every.main([]) == 1 and written == [["c"]]
    assert [path.name for path in build.iterdir()] == ["d.json"]  # no earlier run stands for one that failed
    assert every.main(["a_b"]) == 0 and written == [["c"], []]
    output = capfd.readouterr()
    assert "failed, exit status 1" in output.out and "ArithmeticError" in output.err


def test_errors(elsewhere, capfd):
    with pytest.raises(SystemExit):
        every.main(["a_b", "e"])
    assert "system must be one of a_b, c, got e" in capfd.readouterr().err


def test_the_page_takes_over_runs_and_words_but_not_what_was_equal(tmp_path, monkeypatch):
    """Of results as they are here: one was run again, one is said with another note, one does not load."""
    results, build, written = tmp_path / "results", tmp_path / "build", tmp_path / "systems.md"
    results.mkdir()
    build.mkdir()
    for path in page.RESULTS.glob("*.json"):
        old = json.loads(path.read_text()) | {"notes": "an old note.", "equal": "what it was", "commit": "0000000"}
        (results / path.name).write_text(json.dumps(old))
    again = json.loads((page.RESULTS / "moma.json").read_text()) | {"commit": "1111111", "equal": "of the new run"}
    (build / "moma.json").write_text(json.dumps(again))
    for name, value in (("RESULTS", results), ("BUILD", build), ("PAGE", written)):
        monkeypatch.setattr(page, name, value)
    page.main(but=["scmoe"])
    found = {path.stem: json.loads(path.read_text()) for path in results.iterdir()}
    known = page.experiments()
    assert found["moma"]["commit"] == "1111111" and found["moma"]["equal"] == "of the new run"
    assert found["mor"]["notes"] == known["mor"].notes and found["mor"]["equal"] == "what it was"
    assert found["scmoe"]["notes"] == "an old note." and "**SCMoE**: an old note." in written.read_text()
    assert "commit 1111111" in written.read_text() and "; what it was |" in written.read_text()


def test_runs_as_a_command():
    command = [sys.executable, str(ROOT / "examples" / "systems" / "experiment" / "every.py"), "--help"]
    assert "promoe" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
