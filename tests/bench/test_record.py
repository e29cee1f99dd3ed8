import json

import pytest

import record


def test_rows_of_equal_facts_go_on(tmp_path):
    path = tmp_path / "results" / "rows.json"
    assert record.done_before(path, {"threads": 2}) == []
    record.save(path, {"machine": {"threads": 2}, "rows": [{"p50": 1.0}]})
    assert record.done_before(path, {"threads": 2}) == [{"p50": 1.0}]
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_rows_of_other_facts_are_neither_taken_nor_lost(tmp_path):
    path = tmp_path / "rows.json"
    record.save(path, {"machine": {"threads": 2, "turns": 7, "isa": "amx"}, "rows": [{"p50": 1.0}]})
    with pytest.raises(
        SystemExit, match="must hold rows of this run, got rows of another isa, priority, turns: give --out"
    ):
        record.done_before(path, {"threads": 2, "turns": 5, "priority": "other, nice 0"})
    assert json.loads(path.read_text())["rows"] == [{"p50": 1.0}]


def test_only_a_full_run_writes_where_results_are_committed():
    full = record.path_of(True, ".layers.json", "full")
    shorter = [record.path_of(False, ".layers.json", mode) for mode in ("usual", "quick")]
    assert full.parent.name == "results" and full.name.endswith(".layers.json")
    assert {path.parent for path in shorter} == {record.ROOT / "build" / "bench"}
    assert len({full, *shorter}) == 3


def test_facts_of_the_machine(monkeypatch):
    facts = record.bench_facts(threads=2, turns=7)
    assert {"processor", "isa", "caches", "memory_gib", "huge_pages", "priority", "commit"} <= facts.keys()
    assert facts["turns"] == 7 and facts == json.loads(json.dumps(record.bench_facts(threads=2, turns=7)))
    monkeypatch.setattr(record.os, "getpriority", lambda *_: -20)
    monkeypatch.setattr(record.os, "sched_getscheduler", lambda pid: 1)
    assert record.bench_facts()["priority"] == "fifo, nice -20"


def test_commit():
    with pytest.raises(SystemExit, match="base must be a commit, got no-such-commit"):
        record.commit("no-such-commit")
