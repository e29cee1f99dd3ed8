import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moert import quantize_
from moert.cli.app import app
from moert.cli.checkpoint import load_model
from moert.cli.quantize_report import measure
from moert.integrations.transformers.quantized import experts_modules

TEXT = "def read(self, size=-1):\n    return self.buffer[:size]\n" * 20


def pair(checkpoint, *options):
    plain, packed = load_model(checkpoint, "moert", "auto"), load_model(checkpoint, "moert", "auto")
    quantize_(packed, *options)
    return plain, packed


def test_numbers_are_those_of_the_models(checkpoint):
    plain, packed = pair(checkpoint, "int4", 32, ["model.layers.0"])
    ids = list(TEXT.encode())[:40]
    rows, outputs, choices = {}, {}, {"plain": [], "packed": []}
    experts = [experts_modules(model)["model.layers.1.mlp.experts"] for model in (plain, packed)]
    for kind, module in zip(choices, experts, strict=True):
        module.register_forward_hook(lambda m, args, out, kind=kind: choices[kind].append(args[1].sort(-1).values))
    experts[0].register_forward_hook(lambda m, args, out: rows.update(args=args) or outputs.update(out=out))
    (first, second), perplexity = measure(plain, packed, ids)
    assert [first.name, second.name] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert first.summary() | {"router_agreement": 1.0} == first.summary()  # nothing is packed before its router
    assert first.summary()["output_error"] is first.summary()["bits_per_weight"] is first.summary()["format"] is None
    change = experts[1](*rows["args"]) - outputs["out"]
    summary = second.summary()
    assert summary["output_error"] == pytest.approx((change.norm() / outputs["out"].norm()).item(), rel=1e-5)
    same = (choices["plain"][0] == choices["packed"][0]).all(-1)
    assert summary["router_agreement"] == same.double().mean().item() and second.tokens == 40
    weights = experts[1].packed("w1"), experts[1].packed("w2")
    expected = 8 * sum(w.nbytes for w in weights) / sum(w.shape.numel() for w in weights)
    assert summary["bits_per_weight"] == expected and summary["format"] == str(weights[0].format)
    for when, model in (("before", plain), ("after", packed)):
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
        assert math.log(perplexity[when]) == pytest.approx(loss, rel=1e-5)


def test_finer_formats_change_less(checkpoint):
    ids = list(TEXT.encode())
    errors = []
    for options in (("int8",), ("int4", 32), ("ternary2",)):
        layers, perplexity = measure(*pair(checkpoint, *options), ids)
        errors.append((layers[1].summary()["output_error"], -layers[1].same))
        assert layers[1].tokens == len(ids)
    assert errors == sorted(errors)


def test_command(checkpoint, tmp_path):
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text(TEXT)
    command = ["quantize", str(checkpoint), str(out), "--format", "int8", "--report", str(text)]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    value = json.loads((out / "report.json").read_text())
    assert value["text"] == {"path": str(text), "tokens": len(TEXT), "window": 512}
    assert value["perplexity"]["after"] == pytest.approx(value["perplexity"]["before"], rel=0.05)
    assert [layer["name"] for layer in value["layers"]] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert all(0 < layer["output_error"] < 0.05 for layer in value["layers"])
    assert value["bytes"]["after"] < value["bytes"]["before"] and value["options"]["format"] == "int8"
    assert (out / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for part in ("model.layers.1.mlp.experts", "output error", "same top-k", "perplexity", f"{out / 'report.json'}"):
        assert part in done.stdout
    before = (out / "model.safetensors.index.json").stat().st_mtime_ns
    again = CliRunner().invoke(app, [*command, "--report-tokens", "100"])
    assert again.exit_code == 0 and (out / "model.safetensors.index.json").stat().st_mtime_ns == before
    assert json.loads((out / "report.json").read_text())["text"]["tokens"] == 100
    tensors = load_file(checkpoint / "model.safetensors")
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert CliRunner().invoke(app, [command[0], str(moved), *command[2:]]).exit_code == 0
    tensors["model.layers.1.mlp.experts.0.down_proj.weight"] *= 2
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    other = CliRunner().invoke(app, [command[0], str(moved), *command[2:]])
    assert other.exit_code == 2 and "OUT must not exist or be packed from IN, whose fingerprint is" in other.stderr
    other = CliRunner().invoke(app, [*command, "--group", "32"])
    assert other.exit_code == 2 and "OUT must not exist or be packed with the same options, got {" in other.stderr


def test_the_text_is_read_before_anything_is_packed(checkpoint, tmp_path):
    text = tmp_path / "text"
    for content, message in (
        (None, "must be a readable UTF-8 file, got"),
        (b"\xff\xfe", "UTF-8"),
        (b"a", "at least 2"),
    ):
        if content is not None:
            text.write_bytes(content)
        done = CliRunner().invoke(app, ["quantize", str(checkpoint), str(tmp_path / "out"), "--report", str(text)])
        assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
