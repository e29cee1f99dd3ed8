"""`moert run`: the demonstration without a model, generation with one."""

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moert.cli.errors import CommandError, check_directory, check_writable
from moert.cli.packing import NAMES, packings


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


# What each kind of run has beside --max-new-tokens, --threads, --device, --dtype, --quantize and --out.
_SAMPLING = {"prompt", "temperature", "top_p", "top_k", "seed"}
_OWN = {
    "model": {"model", "compare", "text", *_SAMPLING},
    "shape": {"shape", "layers"},
    "": {"steps", "retrain", *_SAMPLING},
}

_PACKED = f"Also with packed experts, e.g. int4:128; all: {', '.join(NAMES)}."


def run(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Option(help="Local Hugging Face MoE checkpoint (safetensors) to generate with.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; needed with --model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy, more is sampling.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from this much probability.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this many tokens.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads; default: torch's choice.")] = None,
    device: Annotated[Device, typer.Option(help="Where models train and run.")] = Device.cpu,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Arithmetic of generation; auto: the checkpoint's; bfloat16 with --shape or --quantize."),
    ] = Dtype.auto,
    quantize: Annotated[
        list[str] | None,
        typer.Option(metavar="FORMAT[:GROUP]", help=_PACKED),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="With --model: also the perplexity on this file.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the report; without --model runs/demo.", show_default=False)
    ] = None,
    compare: Annotated[bool, typer.Option(help="With --model: also run stock eager and grouped_mm.")] = True,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default 600.")] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train again although there is a checkpoint.")] = False,
    shape: Annotated[
        str | None, typer.Option(help="Time a model of this shape with random weights, e.g. qwen3-30b-a3b.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of --shape's model.")] = 2,
) -> None:
    """Train a small MoE language model on the standard library's source, generate with it and report;
    with --model, generate with any local Hugging Face MoE checkpoint; with --shape, time the layers of a large one.
    """
    # Imported when used: transformers takes seconds, which wrong options and --help need not wait for.
    from moert.cli.generation import Request
    from moert.cli.provider import Load

    _check_options(context)
    console, formats = Console(highlight=False), tuple(packings(quantize or []))
    if dtype is Dtype.auto and (formats or shape is not None):
        dtype = Dtype.bfloat16
    request = Request(prompt, max_new_tokens, temperature, top_p, top_k, seed)
    load = Load(model or Path(), dtype.value, threads, packings=formats, device=device.value)
    if model is not None:
        from moert.cli.generate import generate

        generate(load, request, out, compare, console, text)
        return
    _needs_extras()
    if shape is not None:
        from moert.cli.shape import time_shape

        time_shape(shape, layers, load, min(max_new_tokens, 32), out, console)
        return
    _demo(request, load, out or Path("runs/demo"), steps, retrain, console)


def _demo(request, load, out: Path, steps: int | None, retrain: bool, console: Console) -> None:
    from moert.cli.demo import PROMPT, demo
    from moert.cli.demo_train import DemoSettings

    settings = DemoSettings() if steps is None else DemoSettings(steps=steps)
    request = request if request.prompt is not None else replace(request, prompt=PROMPT)
    demo(settings, request, out, replace(load, directory=out / "model"), retrain, console)


def _check_options(context: typer.Context) -> None:
    """Before anything is loaded: options that this kind of run does not have, a model that is not there, a report that
    cannot be written."""
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
    kind = "model" if "model" in given else "shape" if "shape" in given else ""
    for name in sorted(given & set.union(*_OWN.values()) - _OWN[kind]):
        where = f"with --{kind}" if kind else "without --model" if name == "compare" else "without --shape"
        raise CommandError(f"{name.replace('_', '-')} must be left out {where}")
    if context.params["model"] is not None:
        check_directory(context.params["model"])
    _check_prompt(context.params)
    _check_device(context.params["device"].value)
    if context.params["out"] is not None:
        check_writable(context.params["out"])


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    from moert import cuda

    if not torch.cuda.is_available():
        raise CommandError("device must be cpu where torch can use no GPU, got cuda")
    if not cuda.is_built():
        raise CommandError(f"device must be cpu here, got cuda: {cuda.how()}")


def _check_prompt(given: dict) -> None:
    prompt = given["prompt"]
    if given["temperature"] == 0 and (given["top_p"] is not None or given["top_k"] is not None):
        raise CommandError("temperature must be above 0 with top-p or top-k, got 0 (greedy)")
    if given["top_p"] == 0:
        raise CommandError("top-p must be in (0, 1], got 0")
    if given["model"] is not None and prompt is None:
        raise CommandError("prompt must be given with model, got none")
    if any(
        0xD800 <= ord(character) < 0xE000 for character in prompt or ""
    ):  # Python's stand-ins for bytes that are none
        raise CommandError("prompt must be UTF-8, got bytes that are not")


def _needs_extras() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("transformers", "safetensors", "matplotlib") if find_spec(name) is None]
    if missing:
        raise CommandError(f"needs {', '.join(missing)}: pip install 'moert[cli]'")
