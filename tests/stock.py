"""What anybody does with a checkpoint: transformers loads it in a process that has neither moert nor a group."""

import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

PROGRAM = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, *checkpoints = sys.argv[1:]
logits = {}
for checkpoint in checkpoints:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        logits[checkpoint] = model(**load_file(folder + "/ids"), use_cache=False).logits
save_file(logits, folder + "/logits")
assert "moert" not in sys.modules
"""


def stock_logits(ids: Tensor, checkpoints: list[Path]) -> list[Tensor]:
    """Of ids [B, S], by each checkpoint: [B, S, vocabulary]."""
    paths = [str(checkpoint) for checkpoint in checkpoints]
    with tempfile.TemporaryDirectory() as folder:
        save_file({"input_ids": ids}, Path(folder, "ids"))
        subprocess.run([sys.executable, "-c", PROGRAM, folder, *paths], check=True, timeout=200)
        logits = load_file(Path(folder, "logits"))
    return [logits[path] for path in paths]
