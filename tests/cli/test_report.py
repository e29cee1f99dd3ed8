import io
import json

import pytest
from rich.console import Console

from moert.cli.errors import CommandError
from moert.cli.generation import Difference
from moert.cli.report import (
    sameness,
    speed_table,
    training_table,
    waiting,
    weights_table,
    write_atomically,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CommandError, match=r"report.json must be writable: No space left on device"):
        write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_directory_takes_the_place_of_another(tmp_path):
    def make(content):
        def write(temporary):
            temporary.mkdir()
            (temporary / content).touch()

        return write

    for content in ("old", "new"):
        write_atomically(tmp_path / "a" / "model", make(content))
    assert [p.name for p in (tmp_path / "a").rglob("*")] == ["model", "new"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match="must be writable"):
        write_json(tmp_path / "file" / "report.json", {})


def test_sameness_says_where_and_how_close():
    names = ("eager", "moert")
    assert sameness([], 128, names) == "Same tokens: eager = moert, 128 of 128."
    text = sameness([Difference("moert", 4, 97, 98, 1.5e-6)], 128, names)
    assert "moert chose 98 instead of 97 at token 5 of 128" in text and "1.5e-06 apart" in text


def test_table_has_every_number():
    row = {
        "prefill_tokens": 512,
        "prefill_tokens_per_second": 12345.6,
        "decode_tokens_per_second": 250.0,
        "milliseconds_per_token": {"p20": 3.5, "p50": 4.0, "p80": 4.5},
        "peak_bytes": 700 * 2**20,
        "generation_bytes": 12.5 * 2**20,
    }
    nothing = {**row, "decode_tokens_per_second": None, "milliseconds_per_token": None}
    console = Console(width=150, record=True, quiet=False)
    console.print(speed_table({"eager": row, "moert": nothing}, "title"))
    text = console.export_text()
    for piece in ("512", "12,346", "250.0", "4.00 (3.50-4.50)", "700", "12.5", "eager", "title"):
        assert piece in text


def test_table_keeps_its_numbers_in_eighty_columns():
    row = {
        "prefill_tokens": 512,
        "prefill_tokens_per_second": 12345.6,
        "decode_tokens_per_second": 1250.0,
        "milliseconds_per_token": {"p20": 113.5, "p50": 114.0, "p80": 114.5},
        "peak_bytes": 1700 * 2**20,
        "generation_bytes": 1234 * 2**20,
    }
    console = Console(width=80, record=True, quiet=False)
    console.print(speed_table({"grouped_mm": row, "moert int4_asymmetric:128": row}, "title"))
    text = console.export_text()
    for piece in ("12,346", "1,250.0", "114 (114-114)", "1,700", "1,234.0"):
        assert text.count(f"{piece} ") == 2, piece
    assert "…" not in text and text.count("MiB") == 2 and all(len(line) <= 80 for line in text.splitlines())


def test_training_beside_the_slowest():
    times = {"p20": 90.0, "p50": 100.0, "p80": 1110.0}
    rows = {
        "eager": {"training": {"tokens_per_second": 10240.0, "milliseconds_per_step": times}},
        "moert": {"training": {"tokens_per_second": 25600.0, "milliseconds_per_step": times}},
        "moert int4": {},
    }
    console = Console(width=80, record=True, quiet=False)
    console.print(training_table(rows, "title"))
    text = console.export_text()
    for piece in ("title", "10,240", "25,600", "1.00 x", "2.50 x", "100 (90.0-1,110)"):
        assert piece in text, piece
    assert "int4" not in text and all(len(line) <= 80 for line in text.splitlines())


def test_weights_beside_a_reference():
    rows = {
        "moert": {"weight_bytes": 8 * 2**20, "perplexity": 5.0},
        "moert int4": {"weight_bytes": 3 * 2**20, "perplexity": 5.1},
    }
    console = Console(width=80, record=True, quiet=False)
    console.print(weights_table(rows, "title"))
    text = console.export_text()
    for piece in ("title", "8.0", "3.0", "5.1000", "+2.000 %", "+0.000 %", "beside moert"):
        assert piece in text
    console.print(weights_table({name: {"weight_bytes": row["weight_bytes"]} for name, row in rows.items()}, "other"))
    text = console.export_text()
    assert "8.0" in text and "perplexity" not in text


def test_waiting_says_what_takes_long_without_a_terminal(capsys):
    with waiting(Console(), "Loading …") as tell:
        assert capsys.readouterr() == ("", "Loading …\n")  # at once, and not between the lines of the result
        tell("1/2 weights")
        assert capsys.readouterr() == ("", "  1/2 weights\n")


def test_waiting_turns_on_a_terminal(capsys):
    out = io.StringIO()
    with waiting(Console(file=out, force_terminal=True, width=80), "Loading …") as tell:
        tell("1/2 weights")
    assert "Loading … 1/2 weights" in out.getvalue() and capsys.readouterr().err == ""
