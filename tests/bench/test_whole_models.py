import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from model_worker import ModelWorker
from rich.console import Console

import whole_models
from gguf_models import write_gguf
from moert.integrations.transformers import load_gguf
from moert.quant.readers import GgufFile
from moert.testing import row_error
from whole_models_rows import PAIRS, Row, cells, faster, show

OPTIONS = Namespace(turns=2, prompt=8, tokens=3, threads=1, smoke=False, rows=None)
IDS = (torch.arange(64) * 37 % 2048).tolist()


@pytest.fixture(scope="module")
def model():
    return whole_models.random_model(whole_models.TINY)


def test_a_ratio_is_of_the_same_turns():
    ours, theirs = Row("moert int4:32", decode=[1.0, 4.0, 1.0]), Row("llama.cpp Q4_0", decode=[2.0, 2.0, 3.0])
    assert faster(ours, theirs, "decode") == pytest.approx(2)
    assert faster(theirs, ours, "decode") == pytest.approx(0.5)


def test_the_table():
    parts = [{"token": 0.02, "forward": 0.015, "experts": 0.004}, {"token": 0.02, "forward": 0.015, "experts": 0.006}]
    moert = Row("moert int4:32", 2**20, 2**22, 2**21, 0.03, None, [0.1, 0.2], [0.01, 0.02], parts)
    llama = Row("llama.cpp Q4_0", 2**20, None, None, 0.03, 0.004, [0.2, 0.2], [0.005, 0.005])
    assert cells(moert, None, 8) == ["1", "4", "2", "53", "66.7", "15.0 (10.0-20.0)", "5.0", "-", "0.0300"]
    assert cells(llama, moert, 8)[-3:] == ["-", "1.50, 0.38", "0.0300"]
    console = Console(width=170, record=True)
    show([moert, llama, Row("llama.cpp MXFP4", missing="no such type")], 8, "of both", console)
    said = console.export_text()
    assert "llama.cpp MXFP4: not measured, no such type" in said and "1.50, 0.38" in said


def test_every_format_has_its_row_and_every_type_its_format(monkeypatch):
    monkeypatch.setattr(whole_models, "LLAMA", whole_models.ROOT)
    names = whole_models.names(OPTIONS)
    assert len(set(names)) == len(names) and set(PAIRS) | set(PAIRS.values()) <= set(names)
    monkeypatch.setattr(whole_models, "LLAMA", whole_models.ROOT / "none")
    assert whole_models.names(OPTIONS) == [name for name in names if name not in PAIRS]
    monkeypatch.setattr("sys.argv", ["whole_models.py", "--rows", "moert sub1", "moert bfloat16"])
    assert whole_models.names(whole_models.parse()) == ["moert bfloat16", "moert sub1"]
    monkeypatch.setattr("sys.argv", ["whole_models.py", "--rows", "moert int3"])
    with pytest.raises(SystemExit, match="rows must be of the table, got moert int3"):
        whole_models.parse()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "MXFP4", "TQ1_0", "TQ2_0"])
def test_a_file_holds_the_numbers_of_its_reference(model, kind, tmp_path):
    before, reference = written(model, kind, tmp_path / "model.gguf")
    with torch.inference_mode():
        read = load_gguf(tmp_path / "model.gguf", precision="full").eval()
        found = read(input_ids=torch.tensor([IDS])).logits[0, whole_models.SHORT - 1 :]
    assert row_error(found, torch.from_numpy(reference)) < 1e-4
    assert whole_models.error(reference, before) > 1e-3


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_a_file_of_floats_holds_the_model(model, kind, tmp_path):
    before, reference = written(model, kind, tmp_path / "model.gguf")
    assert whole_models.error(reference, before) < (1e-3 if kind == "F16" else 1e-6)
    file = GgufFile(tmp_path / "model.gguf")
    gate, up = model.model.layers[1].mlp.experts.gate_up_proj.data.chunk(2, 1)
    for name, weight in (("gate", gate), ("up", up), ("down", model.model.layers[1].mlp.experts.down_proj.data)):
        assert row_error(file.unpack(f"blk.1.ffn_{name}_exps.weight"), weight) < 1e-3


def written(model, kind, path):
    """The logits before, and those of what is in the file; the model stays as it was."""
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    before = whole_models.logits(model, IDS)
    try:
        with torch.inference_mode():
            write_gguf(model, kind, path)
        return before, whole_models.logits(model, IDS)
    finally:
        model.load_state_dict(state)


class Fake:
    """A family that answers at once, its logits those given."""

    def __init__(self, name="moert", logits=None, failing=()):
        self.name, self.logits, self.failing, self.requests = name, logits, failing, []

    def ask(self, **request):
        asked = next(iter(request))
        self.requests.append(asked)
        if asked in self.failing:
            return {"error": "MemoryError: too large"}
        if asked == "logits":
            np.save(request["path"], self.logits)
        seconds = [1.0, 3.0, 2.0] if asked == "decode" else float(len(self.requests))
        return {"seconds": seconds, "token": 3.0, "forward": 2.0, "experts": 1.0, "peak": 7, "held": 5}


def test_another_model_ends_the_bench(model, tmp_path):
    reference = whole_models.logits(model, IDS)
    source, row = whole_models.Source("llama.cpp BF16", "llama", {}, reference), Row("llama.cpp BF16")
    whole_models.check(Fake(logits=1.01 * reference), source, row, reference, IDS, tmp_path)
    assert row.error == row.own_error == pytest.approx(0.01, rel=1e-3)
    swapped = [layer.mlp.experts.gate_up_proj for layer in model.model.layers]
    try:
        for weight in swapped:
            weight.data = weight.data.roll(weight.shape[1] // 2, 1)
        output = whole_models.logits(model, IDS)
    finally:
        for weight in swapped:
            weight.data = weight.data.roll(weight.shape[1] // 2, 1)
    with pytest.raises(SystemExit, match="llama.cpp BF16 must compute the same model, got logits that are off by"):
        whole_models.check(Fake(logits=output), source, row, reference, IDS, tmp_path)


def test_the_turn_before_the_first_is_not_kept(monkeypatch):
    running = [(Fake(), Row("moert bfloat16")), (Fake("llama"), Row("llama.cpp BF16"))]
    progress = Namespace(add_task=lambda *_, **__: 0, advance=lambda _: None)
    whole_models.take_turns(running, IDS, OPTIONS, progress)
    for family, row in running:
        assert row.decode == [2.0, 2.0] and row.peak_bytes == 7 and row.held_bytes == 5
        assert family.requests.count("prefill") == 3 and family.requests[-1] == "memory"
    assert running[0][1].prefill == [4.0, 7.0] and running[1][1].prefill == [3.0, 5.0]
    assert running[0][1].part("experts") == 1.0 and running[1][1].parts == []
    with pytest.raises(SystemExit, match="moert int8 must run once it is loaded, got MemoryError: too large"):
        whole_models.take_turns([(Fake(failing=["decode"]), Row("moert int8"))], IDS, OPTIONS, progress)


def test_a_worker_of_a_checkpoint(model, tmp_path):
    reference = whole_models.logits(model, IDS)
    sources = whole_models.sources(model, reference, IDS, tmp_path, ["moert bfloat16", "moert int4:32", "moert sub1"])
    worker = ModelWorker("moert", torch.get_num_threads())
    for source, bound in zip(sources, (0.02, 0.1, 0.5), strict=True):
        answer = worker.answer({"load": source.spec})
        expected = sum(weight.nbytes for weight in worker.model.model.state_dict().values())
        assert abs(answer["weight_bytes"] - expected) < 4096  # of rotary frequencies, which no checkpoint has
        worker.answer({"logits": [IDS, whole_models.SHORT], "path": str(tmp_path / "logits.npy")})
        found = np.load(tmp_path / "logits.npy")
        assert found.shape == reference.shape and 0 < whole_models.error(found, reference) < bound
        assert worker.answer({"prefill": [IDS[:8]]})["seconds"] > 0
        assert len(worker.answer({"decode": [IDS[:8], 4]})["seconds"]) == 3
        parts = worker.answer({"parts": [IDS[:8], 4]})
        assert parts["token"] > parts["forward"] > parts["experts"] > 0
        memory = worker.answer({"memory": []})
        assert memory["peak"] is None or memory["peak"] >= memory["held"]
        json.dumps(parts)
    missing = worker.answer({"load": {**source.spec, "path": str(tmp_path / "none")}})
    assert missing["error"].startswith("CommandError: ")
