"""`moert run --device cuda`: trains, generates and compares as on the CPU.  `make test-gpu` runs it."""

import json
import math

import pytest
import torch
from tests.test_gpu import NEEDS_GPU
from typer.testing import CliRunner

from moert.cli.app import app
from moert.cli.corpus import load_corpus
from moert.cli.demo_train import DemoSettings, train
from moert.cli.provider import PROVIDERS

pytestmark = NEEDS_GPU
STEPS = 40


def moert_run(out, *arguments):
    done = CliRunner().invoke(app, ["run", "--device", "cuda", "--out", str(out), "--max-new-tokens", "16", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, moert_run(out, "--steps", str(STEPS), "--quantize", "int4")


def test_the_demonstration(demonstration):
    _, report = demonstration
    training, rows = report["training"], report["providers"]
    assert training["device"] == "cuda" and report["machine"]["gpu"] == torch.cuda.get_device_name()
    assert len(training["losses"]) == STEPS and training["heldout_loss"] < training["losses"][0] - 1
    assert set(rows) == {*PROVIDERS, "moert int4"}
    for row in rows.values():
        assert row["decode_tokens_per_second"] > 0 and row["peak_bytes"] >= row["weight_bytes"] > 0
    assert rows["moert int4"]["weight_bytes"] < rows["moert"]["weight_bytes"]
    perplexities = [rows[name]["perplexity"] for name in PROVIDERS]
    assert max(perplexities) < 1.001 * min(perplexities)
    assert rows["moert int4"]["perplexity"] < 1.02 * rows["moert"]["perplexity"]


def test_it_learns_as_a_cpu_does():
    """The same weights and windows to begin with: the same losses, until rounding has grown."""
    corpus, settings = load_corpus(), DemoSettings(steps=STEPS, seconds=math.inf)
    there, here = (train(settings, corpus, lambda step: None, device=device)[1] for device in ("cuda", "cpu"))
    assert there.losses[0] == pytest.approx(here.losses[0], rel=1e-4)
    assert there.heldout_loss == pytest.approx(here.heldout_loss, rel=0.03)


def test_a_checkpoint(demonstration, tmp_path):
    out, _ = demonstration
    report = moert_run(tmp_path, "--model", str(out / "model"), "--prompt", "def f(", "--quantize", "mxfp4")
    generation = report["generation"]
    assert generation["same_tokens"] or all(d["gap"] < 0.1 for d in generation["differences"])
    assert all(len(ids) == 16 for ids in generation["ids"].values())
    assert report["machine"]["gpu"] and set(report["providers"]) == {*PROVIDERS, "moert mxfp4"}


def test_a_shape(tmp_path):
    report = moert_run(tmp_path, "--shape", "qwen3-30b-a3b", "--layers", "1")
    assert report["machine"]["gpu"] and set(report["providers"]) == set(PROVIDERS)
    assert all(row["milliseconds_per_layer"]["decode"] > 0 for row in report["providers"].values())
