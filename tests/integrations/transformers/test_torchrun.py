"""A model of transformers under a torchrun of its own beside one process of stock transformers; what it saves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from under_torchrun import IDS, LAYOUTS, use

from parallel import save
from stock import stock_logits

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With the checkpoint Qwen3Moe and in out/ what two ranks made of it."""
    folder = tmp_path_factory.mktemp("torchrun")
    save("Qwen3Moe", folder)
    (folder / "out").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"]
    command += [str(FOLDER / "under_torchrun.py"), str(folder / "Qwen3Moe"), str(folder / "out")]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def eager(checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")


def assert_near(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys() and torch.equal(got["tokens"], expected["tokens"])
    for name, value in expected.items():
        assert (got[name] - value).float().norm() <= 1e-5 * value.float().norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_one_process(folder, layout):
    expected = use(eager(folder / "Qwen3Moe"))
    step = expected["logits after a step"] - expected["logits"]
    assert step.norm() > 1e-3 * expected["logits"].norm()  # the step is more than what may be off
    for rank in range(2):
        assert_near(load_file(folder / "out" / f"{layout}, rank {rank}.safetensors"), expected)


def test_what_is_saved_is_a_plain_checkpoint(folder):
    saved = [folder / "out" / layout for layout in LAYOUTS]
    names, trained = load_file(folder / "Qwen3Moe" / "model.safetensors").keys(), use(eager(folder / "Qwen3Moe"))
    for checkpoint, logits in zip(saved, stock_logits(IDS, saved), strict=True):
        assert load_file(checkpoint / "model.safetensors").keys() == names
        expected = trained["logits after a step"]
        assert (logits - expected).norm() <= 1e-5 * expected.norm(), checkpoint
