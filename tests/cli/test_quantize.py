import io
import re
import shutil
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from moert.cli.app import app
from moert.cli.quantize import _bar, _tellers


def quantize(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def test_packs_and_says_how_large(checkpoint, tmp_path):
    command = [sys.executable, "-m", "moert", "quantize", checkpoint, tmp_path / "out", "--format", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # 34 bytes, padding and scale included, for rows of 32 and of 24 columns.
    sizes = r"\d+\.\d kB of tensors \(\d+\.\d kB before\), 9\.44 bits a packed weight\n"
    assert re.fullmatch(re.escape(f"{tmp_path / 'out'}: ") + sizes, done.stdout)
    assert "experts" in done.stderr and "kB" in done.stderr and "Traceback" not in done.stderr
    done = CliRunner().invoke(
        app, ["run", "--model", str(tmp_path / "out"), "--prompt", "a", "--max-new-tokens", "4", "--no-compare"]
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "int3"], "format must be one of int8, .*, got int3"),
        (["--group", "7"], "group must be one of 32, 64, 128 for int4, got 7"),
        (["--precision", "int9"], "precision must be one of auto, .*, got int9"),
        (
            ["--format", "sub1", "--precision", "int8"],
            "precision must be one of auto, full, bfloat16 for sub1, got int8",
        ),
        (["--report-tokens", "9"], "report-tokens must be left out without --report"),
        (["--calibrate-tokens", "9"], "calibrate-tokens must be left out without --calibrate"),
        (["--format", "fp8", "--calibrate", "text"], "calibrate must be left out for fp8, which is rounded to nearest"),
        (["--calibrate", "nothing.txt"], "the text must be a readable UTF-8 file, got .*nothing.txt"),
        (["--skip", "model"], "experts of transformers' interface that skip does not name"),
    ],
)
def test_options(checkpoint, tmp_path, options, message):
    done = quantize(checkpoint, tmp_path / "out", *options)
    assert done.exit_code == 2 and done.stderr.startswith("moert quantize: ") and done.stderr.count("\n") == 1
    assert re.search(message, done.stderr)
    assert not list(tmp_path.iterdir())


def test_sub_one_bit_says_what_it_does_without_data(checkpoint, tmp_path):
    done = quantize(checkpoint, tmp_path / "out", "--format", "sub1")
    assert done.exit_code == 0, done.output
    assert "sub1 without --calibrate TEXT rounds to nearest; by data its outputs err" in done.stderr
    assert " bits a packed weight" in done.stdout


def test_calibrated_by_a_text(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play. " * 60)
    options = ["--format", "ternary2", "--calibrate", text, "--calibrate-tokens", 900, "--report", text]
    done = quantize(checkpoint, tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    (rounded,) = re.findall(
        r"(\d+) of 16 experts packed by this call saw fewer than 32 rows of the text and were rounded", done.stdout
    )
    assert 0 < int(rounded) < 16 and "UserWarning" not in done.stderr  # one sentence sends little to some experts
    assert quantize(checkpoint, tmp_path / "out", *options).exit_code == 0  # reports only
    options[5] = 901
    done = quantize(checkpoint, tmp_path / "out", *options)
    assert done.exit_code == 2 and "OUT must not exist or be packed with the same options" in done.stderr


def test_bad_input_is_one_line_and_nothing_is_left(checkpoint, dense_checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "there").mkdir()
    cases = {
        "model must be a local directory": (tmp_path / "nothing", tmp_path / "out"),
        "model must have mixture-of-experts layers, got Qwen3ForCausalLM": (dense_checkpoint, tmp_path / "out"),
        "must be a sound safetensors file": (broken, tmp_path / "out"),
        "OUT must not exist": (checkpoint, tmp_path / "there"),
    }
    for message, arguments in cases.items():
        done = quantize(*arguments)
        assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "there"]


def test_a_folder_that_cannot_be_written(checkpoint, tmp_path, monkeypatch):
    import moert.cli.conversion as conversion

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_tensors", full)
    done = quantize(checkpoint, tmp_path / "out")
    assert done.exit_code == 2 and "moert quantize: OUT must be writable: [Errno 28] No space left" in done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_options_do_not_wait_for_transformers(tmp_path):
    code = "import sys; from moert.cli.app import app; app({}, standalone_mode=False)"
    for options, message in [
        (["--format", "int9"], "format must be one of"),
        (["--report-tokens", "9"], "report-tokens must be left out"),
        ([], "model must be a local directory"),
    ]:
        arguments = ["quantize", str(tmp_path / "nothing"), str(tmp_path / "out"), *options]
        check = f"try:\n    {code.format(arguments)}\nfinally:\n    assert 'transformers' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_an_interruption_says_that_the_same_call_goes_on(checkpoint, tmp_path, monkeypatch):
    import moert.cli.conversion as conversion

    def interrupted(path, *arguments, write=conversion.write_tensors):
        if path.name.startswith("model-00002"):
            raise KeyboardInterrupt
        return write(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_tensors", interrupted)
        done = quantize(checkpoint, tmp_path / "out")
    assert done.exit_code == 130
    partial = tmp_path / "out.partial"
    assert done.stderr.endswith(f"moert quantize: interrupted; the same call goes on from {partial}\n")
    first = (partial / next(path.name for path in partial.iterdir() if path.name.startswith("model-00001"))).stat()
    assert quantize(checkpoint, tmp_path / "out").exit_code == 0
    (kept,) = (tmp_path / "out").glob("model-00001*")
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


def test_the_bar_has_bytes_rate_and_remaining_time():
    bar, seconds = _bar(), [0.0]
    bar.get_time = lambda: seconds[0]
    task = bar.add_task("model.layers.0.mlp.experts", total=8_000_000)
    for _ in range(3):
        bar.update(task, advance=1_000_000)
        seconds[0] += 1
    console = Console(width=120, file=io.StringIO())
    console.print(bar.get_renderable())
    line = " ".join(console.file.getvalue().split())
    assert line.startswith("model.layers.0.mlp.experts ") and line.endswith("3.0/8.0 MB 1.0 MB/s 0:00:05"), line


def test_what_was_done_before_says_nothing_about_the_rate():
    bar, seconds = _bar(), [0.0]
    bar.get_time = lambda: seconds[0]
    task = bar.add_task("", total=8_000_000)
    advance, taken = _tellers(bar, task)
    for tell in (taken, taken, advance, advance, advance):
        tell("experts", 1_000_000)
        seconds[0] += 1
    (state,) = bar.tasks
    assert (state.completed, state.total, state.speed, state.time_remaining) == (5_000_000, 8_000_000, 1e6, 3)
