import io
import json
from dataclasses import replace

import pytest
from outside import outside_model
from rich.console import Console

from moert import quantize_
from moert.cli.checkpoint import byte_tokenizer, load_model, load_tokenizer
from moert.cli.errors import CommandError
from moert.cli.generate import generate
from moert.cli.generation import Request
from moert.cli.provider import Load, Provider

PROMPT = "import os\n"


def run(load, request, out=None, stock=True, text=None):
    console = Console(file=io.StringIO(), width=140)
    generate(load, request, out, stock, console, text)
    return console.file.getvalue()


def test_text_sameness_table_and_report(checkpoint, tmp_path):
    text = run(Load(checkpoint, threads=1), Request(PROMPT, 12), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    ids = load_tokenizer(checkpoint)(PROMPT, return_tensors="pt")
    model = load_model(checkpoint, "eager", "auto")
    expected = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, len(PROMPT) :].tolist()
    assert report["generation"]["ids"] == {"moert": expected, "eager": expected, "grouped_mm": expected}
    assert report["generation"]["same_tokens"] and "Same tokens: moert = eager = grouped_mm, 12 of 12." in text
    assert all(row["decode_tokens"] == 12 for row in report["providers"].values())
    assert text.startswith(PROMPT) and str(tmp_path / "out" / "report.json") in text.replace("\n", "")


def test_prefill_is_a_median(checkpoint, tmp_path, monkeypatch):
    asked, generated = Provider.generate, []

    def seen(provider, request, *args):
        made = asked(provider, request, *args)
        if request.max_new_tokens != 2:  # the first call
            made = replace(made, prefill_seconds=(5.0, 1.0, 2.0)[len(generated)])
            generated.append(request)
        return made

    monkeypatch.setattr(Provider, "generate", seen)
    run(Load(checkpoint, threads=1), Request(PROMPT, 4), tmp_path / "out", stock=False)
    row = json.loads((tmp_path / "out" / "report.json").read_text())["providers"]["moert"]
    assert [request.max_new_tokens for request in generated] == [4, 1, 1]
    assert row["prefill_tokens_per_second"] == row["prefill_tokens"] / 2 and row["decode_tokens"] == 4


def test_moert_alone_in_bfloat16_sampled(checkpoint):
    text = run(Load(checkpoint, "bfloat16", 1), Request(PROMPT, 4, temperature=1.0, top_k=5, seed=3), stock=False)
    assert "moert" in text and "eager" not in text and "bfloat16" in text


def test_packed_experts_and_a_text(checkpoint, tmp_path):
    (tmp_path / "text").write_text("import os\nimport sys\n" * 30)
    load = Load(checkpoint, "bfloat16", 1, packings=("int8", "sub1"))
    text = run(load, Request(PROMPT, 4), tmp_path / "out", stock=False, text=tmp_path / "text")
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["providers"]
    assert rows["moert int8"]["weight_bytes"] < rows["moert"]["weight_bytes"]
    assert rows["moert int8"]["perplexity"] == pytest.approx(rows["moert"]["perplexity"], rel=0.05)
    assert rows["moert sub1"]["perplexity"] > 1
    assert "rounded to nearest, sub1 too" in text
    assert "Weights, and perplexity on text" in text and f"{rows['moert int8']['perplexity']:.4f}" in text


def test_a_packed_checkpoint_runs_alone(checkpoint, tmp_path):
    model = load_model(checkpoint, "moert", "auto")
    quantize_(model, "int8")
    model.save_pretrained(tmp_path / "packed")
    load_tokenizer(checkpoint).save_pretrained(tmp_path / "packed")
    text = run(Load(tmp_path / "packed", threads=1), Request(PROMPT, 4), tmp_path / "out")
    assert "stock transformers does not run experts that moert has packed" in text
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())["providers"]) == ["moert"]


def test_files_are_checked_before_anything_starts(tmp_path):
    with pytest.raises(CommandError, match="model must be a local directory"):
        run(Load(tmp_path / "gone"), Request(PROMPT, 4))


def test_a_model_whose_experts_have_no_names(tmp_path):
    outside_model("llama4", vocab_size=256).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    text = run(Load(tmp_path, threads=1), Request(PROMPT, 3))
    assert "Same tokens: moert = eager, 3 of 3." in text and "grouped_mm" not in text and "float32" in text
