"""`moert run --model DIR`: text from any local Hugging Face MoE checkpoint, and the speed beside stock transformers."""

from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moert.cli.checkpoint import check_files
from moert.cli.generation import Generation, Request, first_difference, summarize
from moert.cli.machine import machine_facts
from moert.cli.provider import STOCK, Load, Provider
from moert.cli.report import sameness, speed_table, write_json


def generate(load: Load, request: Request, out: Path | None, stock: bool, console: Console) -> None:
    """The text as moert generates it; with `stock` also the comparison, one model in memory at a time."""
    check_files(load.directory)
    names = ("moert", *STOCK) if stock else ("moert",)
    results: dict[str, Generation] = {}
    for name in names:
        with Provider(name, load) as provider:
            results[name] = _generate(provider, request, console)
    rows = {name: summarize([generation], [generation]) for name, generation in results.items()}
    moert = results["moert"]
    differences = [d for name in names[1:] if (d := first_difference(moert, results[name], name))]
    if stock:
        console.print(sameness(differences, len(moert.ids), names))
    console.print(speed_table(rows, f"{load.directory.name}, {load.dtype}, a process each"))
    if out:
        report = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {**machine_facts(), "threads": load.threads},
            "model": str(load.directory),
            "generation": {
                "request": asdict(request),
                "dtype": load.dtype,
                "same_tokens": not differences,
                "differences": [asdict(d) for d in differences],
                "texts": {name: generation.text for name, generation in results.items()},
                "ids": {name: generation.ids for name, generation in results.items()},
            },
            "providers": rows,
        }
        write_json(out / "report.json", report)
        console.print(f"Report: {out / 'report.json'}")


def _generate(provider: Provider, request: Request, console: Console) -> Generation:
    with console.status(f"Loading for {provider.experts} …"):
        provider.wait()
        provider.generate(replace(request, max_new_tokens=2))  # the first call pays for what later ones reuse
    if provider.experts != "moert":
        with console.status(f"Generating with {provider.experts} …"):
            return provider.generate(request)
    console.print(Text(request.prompt, style="dim"), end="")
    generation = provider.generate(
        replace(request, trace=True, stream=True), lambda piece: console.print(Text(piece), end="", soft_wrap=True)
    )
    console.print()
    return generation
