"""`moert quantize --report`: a packed checkpoint beside the float one that it was made of, on a text.

Letters: T tokens, k choices per token.
"""

import functools
import math
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from moert.cli.checkpoint import load_model
from moert.cli.errors import CommandError
from moert.cli.machine import machine_facts
from moert.cli.perplexity import WINDOW, nats, windows
from moert.cli.report import write_json
from moert.cli.tensor_files import TensorFiles
from moert.integrations.transformers.quantized import PackedExperts, experts_modules


@dataclass
class Layer:
    """What was seen of one experts module: sums over the tokens of the text.

    error and output are squared norms, of what packing changes on the float model's own rows and of its output; same
    counts the tokens that both models send to the same k experts.
    """

    name: str
    format: str | None
    bits_per_weight: float | None
    error: float = 0.0
    output: float = 0.0
    tokens: int = 0
    same: int = 0

    def summary(self) -> dict:
        relative = math.sqrt(self.error / self.output) if self.format and self.output else None
        facts = {"name": self.name, "format": self.format, "bits_per_weight": self.bits_per_weight}
        return {**facts, "output_error": relative, "router_agreement": self.same / self.tokens if self.tokens else None}


def report(source: Path, target: Path, text: Path, ids: list[int], console: Console) -> dict:
    """Measures, prints the table, and writes report.json and report.png into target."""
    from transformers.utils.logging import disable_progress_bar

    from moert.cli.plots import plot_quantization

    disable_progress_bar()
    plain = load_model(source, "moert", "auto")
    packed = load_model(target, "moert", "auto")
    if plain.config.is_encoder_decoder:
        raise CommandError(f"report must be of a decoder, got {type(plain).__name__}")
    layers, perplexity = measure(plain, packed, ids)
    options = packed.config.quantization_config.to_dict()
    sizes = {"before": _tensor_bytes(source), "after": _tensor_bytes(target)}
    value = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {**machine_facts(), "threads": torch.get_num_threads()},
        "input": str(source),
        "output": str(target),
        "options": options,
        "dtype": str(plain.dtype).removeprefix("torch."),
        "text": {"path": str(text), "tokens": len(ids), "window": WINDOW},
        "bytes": sizes,
        "perplexity": perplexity,
        "layers": [layer.summary() for layer in layers],
    }
    _print(value, console)
    write_json(target / "report.json", value)
    plot_quantization(value, target / "report.png")
    console.print(f"Report: {target / 'report.json'}, {target / 'report.png'}", soft_wrap=True)
    return value


def measure(plain: nn.Module, packed: nn.Module, ids: list[int]) -> tuple[list[Layer], dict[str, float]]:
    """Both models on the same windows: every experts module, and the perplexities before and after."""
    watch = _Watch(plain, packed)
    before = after = count = 0
    try:
        for window in track(list(windows(ids, WINDOW)), "Measuring", console=Console(stderr=True)):
            total, number = nats(plain, window)
            before, count = before + total, count + number
            after += nats(packed, window)[0]
    finally:
        watch.remove()
    return list(watch.layers.values()), {"before": math.exp(before / count), "after": math.exp(after / count)}


class _Watch:
    """Hooks on the experts of both models, of which the float one runs first."""

    def __init__(self, plain: nn.Module, packed: nn.Module):
        self._packed = experts_modules(packed)
        self.layers = {name: _layer(name, self._packed[name]) for name in experts_modules(plain)}
        self._chosen: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        pairs = [(self._see_plain, experts_modules(plain)), (self._see_packed, self._packed)]
        self._hooks = [
            module.register_forward_hook(functools.partial(see, name), with_kwargs=True)
            for see, modules in pairs
            for name, module in modules.items()
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see_plain(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        rows = (*args, *kwargs.values())
        self._chosen[name].append(_as_sets(rows[1]))
        layer = self.layers[name]
        if layer.format:
            # forward, not a call: _see_packed is for what the packed model does by itself.
            layer.error += _squared(self._packed[name].forward(*rows).double() - output.double())
            layer.output += _squared(output.double())

    def _see_packed(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        before, after = self._chosen[name].pop(0), _as_sets((*args, *kwargs.values())[1])
        self.layers[name].tokens += len(before)
        self.layers[name].same += int((before == after).all(-1).sum())


def _layer(name: str, module: nn.Module) -> Layer:
    if not isinstance(module, PackedExperts):
        return Layer(name, None, None)
    weights = module.packed("w1"), module.packed("w2")
    bits = 8 * sum(w.nbytes for w in weights) / sum(w.shape.numel() for w in weights)
    return Layer(name, str(module.format), bits)


def _as_sets(ids: Tensor) -> Tensor:
    return ids.flatten(0, -2).sort(-1).values


def _squared(x: Tensor) -> float:
    return x.square().sum().item()


def _tensor_bytes(directory: Path) -> int:
    files = TensorFiles(directory)
    return files.nbytes(files.stored)


def _print(value: dict, console: Console) -> None:
    text, options = value["text"], value["options"]
    title = f"{options['format']} beside {value['dtype']}, {text['tokens']} tokens of {Path(text['path']).name}"
    table = Table(title=title, title_justify="left")
    table.add_column("experts")
    for heading in ("bits a weight", "output error", "same top-k"):
        table.add_column(heading, justify="right")
    for layer in value["layers"]:
        error, bits, agreement = layer["output_error"], layer["bits_per_weight"], layer["router_agreement"]
        table.add_row(
            layer["name"],
            "-" if bits is None else f"{bits:.2f}",
            "-" if error is None else f"{error:.4f}",
            "-" if agreement is None else f"{100 * agreement:.2f} %",
        )
    console.print(table)
    sizes, perplexity = value["bytes"], value["perplexity"]
    change = 100 * (perplexity["after"] / perplexity["before"] - 1)
    console.print(
        f"Size {decimal(sizes['before'])} → {decimal(sizes['after'])}; "
        f"perplexity {perplexity['before']:.4f} → {perplexity['after']:.4f} ({change:+.2f} %)"
    )
