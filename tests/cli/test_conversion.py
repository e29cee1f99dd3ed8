"""A checkpoint streamed into a packed one: what comes out, what a kill in the middle leaves, the memory it takes."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

import moert.cli.conversion as conversion_module
from moert import quantize_
from moert.cli.calibration import Calibration
from moert.cli.conversion import RECORD, Conversion
from moert.cli.errors import CommandError
from moert.cli.quantize_report import measure
from moert.cli.tensor_files import TensorFiles, sha256
from moert.integrations.transformers import MoertConfig

SIZES = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {  # experts in tensors of their own, under other names, and all in one
    "qwen3": Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, **SIZES),
    "mixtral": MixtralConfig(num_local_experts=4, **SIZES),
    "olmoe": OlmoeConfig(num_experts=4, num_experts_per_tok=2, **SIZES),
    "gpt_oss": GptOssConfig(num_local_experts=4, num_experts_per_tok=2, **SIZES),
}
OPTIONS = MoertConfig("int4", 32, ["model.layers.1"])
IDS = torch.arange(3, 17).view(2, 7)


def floats(kind, folder, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).to(dtype)
    for p in model.parameters():
        p.data.normal_(std=p.shape[-1] ** -0.5)
    model.save_pretrained(folder, **options)
    return folder


def convert(source, target, options=OPTIONS, calibration=None):
    Conversion(source, target, options, calibration).run(lambda title, nbytes: None)


def all_tensors(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


RELOAD = """
import sys, torch, moert.integrations.transformers
from transformers import AutoModelForCausalLM
from pathlib import Path
for out in Path(sys.argv[1]).glob("*.out"):
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    for tensor in [*model.parameters(), *model.buffers()]:  # a file maps tensors to addresses of any alignment
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        torch.save(model(torch.arange(3, 17).view(2, 7)).logits, out.with_suffix(".logits"))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Every kind, its folder OUT, and the logits of a new process that loads it."""
    root = tmp_path_factory.mktemp("kinds")
    for kind in CONFIGS:
        convert(floats(kind, root / kind), root / f"{kind}.out")
    return reloaded(root)


def reloaded(root):
    subprocess.run([sys.executable, "-c", RELOAD, root], check=True, capture_output=True, timeout=120)
    return root


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_as_a_loaded_model_that_is_saved(kind, elsewhere, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(elsewhere / kind).eval()
    packed = quantize_(model, "int4", 32, ["model.layers.1"])
    model.save_pretrained(tmp_path)
    expected, made = all_tensors(tmp_path), all_tensors(elsewhere / f"{kind}.out")
    assert packed == ["model.layers.0.mlp.experts", "model.layers.2.mlp.experts"]
    assert made.keys() == expected.keys()
    assert not [name for name in made if not torch.equal(made[name], expected[name])]
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (elsewhere / f"{kind}.out", tmp_path))
    made_of = ours["quantization_config"].pop("made_of")
    assert made_of == TensorFiles(elsewhere / kind).fingerprint()
    assert ours == theirs and ours["quantization_config"]["quant_method"] == "moert"
    with torch.no_grad():
        assert torch.equal(torch.load(elsewhere / f"{kind}.logits"), model(IDS).logits)


CALIBRATION = Calibration(torch.randint(64, (1100,), generator=torch.Generator().manual_seed(1)).tolist())


def aligned(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


@pytest.mark.parametrize("format", ["sub1", "ternary2"])
@pytest.mark.parametrize("kind", ["qwen3", "mixtral", "olmoe"])
def test_calibrated_as_a_loaded_model_is(kind, format, tmp_path):
    """Bit for bit: layers see the same rows, products and sums have the same order."""
    source, out = floats(kind, tmp_path / kind), tmp_path / "calibrated.out"
    options = MoertConfig(format, skip=["model.layers.1"], calibrated=CALIBRATION.facts)
    convert(source, out, options, CALIBRATION)
    model = aligned(source)
    quantize_(model, format, skip=["model.layers.1"], calibration=CALIBRATION.batches)
    model.save_pretrained(tmp_path / "saved")
    expected, made = all_tensors(tmp_path / "saved"), all_tensors(out)
    assert made.keys() == expected.keys()
    assert not [name for name in made if not torch.equal(made[name], expected[name])]
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (out, tmp_path / "saved"))
    assert ours["quantization_config"].pop("calibrated") == CALIBRATION.facts
    assert len(ours["quantization_config"].pop("made_of")) == 64
    assert ours == theirs and ("experts" in ours["quantization_config"]) == (format == "sub1")
    reloaded(tmp_path)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "calibrated.logits"), model(IDS).logits)


@pytest.mark.parametrize("format", ["sub1", "int4"])
def test_calibrated_layers_are_nearer_than_rounded_ones(format, tmp_path):
    source = floats("qwen3", tmp_path / "in")
    convert(source, tmp_path / "rounded", MoertConfig(format))
    convert(source, tmp_path / "calibrated", MoertConfig(format, calibrated=CALIBRATION.facts), CALIBRATION)
    plain, rounded, calibrated = (aligned(tmp_path / name) for name in ("in", "rounded", "calibrated"))
    saved = aligned(source)
    quantize_(saved, format)
    assert all(torch.equal(saved.state_dict()[name], value) for name, value in rounded.state_dict().items())
    errors = [measure(plain, packed, CALIBRATION.ids)[0] for packed in (rounded, calibrated)]
    for before, after in zip(*errors, strict=True):
        assert after.summary()["output_error"] < 0.9 * before.summary()["output_error"]


def test_many_shards_and_the_files_beside_them(tmp_path):
    source = floats("mixtral", tmp_path / "in", max_shard_size="8KB")
    assert len(list(source.glob("*.safetensors"))) > 5
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("not copied")
    convert(source, tmp_path / "out")
    whole = floats("mixtral", tmp_path / "whole")
    convert(whole, tmp_path / "other")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        *(f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    made, other = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "other")
    assert made.keys() == other.keys() and all(torch.equal(made[name], other[name]) for name in made)


KILLED = """
import json, os, signal, sys
from pathlib import Path
import moert.cli.conversion as conversion
from moert.cli.calibration import Calibration
from moert.integrations.transformers import MoertConfig
calls, write = [], conversion.write_tensors
def dies(path, tensors, pieces):
    calls.append(path)
    def halfway(name):
        yield from pieces(name)
        if len(calls) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    return write(path, tensors, halfway)
conversion.write_tensors = dies
options, calibration = MoertConfig("int4", 32, ["model.layers.1"]), None
if len(sys.argv) > 4:
    calibration = Calibration(json.loads(sys.argv[4]))
    options = MoertConfig("sub1", calibrated=calibration.facts)
work = conversion.Conversion(Path(sys.argv[1]), Path(sys.argv[2]), options, calibration)
work.run(lambda title, nbytes: None)
"""


@pytest.mark.parametrize("at", [1, 3])
def test_goes_on_after_a_kill(at, tmp_path, monkeypatch):
    source, out, partial = floats("qwen3", tmp_path / "in"), tmp_path / "out", tmp_path / "out.partial"
    done = subprocess.run([sys.executable, "-c", KILLED, source, out, str(at)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists() and len(list(partial.glob("*.safetensors"))) == at - 1
    written, write = [], conversion_module.write_tensors
    monkeypatch.setattr(
        conversion_module, "write_tensors", lambda path, *a: written.append(path.name) or write(path, *a)
    )
    if at == 3:
        with pytest.raises(CommandError, match="out.partial must come from the same input and options: remove it"):
            convert(source, out, MoertConfig("int8"))
        damaged = partial / "model-00002-of-00003.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    told, before = [], []
    Conversion(source, out, OPTIONS).run(
        lambda title, nbytes: told.append(nbytes), lambda title, nbytes: before.append(nbytes)
    )
    assert len(before) == min(at, 2) - 1
    assert written == [f"model-{i:05}-of-00003.safetensors" for i in range(min(at, 2), 4)]
    assert sum(told) + sum(before) == Conversion(source, tmp_path / "never", OPTIONS).nbytes
    assert not partial.exists()
    convert(source, tmp_path / "fresh")
    assert {p.name: sha256(p) for p in out.iterdir()} == {p.name: sha256(p) for p in (tmp_path / "fresh").iterdir()}


def test_goes_on_calibrating_after_a_kill(tmp_path, monkeypatch):
    source, out, partial = floats("qwen3", tmp_path / "in"), tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-c", KILLED, source, out, "3", json.dumps(CALIBRATION.ids)]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    assert not out.exists() and len(list(partial.glob("*.safetensors"))) == 2
    other = Calibration(CALIBRATION.ids[1:])
    with pytest.raises(CommandError, match="out.partial must come from the same input and options: remove it"):
        convert(source, out, MoertConfig("sub1", calibrated=other.facts), other)
    work = Conversion(source, out, MoertConfig("sub1", calibrated=CALIBRATION.facts), CALIBRATION)
    told = []
    work.run(lambda title, nbytes: told.append(nbytes))
    assert sum(told) == work.work == work.nbytes
    assert [report.name for report in work.reports] == [f"model.layers.{i}.mlp.experts" for i in (1, 2)]
    convert(source, tmp_path / "fresh", MoertConfig("sub1", calibrated=CALIBRATION.facts), CALIBRATION)
    assert {p.name: sha256(p) for p in out.iterdir()} == {p.name: sha256(p) for p in (tmp_path / "fresh").iterdir()}


def test_a_text_that_the_model_cannot_read_leaves_no_result(tmp_path):
    source, wrong = floats("qwen3", tmp_path / "in"), Calibration([64] * 40)
    with pytest.raises(CommandError, match="model must run on the text layer by layer, got IndexError: index out of"):
        convert(source, tmp_path / "out", MoertConfig("int4", calibrated=wrong.facts), wrong)
    assert not (tmp_path / "out").exists()


MEASURED = """
import json, sys
from pathlib import Path
from moert.cli.calibration import Calibration
from moert.cli.conversion import Conversion
from moert.cli.machine import peak_bytes, reset_peak, resident_bytes
from moert.integrations.transformers import MoertConfig
from moert.quant import GPTQ
ids = json.loads(sys.argv[2])
calibration = Calibration(ids, GPTQ(memory=1)) if ids else None  # the Hessians of one expert
def convert(name):
    source, out = Path(sys.argv[1]) / name, Path(sys.argv[1]) / f"{name}.out"
    Conversion(source, out, MoertConfig("int4"), calibration).run(lambda *_: None)
convert("first")
for name in sys.argv[3:]:
    reset_peak()
    before = resident_bytes()
    convert(name)
    print(peak_bytes() - before)
"""


def large(kind, folder, E=16, H=512, layers=6):
    """A checkpoint of many layers with one tensor an expert (Qwen3) or one a layer (gpt-oss); a layer's bytes."""
    sizes = {"hidden_size": H, "intermediate_size": H, "moe_intermediate_size": H, "num_hidden_layers": layers}
    counts = {"num_experts": E} if kind == "qwen3" else {"num_local_experts": E}
    config = type(CONFIGS[kind])(num_experts_per_tok=2, **SIZES | sizes | counts)
    with torch.device("meta"):
        named = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    if kind == "qwen3":
        for name in [name for name in shapes if ".experts." in name]:
            parts = ["gate", "up"] if "gate_up" in name else ["down"]
            shape = shapes.pop(name)[1:]
            one = (shape[0] // len(parts), shape[1])
            prefix = name.rpartition(".")[0]
            shapes |= {f"{prefix}.{i}.{part}_proj.weight": one for i in range(E) for part in parts}
    config.save_pretrained(folder)
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return 3 * E * H * H * 2


def layers_at_the_peak(folder, ids, **layers):
    """Of converting each checkpoint, whose layers have so many bytes, in a process of its own.

    Above what the process held after two experts a layer of the same size: libraries keep what they multiply in.
    """
    large("qwen3", folder / "first", E=2, layers=2)
    command = [sys.executable, "-c", MEASURED, folder, json.dumps(ids), *layers]
    # One thread has one such buffer, and a tensor that is freed goes back to the system at once.
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | settings)
    assert done.returncode == 0, done.stderr
    return [peak / layer for layer, peak in zip(layers.values(), map(int, done.stdout.split()), strict=True)]


def test_memory_of_one_layer(tmp_path):
    layers = {kind: large(kind, tmp_path / kind) for kind in ("qwen3", "gpt_oss")}
    assert max(layers_at_the_peak(tmp_path, [], **layers)) < 1.2


def test_memory_of_two_layers_when_calibrated(tmp_path):
    """Experts in float, packed, and packed to be written."""
    layers = {"qwen3": large("qwen3", tmp_path / "qwen3", layers=3)}
    assert max(layers_at_the_peak(tmp_path, list(range(60)) * 2, **layers)) < 2.4


def absent(out):
    return not out.exists() and not out.with_name(f"{out.name}.partial").exists()


def test_what_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    source, out = floats("qwen3", tmp_path / "in"), tmp_path / "out"
    weights = source / "model.safetensors"
    (tmp_path / "there").mkdir()
    with pytest.raises(CommandError, match="OUT must not exist, got .*there"):
        convert(source, tmp_path / "there")
    with pytest.raises(CommandError, match="OUT must lie in a directory that exists, got .*nowhere/out"):
        convert(source, tmp_path / "nowhere/out")
    with pytest.raises(CommandError, match="model must be a local directory, got .*nothing"):
        convert(tmp_path / "nothing", out)
    with pytest.raises(CommandError, match="got 3 of them in Qwen3MoeForCausalLM"):
        convert(source, out, MoertConfig("int4", skip=["model"]))
    Usage = namedtuple("Usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 7))
        with pytest.raises(CommandError, match=r"the disk of OUT must have 0\.0\d+ GB free, got 0\.000 GB"):
            convert(source, out)
    assert absent(out)
    convert(source, out)
    with pytest.raises(CommandError, match=r"model must have float weights, got quantized ones \(moert\)"):
        convert(out, tmp_path / "again")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CommandError, match="model.safetensors must be a sound safetensors file"):
        convert(source, tmp_path / "again")
    assert absent(tmp_path / "again")


def test_a_folder_that_is_not_ours(tmp_path):
    source, partial = floats("qwen3", tmp_path / "in"), tmp_path / "out.partial"
    partial.mkdir()
    (partial / "letter.txt").write_text("keep")
    with pytest.raises(CommandError, match=f"out.partial must come from moert quantize, got no {RECORD} in it"):
        convert(source, tmp_path / "out")
    assert (partial / "letter.txt").read_text() == "keep"
    (partial / "letter.txt").unlink()
    opened = os.open(partial, os.O_RDONLY)
    fcntl.flock(opened, fcntl.LOCK_EX)
    with pytest.raises(CommandError, match="out.partial must not be another call's at work"):
        convert(source, tmp_path / "out")
    os.close(opened)
    convert(source, tmp_path / "out")
    assert not partial.exists()


def test_experts_that_are_broken(tmp_path):
    source = floats("qwen3", tmp_path / "in")
    tensors, name = load_file(source / "model.safetensors"), "model.layers.2.mlp.experts.3.up_proj.weight"
    save_file(tensors | {name: tensors[name][:-1]}, source / "model.safetensors")
    with pytest.raises(
        CommandError, match="model.layers.2.mlp.experts must be experts of this config: .*expert 3|Sizes"
    ):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tensors[name][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CommandError, match="nan"):
        convert(source, tmp_path / "other")


def test_every_file_is_on_the_disk_before_out_has_its_name(tmp_path, monkeypatch):
    source, synced = floats("qwen3", tmp_path / "in"), set()
    (source / "tokenizer.json").write_text("{}")
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.readlink(f"/proc/self/fd/{file}")) or sync(file))
    convert(source, tmp_path / "out")
    names = {os.path.basename(path).removesuffix(".unfinished") for path in synced}
    left = {path.name for path in (tmp_path / "out").iterdir()} - names
    assert not {name for name in left if name.removesuffix(".safetensors") not in names}
