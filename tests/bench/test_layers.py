import json
import sys
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

import layers
from layers_plots import plot_peers, plot_roofline
from layers_rows import Row, cell, say_limits, show, title
from peers.problem import LIMITS, PRODUCT_FLOP, READ_BYTES, Problem

TINY = Problem("tiny", 64, 32, 8, 2, 5, "float32")


def row(problem=TINY, **more):
    """Reads 1 GB and multiplies 1 GFLOP a second; a byte and an operation cost as much."""
    limits = {"read": [READ_BYTES / 1e9] * 3, "product": [PRODUCT_FLOP / 1e9] * 3}
    times = {"moert": [2.0, 4.0, 1.0], "moert prepacked": [1.0, 1.0, 1.0], "torch loop": [4.0, 4.0, 4.0], "slow": [9.0]}
    return Row(asdict(problem), bytes=1e9, flop=5e8, times=limits | times, **more)


def test_a_share_is_the_median_of_limit_over_time():
    assert row().share("moert") == pytest.approx(0.5)
    assert row().share("slow") == pytest.approx(1 / 9)  # of the turns that it has
    more = row()
    more.flop = 4e9
    assert more.share("torch loop") == pytest.approx(1)


def test_a_ratio_is_of_the_same_turns():
    assert row().ratio("torch loop") == pytest.approx(2)
    assert row().ratio("slow") == pytest.approx(4.5)
    assert row().best_peer() == "torch loop"
    assert replace(row(), times={"moert": [1.0]}).best_peer() is None


@pytest.mark.parametrize(
    "dtype, product", [("float32", "FMA peak"), ("bfloat16", "bfloat16 product"), ("int4:32", "int8 peak")]
)
def test_rows_are_held_to_the_product_of_their_type(dtype, product):
    held = row(replace(TINY, dtype=dtype))
    assert held.products() == ["product"]  # of a run without the other
    held.times |= {name: [PRODUCT_FLOP / 1e8] * 3 for name in LIMITS[1:]}
    held.times[product] = [PRODUCT_FLOP / 1e10] * 3
    held.flop = 2e10
    assert held.ideal() == pytest.approx([2.0] * 3)


def test_the_fastest_product_over_packed_weights_counts():
    held = row(replace(TINY, dtype="int8"))
    held.times |= {"int8 product": [PRODUCT_FLOP / 1e9] * 3, "bfloat16 product": [PRODUCT_FLOP / 2e9] * 3}
    held.flop = 2e10
    assert held.ideal() == pytest.approx([10.0] * 3)


def test_the_table_has_share_and_spread():
    assert cell(row(), "moert") == "2000.00 (1000.00-4000.00; 50%)"
    console = Console(width=170, record=True)
    show([row(missing={"vLLM vec": "too large"}, memory={"moert": 2**20})], {"kt": "no environment"}, console)
    said = console.export_text()
    for words in ("torch loop", "2.00x", "vLLM vec: not measured everywhere, too large", "kt: ", "moert 1 MiB"):
        assert words in said


def test_limits_are_said():
    console = Console(width=170, record=True)
    rates = {"FMA peak": 2e11, "int8 peak": 9e11, "product": 1e11, "int8 product": 8e11}
    say_limits({"read": READ_BYTES / 2e10} | {name: PRODUCT_FLOP / rate for name, rate in rates.items()}, console)
    said = console.export_text()
    assert "read 20.0 GB/s; FMA peak 200 GFLOP/s; int8 peak 900 GOP/s; torch's float32 product 100 GFLOP/s" in said
    assert "torch's int8 product 800 GOP/s" in said and "bfloat16" not in said


def test_plots(tmp_path):
    rows = [row(), row(replace(TINY, dtype="bfloat16", training=True))]
    rows[1].times["bfloat16 product"] = rows[1].times["product"]
    for plot in (plot_roofline, plot_peers):
        path = plot(rows, title, tmp_path / "pictures")
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


class Fake:
    """A family whose calls fail, or that dies of them, as it is told."""

    def __init__(self, name="moert", failing=(), deadly=()):
        self.name, self.failing, self.deadly = name, failing, deadly
        self.providers = ["moert"] if name == "moert" else [f"{name} a", f"{name} b"]

    def ask(self, **request):
        if "limits" in request:
            return {"limits": {"read": 1.0, "product": 1.0}}
        if request["time"] in self.deadly:
            raise RuntimeError("the process must answer, got exit -9")
        return {"error": "MemoryError: too large"} if request["time"] in self.failing else {"times": [1.0]}

    def close(self):
        pass


def test_a_call_that_fails_costs_itself_and_a_process_that_dies_all_of_its_calls():
    families = [Fake(), Fake("fails", failing=["fails a"]), Fake("dies", deadly=["dies b"])]
    calls = [(family, name) for family in families for name in family.providers]
    held = Row(asdict(TINY), times={"dies a": [1.0]})
    answered = [name for name, _ in layers.asked(calls, held, lambda name: {"time": name})]
    assert answered == ["moert", "fails b", "dies a"]
    assert [name for _, name in calls] == ["moert", "fails b"]
    assert held.missing == {
        "fails a": "MemoryError: too large",
        "dies a": "the process must answer, got exit -9",
        "dies b": "the process must answer, got exit -9",
    }
    assert held.times == {}


def test_another_commit_takes_turns_under_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(layers, "build", lambda revision, folder: tmp_path)  # of nothing: this tree once more
    monkeypatch.setattr(layers, "commit", lambda revision: f"commit of {revision}")
    monkeypatch.setattr("sys.argv", ["layers.py", "--smoke", "--base", "HEAD", "--threads", "1"])
    options = layers.parse()
    with ExitStack() as stack:
        families = layers.started({"moert": Path(sys.executable)}, options, stack)
        assert families[1].environment["PYTHONPATH"] == str(tmp_path) and families[1].command == families[0].command
        measured = layers.measure(TINY, families, options)
        bad = families[1].load(asdict(replace(TINY, dtype="int4:32", training=True)))
    names = ["moert", "moert at commit of HEAD"]
    assert [name for name in measured.providers() if "prepacked" not in name] == names
    assert set(names) <= set(measured.errors) and measured.best_peer() is None
    assert bad["providers"] == [] and list(bad["missing"]) == names[1:]
    console = Console(width=200, record=True)
    show([measured, row()], {}, console)
    assert names[1] in console.export_text()


def test_a_process_that_dies_before_it_is_asked_does_not_answer():
    family = layers.Family("ended", Path("/bin/true"), 1, False)
    family.process.wait()
    family.process.poll = lambda: None  # as it was when it was asked
    with pytest.raises(RuntimeError, match="the ended process must answer, got exit 0: no output"):
        family.ask(time="ended")
    family.close()


def run(monkeypatch, out, *arguments, families=("moert",)):
    """layers.main without processes; the problems that it measured."""
    measured = []

    def measure(problem, families, options):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(problem)
        return row(problem)

    monkeypatch.setattr(layers, "found", lambda: (dict.fromkeys(families), {}))
    monkeypatch.setattr(layers, "Family", lambda name, *_: Fake(name))
    monkeypatch.setattr("record.commit", lambda revision: f"commit of {revision}")
    monkeypatch.setattr(layers, "measure", measure)
    monkeypatch.setattr(layers, "ROOT", out.parent)
    monkeypatch.setattr("sys.argv", ["layers.py", "--out", str(out), *arguments])
    try:
        layers.main()
    except KeyboardInterrupt:
        return measured, False
    return measured, True


FULL = ("--full", "--model", "OLMoE", "--dtype", "float32", "--T", "1", "4", "16", "--routing", "uniform")


def test_a_full_run_goes_on_where_it_was_cut_off(monkeypatch, tmp_path):
    out = tmp_path / "rows.json"
    first, whole = run(monkeypatch, out, *FULL)
    assert [problem.T for problem in first] == [1, 4] and not whole
    then, whole = run(monkeypatch, out, *FULL)
    assert [problem.T for problem in then] == [16] and whole
    value = json.loads(out.read_text())
    assert [kept["problem"]["T"] for kept in value["rows"]] == [1, 4, 16] and value["limits"]["read"] == 1.0


@pytest.mark.parametrize("other", [("--turns", "3"), ("--seconds", "0.1"), ("--threads", "1"), ("--keep-memory",)])
def test_rows_of_other_settings_are_not_mixed(monkeypatch, tmp_path, other):
    out = tmp_path / "rows.json"
    run(monkeypatch, out, *FULL)
    name = other[0].removeprefix("--").replace("-", "_")
    with pytest.raises(SystemExit, match=f"got rows of another {name}: give --out"):
        run(monkeypatch, out, *FULL, *other)
    assert len(json.loads(out.read_text())["rows"]) == 2


def test_rows_of_other_families_and_instruction_sets_are_not_mixed(monkeypatch, tmp_path):
    out = tmp_path / "rows.json"
    run(monkeypatch, out, *FULL)
    with pytest.raises(SystemExit, match="got rows of another families: give --out"):
        run(monkeypatch, out, *FULL, families=("moert", "vllm"))
    monkeypatch.setattr("record._C.isa", lambda: "generic-er")
    with pytest.raises(SystemExit, match="got rows of another isa: give --out"):
        run(monkeypatch, out, *FULL)


def test_processes_end_where_another_does_not_start(monkeypatch, tmp_path):
    begin, closed = Fake.__init__, []

    def begin_or_not(self, name):
        if name == "vllm":
            raise PermissionError("its python")
        begin(self, name)

    monkeypatch.setattr(Fake, "__init__", begin_or_not)
    monkeypatch.setattr(Fake, "close", lambda self: closed.append(self.name))
    with pytest.raises(PermissionError, match="its python"):
        run(monkeypatch, tmp_path / "rows.json", "--quick", families=("moert", "vllm"))
    assert closed == ["moert"]


def test_nothing_is_measured_without_limits(monkeypatch, tmp_path):
    monkeypatch.setattr(Fake, "ask", lambda self, **request: {"error": "RuntimeError: no memory"})
    with pytest.raises(SystemExit, match="the machine's limits must be measured, got RuntimeError: no memory"):
        run(monkeypatch, tmp_path / "rows.json", *FULL)


def test_sizes(monkeypatch):
    for arguments, size in ((["--quick"], "quick"), ([], "usual"), (["--full"], "full"), (["--smoke"], "smoke")):
        monkeypatch.setattr("sys.argv", ["layers.py", *arguments])
        assert layers.parse().size == size
    with pytest.raises(SystemExit, match="must select a row, got none"):
        layers.chosen(Namespace(smoke=False, full=False, quick=True, model=["OLMoE"], dtype=None, T=None, routing=None))
