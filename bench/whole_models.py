"""A random Qwen3-MoE of 108 M parameters in every format, beside transformers and llama.cpp; `--help` says the options.

Every row is a process that has loaded its model from a checkpoint, or a GGUF file, of its format; they take turns, and
one computes at a time.  A turn reads a prompt and generates greedily after a short one, batch 1: transformers' generate
around transformers' and moert's experts, llama_decode and the largest logit in llama.cpp (an environment that `make
bench-peers` makes; left out where there is none).  What is not experts stays bfloat16 in all files but that of F16.
Before anything is timed the logits of llama.cpp and of float experts must be those of the same numbers in float32.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.utils.logging import disable_progress_bar

from layers import Family
from moert.cli.checkpoint import load_model
from moert.cli.packing import ALL
from record import ROOT, bench_facts, path_of, save, say
from whole_models_rows import PAIRS, Row, show

PACKINGS = ("int8:32", *ALL)  # int8:32 has the bits of Q8_0
STOCK = ("eager", "grouped_mm")
LLAMA = ROOT / "build" / "peers" / "ggml" / "bin" / "python"
SIZES = {
    "hidden_size": 512, "num_hidden_layers": 8, "moe_intermediate_size": 256, "num_experts": 32,
    "num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048,
}  # fmt: skip
TINY = SIZES | {"hidden_size": 256, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
SHORT = 16  # tokens before those that are generated
CHECKED = 64  # tokens whose logits are compared
# Rounding to bfloat16 between operators leaves 0.01; gate and up swapped in every expert are off by 0.2.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Source:
    """What a process of the family loads for its row; reference: the row's own numbers in float32, or None."""

    name: str
    family: str
    spec: dict
    reference: np.ndarray | None = None


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    console = Console(width=150)
    facts = bench_facts(**{name: getattr(options, name) for name in ("threads", "turns", "prompt", "tokens")})
    sizes = TINY if options.smoke else SIZES
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, Progress(console=console) as progress:
        model = random_model(sizes)
        ids = (torch.arange(max(options.prompt, CHECKED)) * 37 % sizes["vocab_size"]).tolist()
        reference = logits(model, ids)
        running = []
        made = sources(model, reference, ids, Path(folder), names(options))
        for source in progress.track(made, total=len(names(options)), description="made and loaded"):
            rows.append(Row(source.name))
            if family := started(source, rows[-1], options.threads, stack):
                check(family, source, rows[-1], reference, ids, Path(folder))
                running.append((family, rows[-1]))
        take_turns(running, ids, options, progress)
    show(rows, options.prompt, title(model, options), console)
    if not LLAMA.exists():
        console.print("llama.cpp: no environment (make bench-peers)")
    if not options.smoke:
        out = options.out or path_of("usual", ".whole_models.json", facts)
        save(out, {"machine": facts, "model": sizes, "rows": [asdict(row) for row in rows]})
        say(out, rows, console)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is timed")
    parser.add_argument("--tokens", type=int, default=64, help="that are generated")
    parser.add_argument("--rows", nargs="+", help="these alone, as the table names them")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one turn, three formats, writes nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not 0 < options.prompt <= 512:
        sys.exit(f"prompt must be in [1, 512], got {options.prompt}")  # one batch of llama.cpp's
    if unknown := sorted(set(options.rows or ()) - set(names(argparse.Namespace(rows=None, smoke=options.smoke)))):
        sys.exit(f"rows must be of the table, got {', '.join(unknown)}")
    if options.smoke:
        options.turns, options.prompt, options.tokens = 1, 8, 3
    return options


def names(options: argparse.Namespace) -> list[str]:
    """Of the rows, in the order in which they are made."""
    packings = ("int8:32", "int4:32") if options.smoke else PACKINGS
    kinds = ("llama.cpp BF16", "llama.cpp Q4_0") if options.smoke else tuple(PAIRS)
    moert = ("moert bfloat16", *(f"moert {packing}" for packing in packings))
    every = [*(f"transformers {way}" for way in STOCK), *moert, *(kinds if LLAMA.exists() else ())]
    return [name for name in every if not options.rows or name in options.rows]


def random_model(sizes: dict) -> nn.Module:
    """In float32, of numbers that bfloat16 has."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**sizes, norm_topk_prob=True, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():  # not .bfloat16(), which would round the frequencies of rotary positions too
        weight.data = weight.data.bfloat16().float()
    return model


def logits(model: nn.Module, ids: list[int]) -> np.ndarray:
    """[CHECKED - SHORT + 1, vocabulary], as the workers give them."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids[:CHECKED]])).logits[0, SHORT - 1 :].numpy()


def sources(
    model: nn.Module, reference: np.ndarray, ids: list[int], folder: Path, wanted: list[str]
) -> Iterator[Source]:
    """Writes the checkpoint or the file of each row when its turn comes; the model's experts end as others."""
    spec = {"path": str(folder / "bfloat16"), "dtype": "bfloat16"}
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    copy.deepcopy(model).bfloat16().save_pretrained(spec["path"])
    for name in wanted:
        runtime, _, kind = name.partition(" ")
        if runtime == "transformers":
            yield Source(name, "moert", spec | {"experts": kind}, reference)
        elif kind == "bfloat16":
            yield Source(name, "moert", spec | {"experts": "moert"}, reference)
        elif runtime == "moert":
            path = str(folder / kind.replace(":", "-"))
            load_model(Path(spec["path"]), "moert", "bfloat16", packing=kind).save_pretrained(path)
            yield Source(name, "moert", {"path": path, "dtype": "bfloat16", "experts": "moert"})
        else:
            from gguf_models import write_gguf

            model.load_state_dict(state)
            path = folder / f"{kind}.gguf"
            with torch.inference_mode():
                write_gguf(model, kind, path)
            yield Source(name, "llama", {"path": str(path)}, logits(model, ids))


def started(source: Source, row: Row, threads: int, stack: ExitStack) -> Family | None:
    """The process, once its model is loaded; the row says why there is none."""
    python = LLAMA if source.family == "llama" else Path(sys.executable)
    family = Family(source.family, python, threads, False, "model_worker.py")
    stack.callback(family.close)
    try:
        answer = family.ask(load=source.spec)
    except RuntimeError as died:
        answer = {"error": str(died)}
    row.missing = answer.get("error")
    row.weight_bytes = answer.get("weight_bytes", 0)
    return None if row.missing else family


def check(family: Family, source: Source, row: Row, reference: np.ndarray, ids: list[int], folder: Path) -> None:
    """The errors of the logits; what computes another model ends the bench."""
    path = folder / "logits.npy"
    asked(family, row, logits=[ids[:CHECKED], SHORT], path=str(path))
    output = np.load(path)
    row.error = error(output, reference)
    if source.reference is not None:
        row.own_error = error(output, source.reference)
        if not row.own_error < TOLERANCE:
            sys.exit(f"{row.name} must compute the same model, got logits that are off by {row.own_error:.2g}")


def error(output: np.ndarray, reference: np.ndarray) -> float:
    """Relative, the median over the tokens: one whose router had a tie may go elsewhere."""
    off = np.linalg.norm(output - reference, axis=1) / np.linalg.norm(reference, axis=1)
    return float(np.median(off))


def take_turns(
    running: list[tuple[Family, Row]], ids: list[int], options: argparse.Namespace, progress: Progress
) -> None:
    """All in every turn, and another one first in each; the turn before the first is not kept."""
    task = progress.add_task("turns", total=(options.turns + 1) * len(running))
    for turn in range(options.turns + 1):
        first = turn % max(1, len(running))
        for family, row in running[first:] + running[:first]:
            sample = one_turn(family, row, ids, options)
            if turn:
                for name, value in sample.items():
                    getattr(row, name).append(value)
            progress.advance(task)
    for family, row in running:
        taken = asked(family, row, memory=[])
        row.peak_bytes, row.held_bytes = taken["peak"], taken["held"]


def one_turn(family: Family, row: Row, ids: list[int], options: argparse.Namespace) -> dict:
    """Seconds of the prompt, of a token and, in transformers, of its parts."""
    generated = [ids[:SHORT], options.tokens]
    sample = {"prefill": asked(family, row, prefill=[ids[: options.prompt]])["seconds"]}
    sample["decode"] = statistics.median(asked(family, row, decode=generated)["seconds"])
    if family.name == "moert":
        sample["parts"] = asked(family, row, parts=generated)
    return sample


def asked(family: Family, row: Row, **request) -> dict:
    answer = family.ask(**request)
    if "error" in answer:
        sys.exit(f"{row.name} must run once it is loaded, got {answer['error']}")
    return answer


def title(model: nn.Module, options: argparse.Namespace) -> str:
    millions = 1e-6 * sum(weight.numel() for weight in model.parameters())
    threads = f"{options.threads} thread{'s' if options.threads > 1 else ''}"
    return f"{millions:.0f} M random parameters, batch 1, {options.turns} turns, medians, {threads}"


if __name__ == "__main__":
    main()
