"""`moert info`: what this moert is, what it runs on, and what is missing."""

import json
from typing import Annotated

import typer

from moert.cli.errors import CommandError, first_line


def info(as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False) -> None:
    """Print version, build, CPU, the kernel of each operator, CUDA, and what is missing."""
    import moert

    try:
        facts = moert.info()
    except RuntimeError as error:  # MOERT_ISA names what there is not
        raise CommandError(first_line(error)) from error
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(lines(facts)))


def lines(facts: dict) -> list[str]:
    """The facts as `name  value` lines."""
    build, cpu, threads = facts["build"], facts["cpu"], facts["threads"]
    absent = [name for name, there in cpu["features"].items() if not there]
    rows = [
        ("moert", f"{facts['version']} (Python {facts['python']}, torch {facts['torch']})"),
        ("build", f"{build['compiler']}, {build['build_type']}, {build['threads']}"),
        ("kernels", "; ".join(f"{stem}: generic {' '.join(isas)}" for stem, isas in build["kernels"].items())),
        ("sanitizers", build["sanitize"] or "none"),
        ("CPU features", " ".join(name for name, there in cpu["features"].items() if there) or "none that moert uses"),
        ("CPU lacks", " ".join(absent) or "nothing that moert uses"),
        ("ISA", f"{cpu['isa']} (best here: {cpu['best_isa']}; MOERT_ISA forces a lower one)"),
        ("threads", f"{threads['torch']} of {threads['cpus']} CPUs"),
        ("OpenMP", " ".join(threads["runtimes"]) or "none loaded"),
        *((f"{name} (CPU)", kernel["cpu"]) for name, kernel in facts["operators"].items()),
        *(("quantized rows", f'{_rows(facts, f)} (precision="auto")') for f in facts["quantized_precision"]),
        ("CUDA archs", " ".join(facts["cuda"]["archs"]) or "none"),
        ("torch's CUDA", facts["cuda"]["torch"] or "none"),
        ("GPU", facts["cuda"]["gpu"] or "none"),
        *(("missing", text) for text in facts["missing"]),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {value}" for name, value in rows]


def _rows(facts: dict, fmt: str) -> str:
    many = facts["bfloat16_from_rows"].get(fmt)
    return f"{fmt}: {facts['quantized_precision'][fmt]}" + (f", bfloat16 from {many} rows an expert" if many else "")
