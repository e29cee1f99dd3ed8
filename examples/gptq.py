"""Perplexity of the model that `moert run` trains, its experts in few bits: rounded, and calibrated by GPTQ.

    python examples/gptq.py runs/demo/model

Calibration is text of the training files, the perplexity that of held-out files.  Prints a table in Markdown.
"""

import argparse
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import exp
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import moert
from moert.cli.corpus import evenly_spaced, load_corpus
from moert.cli.demo_train import evaluate
from moert.integrations.transformers.quantized import experts_modules
from moert.quant import GPTQ, Int4, Int8, Mxfp4, SubOneBit, Ternary2

FORMATS = (Int8(), Int4(32), Int4(128), Mxfp4(), Ternary2(32), Ternary2(128), Ternary2(), SubOneBit())


@dataclass(frozen=True)
class Row:
    """One line of the table; calibrated and seconds are None for the model as it is."""

    name: str
    bits: float
    rounded: float
    calibrated: float | None = None
    seconds: float | None = None
    few: int = 0

    def markdown(self, base: float) -> str:
        def cell(perplexity):
            return "" if perplexity is None else f"{perplexity:.3f} ({100 * (perplexity / base - 1):+.2f} %)"

        seconds = "" if self.seconds is None else f"{self.seconds:.0f}"
        perplexities = f"{cell(self.rounded)} | {cell(self.calibrated)}"
        return f"| {self.name} | {self.bits:.2f} | {perplexities} | {seconds} | {self.few} |"


def rows(directory: Path, formats, windows: torch.Tensor, heldout: torch.Tensor, settings: GPTQ) -> Iterator[Row]:
    """The float model's line, then one for each format."""
    yield Row("float32", 32.0, perplexity(load(directory), heldout))
    for fmt in formats:
        model = load(directory)
        moert.quantize_(model, fmt)
        rounded = perplexity(model, heldout)
        model, started = load(directory), time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experts with few rows are a column of the table
            names = moert.quantize_(model, fmt, calibration=windows.split(8), method=settings)
        seconds = time.monotonic() - started
        few = sum(len(layer.rounded) for layer in names.layers)
        bits = bits_per_weight(model)  # that of the sub-1-bit code depends on the choices
        yield Row(f"`{fmt}`", bits, rounded, perplexity(model, heldout), seconds, few)


def load(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="moert").eval()


def perplexity(model, windows: torch.Tensor) -> float:
    return exp(evaluate(model, windows)[0])


def bits_per_weight(model) -> float:
    """Of the experts, scales and padding included."""
    weights = [w for module in experts_modules(model).values() for w in module.packed_pair()]
    return 8 * sum(w.nbytes for w in weights) / sum(w.shape.numel() for w in weights)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="what `moert run` trained: runs/demo/model")
    parser.add_argument("--windows", type=int, default=256, help="windows of 256 bytes to calibrate on")
    parser.add_argument("--threads", type=int)
    for field in fields(GPTQ):
        kind = (lambda text: text == "True") if field.type in (bool, "bool") else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = GPTQ(**{field.name: getattr(options, field.name) for field in fields(GPTQ)})
    corpus = load_corpus()
    windows, heldout = evenly_spaced(corpus.train, 256, options.windows), evenly_spaced(corpus.heldout, 256, 128)
    print(f"{settings}, {windows.numel():,} bytes of calibration, {heldout.numel():,} held out")
    print("| experts | bits a weight | rounded | GPTQ | seconds | experts with too few rows |")
    print("| --- | --- | --- | --- | --- | --- |")
    base = None
    for row in rows(options.model, FORMATS, windows, heldout, settings):
        base = base or row.rounded
        print(row.markdown(base), flush=True)


if __name__ == "__main__":
    main()
