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


def test_a_full_run_finds_its_own_commit_alone():
    full, other = (record.path_of("full", ".layers.json", {"commit": commit}) for commit in ("1234567", "89abcde"))
    shorter = [record.path_of(mode, ".layers.json", {"commit": "1234567"}) for mode in ("usual", "quick")]
    assert full.name == "full-1234567.layers.json" and len({full, other, *shorter}) == 4
    assert {path.parent for path in (full, *shorter)} == {record.ROOT / "build" / "bench"}


def test_facts_of_the_machine(monkeypatch):
    monkeypatch.setattr(record, "commit", lambda revision: f"commit of {revision}")
    facts = record.bench_facts(threads=2, turns=7)
    assert {"processor", "isa", "caches", "memory_gib", "huge_pages", "priority", "commit"} <= facts.keys()
    assert facts["turns"] == 7 and facts == json.loads(json.dumps(record.bench_facts(threads=2, turns=7)))
    monkeypatch.setattr(record.os, "getpriority", lambda *_: -20)
    monkeypatch.setattr(record.os, "sched_getscheduler", lambda pid: 1)
    assert record.bench_facts()["priority"] == "fifo, nice -20"


def test_commit():
    with pytest.raises(SystemExit, match="base must be a commit, got no-such-commit"):
        record.commit("no-such-commit")
