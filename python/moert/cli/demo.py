"""`moert run` without a model: trains one (or takes the one trained before), generates with it, compares, reports."""

import json
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from moert.cli.checkpoint import byte_tokenizer, check_files
from moert.cli.corpus import Corpus, evenly_spaced, load_corpus
from moert.cli.errors import CommandError
from moert.cli.generation import Request, first_difference
from moert.cli.machine import machine_facts, where
from moert.cli.packing import rounding
from moert.cli.provider import PROVIDERS, Load, compare
from moert.cli.report import (
    sameness,
    speed_table,
    training_table,
    waiting,
    weights_table,
    write_atomically,
    write_json,
)

PROMPT = "class Reader:\n    def __init__(self, "
MARGIN = 0.2  # nats per byte below the bigram model: less, and the model has learned little but pairs
ROUNDS = 3
PREFILL_BYTES = 512
STEPS = 2  # of training in a round
WINDOWS = 128  # of held-out text, those of the loss that training reports
_RECORD = "training.json"


def demo(settings, request: Request, out: Path, load: Load, retrain: bool, console: Console) -> None:
    """Everything `moert run` does; `settings` are demo_train's, load is of out / "model"."""
    import torch

    started = time.monotonic()
    if load.threads:
        torch.set_num_threads(load.threads)
    corpus = load_corpus()
    record = None if retrain else _read_record(out / "model", settings, load.device)
    if record is None:
        if not retrain and (out / "model" / _RECORD).exists():
            console.print(
                "Training again: the checkpoint is broken, was cut short, or had other settings or another device."
            )
        record = _train(settings, corpus, out, console, started, load.device)
    else:
        console.print(f"Using the checkpoint trained before, {out / 'model'} (--retrain trains it again).")
    verdict = _print_loss(record, console)
    prefill = Request(_ascii(corpus, PREFILL_BYTES), 1)
    windows = evenly_spaced(corpus.heldout, settings.sequence, WINDOWS).tolist() if load.packings else None
    with waiting(console, f"Generating and training with {', '.join((*PROVIDERS, *load.packed))} …") as tell:
        compared = compare(load, request, prefill, ROUNDS, windows, _batches(settings, corpus), tell)
    texts, rows = compared.texts, compared.rows
    differences = [d for name in PROVIDERS[1:] if (d := first_difference(texts["eager"], texts[name], name))]
    console.print(Panel(Text(request.prompt, style="dim").append(texts["moert"].text, style="default"),
                        title="moert, greedy" if request.temperature == 0 else "moert, sampled"))  # fmt: skip
    console.print(sameness(differences, len(texts["eager"].ids), PROVIDERS))
    console.print(speed_table(rows, _table_title(compared.dtype, where(load.device, torch.get_num_threads()))))
    title = f"Training, steps of {settings.batch * settings.sequence:,} tokens, as many rounds, {compared.dtype}"
    console.print(training_table(rows, title))
    if load.packings:
        tokens = WINDOWS * (settings.sequence - 1)
        console.print(weights_table(rows, f"Weights, and perplexity on {tokens:,} held-out bytes, {compared.dtype}"))
        console.print(rounding(load.packings))
    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {**machine_facts(device=load.device), "threads": torch.get_num_threads()},
        "training": {**record, "margin": verdict},
        "generation": {
            "request": asdict(request),
            "dtype": compared.dtype,
            "same_tokens": not differences,
            "differences": [asdict(d) for d in differences],
            "smallest_gap": min(texts["eager"].gaps, default=None),
            "texts": {name: generation.text for name, generation in texts.items()},
            "ids": {name: generation.ids for name, generation in texts.items()},
        },
        "providers": rows,
        "files": ["loss.png", "expert_load.png", "model"],
    }
    _write_report(report, record, out)
    console.print(
        f"Report: {out / 'report.json'} with loss.png and expert_load.png ({time.monotonic() - started:.0f} s in all)"
    )


def _train(settings, corpus: Corpus, out: Path, console: Console, started: float, device: str) -> dict:
    from moert.cli.demo_train import Step, train

    model_dir = out / "model"
    if model_dir.exists() and not (model_dir / _RECORD).exists():
        raise CommandError(f"out must not hold a model that `moert run` did not train, got {model_dir}")
    console.print(
        f"Training a Qwen3-MoE of {settings.layers} layers with {settings.experts} experts, top-{settings.top_k}, on "
        f"{len(corpus.train) / 1e6:.1f} MB of the standard library's source ({sum(corpus.files)} files, "
        f"{corpus.files[1]} of them held out), experts by {settings.implementation}."
    )
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(bar_width=8),
        TextColumn("loss {task.fields[loss]:.2f} · {task.fields[speed]:,.0f} tokens/s · {task.fields[load]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=settings.steps, loss=float("nan"), speed=0, load="")

        def on_step(step: Step) -> None:
            relative = step.load.float() / step.load.float().mean(1, keepdim=True)
            idle = int((step.load == 0).sum())
            text = f"experts ×{relative.max():.1f}, {idle} idle"
            progress.update(task, completed=step.step, loss=step.loss, speed=step.tokens_per_second, load=text)

        model, record = train(settings, corpus, on_step, started, device)
    value = {**asdict(record), "heldout_loss": record.heldout_loss}

    def save(directory: Path) -> None:
        model.save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
        (directory / _RECORD).write_text(json.dumps(value) + "\n")

    write_atomically(model_dir, save)
    done = len(record.losses)
    cut = ""
    if done < settings.steps:
        cut = f" (the time allowed, {settings.seconds:.0f} s, ended it at step {done}; on busy cores try --threads 1)"
    console.print(
        f"Trained {record.parameters / 1e6:.1f} M parameters ({record.active_parameters / 1e6:.1f} M active per token) "
        f"on {done * settings.batch * settings.sequence:,} bytes in {record.seconds:.0f} s{cut}; saved to {model_dir}."
    )
    return value


def _read_record(model_dir: Path, settings, device: str = "cpu") -> dict | None:
    """The record of the checkpoint, if there is a sound one, trained with these settings, there and to their end.

    One that a busy machine cut short is trained again, unless it is good all the same.
    """
    try:
        check_files(model_dir)
        record = json.loads((model_dir / _RECORD).read_text())
        whole = len(record["losses"]) == settings.steps or _margin(record) >= MARGIN
        same = record["settings"] == asdict(settings) and record.get("device", "cpu") == device
        return record if whole and same else None
    except (CommandError, OSError, ValueError, KeyError, TypeError):
        return None


def _print_loss(record: dict, console: Console) -> float:
    margin = _margin(record)
    reached = margin >= MARGIN
    console.print(
        f"Held-out loss {record['heldout_loss']:.3f} nats/byte, bigram model {record['bigram_loss']:.3f}: "
        f"{abs(margin):.3f} {'below' if margin >= 0 else 'above'} it"
        + ("." if reached else f". A model trained to the end is {MARGIN} below or better; this one was not."),
        style=None if reached else "yellow",
    )
    return margin


def _margin(record: dict) -> float:
    """Nats per byte that the model is below the bigram model."""
    return record["bigram_loss"] - record["heldout_loss"]


def _batches(settings, corpus: Corpus) -> list[list[list[int]]]:
    """Windows of text for the steps of a round."""
    import torch

    from moert.cli.demo_train import random_windows

    generator = torch.Generator().manual_seed(settings.seed)
    return [random_windows(corpus.train, settings, generator).tolist() for _ in range(STEPS)]


def _ascii(corpus: Corpus, length: int) -> str:
    """Held-out text of `length` tokens: one byte each."""
    text = bytes(corpus.heldout[: 4 * length].tolist()).decode("ascii", errors="ignore").replace("\0", "\n")
    return text[:length]


def _table_title(dtype: str, where: str) -> str:
    return f"Medians of {ROUNDS} interleaved rounds, a process each, {dtype}, {where}"


def _write_report(report: dict, record: dict, out: Path) -> None:
    from moert.cli.plots import plot_expert_load, plot_loss

    plot_loss(record, out / "loss.png")
    plot_expert_load(record, out / "expert_load.png")
    write_json(out / "report.json", report)
