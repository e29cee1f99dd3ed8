"""`moert run --shape`: layers of a large model's sizes with random weights, timed beside stock transformers."""

import tempfile
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console

from moert.cli.checkpoint import byte_tokenizer
from moert.cli.errors import CommandError
from moert.cli.generation import Request
from moert.cli.machine import machine_facts
from moert.cli.provider import PROVIDERS, Load, compare
from moert.cli.report import speed_table, waiting, weights_table, write_json

PREFILL_TOKENS = 512
ROUNDS = 3
# Class of the configuration, and its sizes; the vocabulary is bytes, so that the layers are what is timed.
SHAPES: dict[str, tuple[str, dict]] = {
    "qwen3-30b-a3b": ("Qwen3MoeConfig", {
        "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "norm_topk_prob": True,
    }),
    "olmoe-1b-7b": ("OlmoeConfig", {
        "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
        "num_attention_heads": 16, "num_key_value_heads": 16,
    }),
    "gpt-oss-20b": ("GptOssConfig", {
        "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    }),
    "mixtral-8x7b": ("MixtralConfig", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }),
}  # fmt: skip


def time_shape(shape: str, layers: int, load: Load, tokens: int, out: Path | None, console: Console) -> dict:
    """Prefill of PREFILL_TOKENS and decode of `tokens`, every provider in turns; the numbers, also for a report.

    load says all but the directory.
    """
    title = f"{layers} layer{'s' if layers > 1 else ''} of {shape}, random weights"
    title += ", on the GPU" if load.device == "cuda" else ""
    with tempfile.TemporaryDirectory() as folder:
        save_shape(shape, layers, Path(folder))
        text = Request("x" * 16, tokens)
        prefill = replace(text, prompt="".join(map(chr, range(32, 127))) * 6, max_new_tokens=1)
        prefill = replace(prefill, prompt=prefill.prompt[:PREFILL_TOKENS])
        load = replace(load, directory=Path(folder), random=True)
        with waiting(console, f"{title}: {', '.join((*PROVIDERS, *load.packed))} …") as tell:
            rows = compare(load, text, prefill, ROUNDS, tell=tell).rows
    for row in rows.values():
        row["milliseconds_per_layer"] = {
            "prefill": 1e3 * PREFILL_TOKENS / row["prefill_tokens_per_second"] / layers,
            "decode": row["milliseconds_per_token"]["p50"] / layers if row["milliseconds_per_token"] else None,
        }
    console.print(speed_table(rows, f"{title}, {load.dtype}, attention included"))
    if load.packings:
        console.print(weights_table(rows, "Weights"))
    console.print("Milliseconds a layer: " + "; ".join(map(_per_layer, rows.items())))
    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {**machine_facts(device=load.device), "threads": load.threads},
        "shape": shape,
        "layers": layers,
        "dtype": load.dtype,
        "providers": rows,
    }
    if out:
        write_json(out / "report.json", report)
        console.print(f"Report: {out / 'report.json'}")
    return report


def save_shape(shape: str, layers: int, directory: Path) -> None:
    """The configuration and a tokenizer of bytes, as a checkpoint without weights."""
    import transformers

    if shape not in SHAPES:
        raise CommandError(f"shape must be one of {', '.join(SHAPES)}, got {shape}")
    name, sizes = SHAPES[shape]
    config = getattr(transformers, name)(**sizes, num_hidden_layers=layers, vocab_size=256, pad_token_id=0)
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def _per_layer(row: tuple[str, dict]) -> str:
    name, times = row[0], row[1]["milliseconds_per_layer"]
    decode = "-" if times["decode"] is None else f"{times['decode']:.2f}"
    return f"{name} prefill {times['prefill']:.1f}, decode {decode}"
