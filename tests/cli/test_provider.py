import math
import os
import signal

import pytest
import torch

from moert.cli.checkpoint import load_model
from moert.cli.errors import CommandError
from moert.cli.generation import Request
from moert.cli.perplexity import nats
from moert.cli.provider import Load, Provider, compare, packed_name, turns


def test_a_process_answers_streams_and_dies_with_a_name(checkpoint):
    request = Request("def f(", 6, stream=True)
    with Provider("eager", Load(checkpoint, threads=1)) as provider:
        assert provider.wait() == "Qwen3MoeForCausalLM"
        pieces = []
        first = provider.generate(request, pieces.append)
        assert provider.generate(request).ids == first.ids and len(first.ids) == 6
        assert "".join(pieces).strip() == first.text.strip()
        os.kill(provider._process.pid, signal.SIGKILL)
        with pytest.raises(CommandError, match=r"the eager process must finish, got SIGKILL \(out of memory\?\)"):
            provider.generate(request)
    assert provider._process.returncode == -signal.SIGKILL


def test_its_errors_are_ours(dense_checkpoint):
    message = "must have mixture-of-experts layers"
    with Provider("eager", Load(dense_checkpoint)) as provider, pytest.raises(CommandError, match=message):
        provider.wait()


def test_a_process_that_cannot_start_says_why(checkpoint):
    message = "the eager process must finish, got: .*invalid int value"
    with Provider("eager", Load(checkpoint, threads=0.5)) as provider, pytest.raises(CommandError, match=message):
        provider.wait()


def test_another_provider_begins_each_round():
    assert "".join(turns("abc", 3)) == "abcbcacab" and list(turns("abc", 0)) == []


def test_packed_experts_beside_the_others(checkpoint):
    windows = [list(range(40, 60)), list(range(90, 100))]
    load = Load(checkpoint, threads=1, packings=("int4:32",))
    batches = [[list(range(40, 56)), list(range(90, 106))]] * 3
    told = []
    compared = compare(load, Request("def f(", 3), Request("def f(", 1), 2, windows, batches, told.append)
    assert [step.partition(" ")[0] for step in told] == [f"{i + 1}/26" for i in range(26)]
    assert told[0] == "1/26 eager: loading" and told[-1] == "26/26 eager: training"
    rows = compared.rows
    assert [name for name in rows if "training" in rows[name]] == ["eager", "grouped_mm", "moert"]
    assert all(len(steps) == 2 * 3 for steps in compared.steps.values())
    speed, times = rows["moert"]["training"].values()
    assert speed * times["p50"] == pytest.approx(1e3 * 2 * 16) and times["p20"] <= times["p50"] <= times["p80"]
    assert list(rows) == ["eager", "grouped_mm", "moert", *load.packed] and load.packed[0] == packed_name("int4:32")
    for name, packing in (("moert", None), ("moert int4:32", "int4:32")):
        model = load_model(checkpoint, "moert", "auto", packing=packing)
        measured = [nats(model, torch.tensor([window])) for window in windows]
        expected = math.exp(sum(total for total, _ in measured) / sum(count for _, count in measured))
        assert rows[name]["perplexity"] == pytest.approx(expected, rel=1e-6)
        assert rows[name]["weight_bytes"] == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert rows["moert int4:32"]["weight_bytes"] < rows["moert"]["weight_bytes"] == rows["eager"]["weight_bytes"]
    assert all(len(generations) == 2 for generations in compared.decodes.values())
