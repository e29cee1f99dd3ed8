"""`moert quantize`: a float checkpoint to a packed one, about one layer's experts in memory at a time."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import progress
from rich.console import Console
from rich.filesize import decimal

from moert.cli.errors import CommandError, check_directory, first_line
from moert.cli.packing import NAMES
from moert.quant.format import RowFormat
from moert.quant.quantize import any_format_of, check_options
from moert.quant.sub1 import SubOneBit

_BITS = {"bit_nested": " (4 bits)", "bit_nested_5_4": " (8 bits)"}
_NAMED = [name + _BITS.get(name, "") for name in NAMES]


def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Local Hugging Face MoE checkpoint (safetensors).")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Directory; must not exist, but for --report.")],
    format: Annotated[str, typer.Option(help=f"{', '.join(_NAMED[:-1])} or {_NAMED[-1]}.")] = "int4",
    group: Annotated[int | None, typer.Option(help="Columns that share a scale; default: the format's own.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Module that stays float, e.g. 'model.layers.0'; * and ? as in file names.")
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="Rows of the products: auto, full, bfloat16, int8, int8_group32, int8_group160, fp8_group128, "
            "or int8_weights."
        ),
    ] = "auto",
    calibrate: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="Choose codes by GPTQ on this text, layer by layer.")
    ] = None,
    calibrate_tokens: Annotated[
        int | None, typer.Option(min=2, help="How much of its text --calibrate takes; default 65536 tokens.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="TEXT", help="Compare OUT with IN on this text; both have to fit in memory.")
    ] = None,
    report_tokens: Annotated[
        int | None, typer.Option(min=2, help="How much of its text --report takes; default 16384 tokens.")
    ] = None,
) -> None:
    """Pack the experts of a checkpoint; from_pretrained loads OUT once moert.integrations.transformers is imported.

    A call that was cut off can be repeated."""
    for name, text, tokens in (("calibrate", calibrate, calibrate_tokens), ("report", report, report_tokens)):
        if text is None and tokens is not None:
            raise CommandError(f"{name}-tokens must be left out without --{name}")
    _check_format(format, group, skip or (), precision, calibrate is not None)
    check_directory(source)
    try:  # takes seconds, which wrong options need not wait for
        import matplotlib  # noqa: F401  for the report's picture

        from moert.integrations.transformers import MoertConfig
    except ImportError as error:
        raise CommandError(
            f"needs transformers, safetensors and matplotlib: pip install 'moert[cli]' ({error})"
        ) from error
    options = MoertConfig(format, group, skip, precision)
    calibration = _calibration(source, options, calibrate, calibrate_tokens)
    if report is None:
        _convert(source, target, options, calibration)
        return
    from moert.cli import quantize_report
    from moert.cli.perplexity import TEXT_TOKENS, tokens_of

    ids = tokens_of(source, report, report_tokens or TEXT_TOKENS)
    if target.exists():
        _check_made_with(source, target, options)
    else:
        _convert(source, target, options, calibration)
    quantize_report.report(source, target, report, ids, Console(highlight=False))


def _check_format(format: str, group: int | None, skip: Sequence[str], precision: str, calibrated: bool) -> None:
    try:
        fmt = any_format_of(format, group)
        check_options(skip, precision, [fmt])
    except ValueError as error:
        raise CommandError(first_line(error)) from error
    if calibrated and not isinstance(fmt, RowFormat | SubOneBit):
        raise CommandError(f"calibrate must be left out for {format}, which is rounded to nearest")


def _calibration(source: Path, options, text: Path | None, tokens: int | None):
    if text is None:
        if options.format == SubOneBit.spelling:
            told = "sub1 without --calibrate TEXT rounds to nearest; by data its outputs err less than half as much"
            typer.echo(told, err=True)
        return None
    from moert.cli.calibration import Calibration

    calibration = Calibration.of(source, text, tokens)
    options.calibrated = calibration.facts
    return calibration


def _convert(source: Path, target: Path, options, calibration) -> None:
    from moert.cli.conversion import Conversion

    conversion = Conversion(source, target, options, calibration)
    try:
        with _bar() as bar, warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".* experts of .* had fewer than min_rows", UserWarning)  # said below
            task = bar.add_task("", total=conversion.work)
            conversion.run(*_tellers(bar, task))
    except KeyboardInterrupt:
        if not conversion.partial.exists():
            raise
        raise KeyboardInterrupt(f"the same call goes on from {conversion.partial}") from None
    except OSError as error:
        raise CommandError(f"OUT must be writable: {first_line(error)}") from error
    after = sum(part.nbytes for part in conversion.parts)
    typer.echo(
        f"{target}: {decimal(after)} of tensors ({decimal(conversion.nbytes)} before), "
        f"{conversion.bits_per_weight:.2f} bits a packed weight"
    )
    if rounded := sum(len(report.rounded) for report in conversion.reports):
        count = sum(len(report.rows) for report in conversion.reports)
        least = calibration.settings.min_rows
        few = f"saw fewer than {least} rows of the text and were rounded to nearest"
        typer.echo(f"{rounded} of {count} experts packed by this call {few}")


def _check_made_with(source: Path, target: Path, options) -> None:
    """A report needs no second conversion, if OUT is what this one would make."""
    from moert.cli.checkpoint import check_files, read_json
    from moert.cli.tensor_files import TensorFiles

    check_files(target)
    made_with = read_json(target / "config.json").get("quantization_config")
    made_of = made_with.pop("made_of", None) if isinstance(made_with, dict) else None
    if isinstance(made_with, dict):
        made_with.pop("experts", None)  # sizes, that came out
    if made_with != options.to_dict():
        raise CommandError(f"OUT must not exist or be packed with the same options, got {made_with}")
    check_files(source)
    if made_of != (wanted := TensorFiles(source).fingerprint()):
        raise CommandError(f"OUT must not exist or be packed from IN, whose fingerprint is {wanted}, got {made_of}")


def _tellers(bar: progress.Progress, task: progress.TaskID) -> tuple[Callable, Callable]:
    """What tells the bar of bytes that are done, and of those that were before: these say nothing about the rate."""

    def advance(title: str, nbytes: int) -> None:
        bar.update(task, description=title, advance=nbytes)

    def taken(title: str, nbytes: int) -> None:
        (state,) = (each for each in bar.tasks if each.id == task)
        bar.reset(task, description=title, completed=int(state.completed) + nbytes)

    return advance, taken


def _bar() -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
