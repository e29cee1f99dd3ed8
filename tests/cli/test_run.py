import pytest
import torch
from typer.testing import CliRunner

from moert import cuda
from moert.cli.app import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "."], "prompt must be given with model, got none"),
        (["--model", ".", "--prompt", "a\udcff"], "prompt must be UTF-8, got bytes that are not"),
        (["--quantize", "int4:x"], "quantize must be FORMAT or FORMAT:GROUP, got int4:x"),
        (["--top-p", "0.5"], "temperature must be above 0 with top-p or top-k, got 0 (greedy)"),
        (["--top-p", "0", "--temperature", "1"], "top-p must be in (0, 1], got 0"),
        (["--model", "x", "--prompt", "a", "--steps", "3"], "steps must be left out with --model"),
        (["--model", "x", "--shape", "olmoe-1b-7b"], "shape must be left out with --model"),
        (["--shape", "olmoe-1b-7b", "--prompt", "a"], "prompt must be left out with --shape"),
        (["--layers", "1"], "layers must be left out without --shape"),
        (["--no-compare"], "compare must be left out without --model"),
        (["--out", "/dev/null/a"], "out must be a writable directory, got /dev/null/a"),
        (["--model", "/no/such/place"], "model must be a local directory, got /no/such/place"),
    ],
)
def test_errors(arguments, message):
    done = CliRunner().invoke(app, ["run", *arguments])
    assert done.exit_code == 2
    assert done.stderr == f"moert run: {message}\n"


def test_a_gpu_that_is_not_there(monkeypatch):
    def error():
        done = CliRunner().invoke(app, ["run", "--device", "cuda"])
        return done.exit_code, done.stderr

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert error() == (2, "moert run: device must be cpu where torch can use no GPU, got cuda\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "is_built", lambda: False)
    code, said = error()
    assert code == 2 and said.startswith("moert run: device must be cpu here, got cuda: moert is built without CUDA")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--max-new-tokens", "0"],
        ["--top-p", "2"],
        ["--threads", "0"],
        ["--dtype", "int3"],
        ["--device", "tpu"],
    ],
)
def test_values_out_of_range_are_usage_errors(arguments):
    done = CliRunner().invoke(app, ["run", *arguments])
    assert done.exit_code == 2 and arguments[0] in done.stderr and "Traceback" not in done.stderr


def test_help_names_every_option():
    text = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).stdout
    for option in ("model", "prompt", "max-new-tokens", "temperature", "top-p", "top-k", "seed", "threads", "device",
                   "dtype", "out", "compare", "quantize", "text", "steps", "retrain", "shape", "layers"):  # fmt: skip
        assert f"--{option}" in text
