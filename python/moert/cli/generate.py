"""`moert run --model DIR`: text from any local Hugging Face MoE checkpoint, and the speed beside stock transformers."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moert.cli.checkpoint import check_files, class_of, has_interface, load_config, packed_by_moert, skeleton
from moert.cli.generation import Generation, Request, first_difference, summarize
from moert.cli.machine import machine_facts
from moert.cli.packing import rounding
from moert.cli.perplexity import TEXT_TOKENS, WINDOW, tokens_of, windows
from moert.cli.provider import STOCK, Load, Provider
from moert.cli.report import sameness, speed_table, waiting, weights_table, write_json

PREFILLS = 3  # whose median is the speed; that of decoding is the median over tokens


def generate(
    load: Load, request: Request, out: Path | None, stock: bool, console: Console, text: Path | None = None
) -> None:
    """The text as moert generates it; with packings or `stock` also the comparison, one model in memory at a time.

    text: a file on which the perplexity of every provider is measured.
    """
    check_files(load.directory)
    ids = list(_windows(load.directory, text)) if text else None
    stock_ways = _stock(load.directory) if stock else ()
    plain = ("moert", *stock_ways)
    names = (*plain, *load.packed)
    results: dict[str, Generation] = {}
    prefills: dict[str, list[Generation]] = {}
    weights: dict[str, dict] = {}
    for name in names:
        with Provider(name, load) as provider:
            results[name] = _generate(provider, request, console)
            with waiting(console, f"Reading the prompt again with {name} …"):
                once = replace(request, max_new_tokens=1)
                prefills[name] = [results[name], *(provider.generate(once) for _ in range(PREFILLS - 1))]
            weights[name] = {"weight_bytes": provider.weight_bytes}
            dtype = provider.dtype
            if ids:
                with waiting(console, f"Perplexity with {name} …"):
                    weights[name]["perplexity"] = provider.perplexity(ids)
    rows = {name: {**summarize(prefills[name], [made]), **weights[name]} for name, made in results.items()}
    moert = results["moert"]
    differences = [d for name in plain[1:] if (d := first_difference(moert, results[name], name))]
    if stock and not stock_ways:
        console.print("moert alone: stock transformers does not run experts that moert has packed.")
    elif stock:
        console.print(sameness(differences, len(moert.ids), plain))
    title = f"{load.directory.name}, {dtype}, a process each"
    console.print(speed_table(rows, title + (", on the GPU" if load.device == "cuda" else "")))
    if load.packings or text:
        console.print(weights_table(rows, f"Weights{f', and perplexity on {text.name}' if text else ''}"))
    if load.packings:
        console.print(rounding(load.packings))
    if out:
        report = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {**machine_facts(device=load.device), "threads": load.threads},
            "model": str(load.directory),
            "generation": {
                "request": asdict(request),
                "dtype": dtype,
                "same_tokens": not differences,
                "differences": [asdict(d) for d in differences],
                "texts": {name: generation.text for name, generation in results.items()},
                "ids": {name: generation.ids for name, generation in results.items()},
            },
            "providers": rows,
        }
        write_json(out / "report.json", report)
        console.print(f"Report: {out / 'report.json'}")


def _stock(directory: Path) -> tuple[str, ...]:
    """The ways in which stock transformers runs this model: one, where its experts cannot be chosen by name; none of
    packed experts.
    """
    config = load_config(directory)
    if packed_by_moert(config):
        return ()
    return STOCK if has_interface(skeleton(config, class_of(config))) else STOCK[:1]


def _windows(directory: Path, text: Path) -> Iterator[list[int]]:
    for batch in windows(tokens_of(directory, text, TEXT_TOKENS), WINDOW):
        yield from batch.tolist()


def _generate(provider: Provider, request: Request, console: Console) -> Generation:
    with waiting(console, f"Loading for {provider.experts} …"):
        provider.wait()
        provider.generate(replace(request, max_new_tokens=2))  # the first call pays for what later ones reuse
    if provider.experts != "moert":
        with waiting(console, f"Generating with {provider.experts} …"):
            return provider.generate(request)
    console.print(Text(request.prompt, style="dim"), end="")
    generation = provider.generate(
        replace(request, trace=True, stream=True), lambda piece: console.print(Text(piece), end="", soft_wrap=True)
    )
    console.print()
    return generation
