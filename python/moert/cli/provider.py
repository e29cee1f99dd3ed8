"""The processes that generate, seen from the command: one per way of running the experts."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path

from moert.cli.errors import CommandError, first_line
from moert.cli.generation import Generation, Request, milliseconds, summarize

STOCK = ("eager", "grouped_mm")
PROVIDERS = (*STOCK, "moert")


@dataclass(frozen=True)
class Load:
    """What every provider loads, and how; random: the directory has a configuration and no weights.

    packings are formats (packing.py) in which moert's experts run as well.
    """

    directory: Path
    dtype: str = "auto"
    threads: int | None = None
    random: bool = False
    packings: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def packed(self) -> tuple[str, ...]:
        """The providers of the packings."""
        return tuple(map(packed_name, self.packings))


def packed_name(packing: str) -> str:
    """The provider of a float checkpoint whose experts are packed while it loads (packing.py)."""
    return f"moert {packing}"


class Provider:
    """A process that has loaded the model and answers requests one after another; a context manager.

    weight_bytes, of parameters and buffers of the loaded model, and its dtype are known after wait.
    """

    def __init__(self, name: str, load: Load):
        self.experts = name
        self.weight_bytes, self.dtype = 0, load.dtype
        experts, _, packing = name.partition(" ")
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in __exit__
        command = [sys.executable, "-m", "moert.cli.measure", "--model", str(load.directory)]
        command += ["--experts", experts, "--dtype", load.dtype, "--device", load.device]
        command += ["--threads", str(load.threads)] if load.threads else []
        command += ["--random"] if load.random else []
        command += ["--packing", packing] if packing else []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self._ready = False

    def __enter__(self) -> "Provider":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def wait(self) -> str:
        """The class of the model, once it is loaded."""
        answer = self._answer()
        self._ready, self.weight_bytes, self.dtype = True, answer["weight_bytes"], answer["dtype"]
        return answer["ready"]

    def generate(self, request: Request, on_text: Callable[[str], None] | None = None) -> Generation:
        self._ask(asdict(request))
        while "text" in (answer := self._answer()) and "ids" not in answer:
            if on_text:
                on_text(answer["text"])
        return Generation(**answer)

    def perplexity(self, windows: list[list[int]]) -> float:
        """Of every token but the first of each window."""
        self._ask({"windows": windows})
        return self._answer()["perplexity"]

    def train(self, batches: list[list[list[int]]]) -> list[float]:
        """Seconds of a training step of each batch of windows; the weights stay as they are."""
        self._ask({"batches": batches})
        return self._answer()["seconds"]

    def _ask(self, question: dict) -> None:
        if not self._ready:
            self.wait()
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are in stdout or stderr

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise CommandError(self._epitaph())
        answer = json.loads(line)
        if "error" in answer:
            raise CommandError(answer["error"])
        return answer

    def _epitaph(self) -> str:
        code = self._process.wait()
        if code < 0:
            reason = signal.Signals(-code).name
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"the {self.experts} process must finish, got {reason}{hint}"
        self._stderr.seek(0)
        lines = self._stderr.read().strip().splitlines()
        return f"the {self.experts} process must finish, got: {first_line(Exception(lines[-1] if lines else code))}"


@dataclass(frozen=True)
class Comparison:
    """What every provider did, by its name: the traced text, prefills and decodes of the rounds, and what it weighs.

    steps: seconds of training steps of step_tokens, of the providers whose experts are floats.
    """

    texts: dict[str, Generation]
    prefills: dict[str, list[Generation]]
    decodes: dict[str, list[Generation]]
    weight_bytes: dict[str, int]
    perplexities: dict[str, float]
    dtype: str
    steps: dict[str, list[float]] = field(default_factory=dict)
    step_tokens: int = 0

    @property
    def rows(self) -> dict[str, dict]:
        """summarize's numbers, and those of the weights."""
        return {
            name: {**summarize(self.prefills[name], self.decodes[name]), "weight_bytes": self.weight_bytes[name]}
            | ({"perplexity": self.perplexities[name]} if self.perplexities else {})
            | ({"training": self._training(name)} if name in self.steps else {})
            for name in self.texts
        }

    def _training(self, name: str) -> dict:
        times = milliseconds(self.steps[name])
        return {"tokens_per_second": 1e3 * self.step_tokens / times["p50"], "milliseconds_per_step": times}


def compare(
    load: Load,
    text: Request,
    prefill: Request,
    rounds: int,
    windows: list[list[int]] | None = None,
    batches: list[list[list[int]]] | None = None,
    tell: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """All providers side by side: texts, prefills and decodes in interleaved rounds, perplexities of the windows, and
    training steps of the batches, in as many rounds of their own, so that their memory is not a generation's.

    tell hears of every step before it begins: its number of all, and who does what.
    """
    names = (*PROVIDERS, *load.packed)
    trained = PROVIDERS if batches else ()
    steps = count(1)
    total = len(names) * (2 + rounds + bool(windows)) + len(trained) * rounds

    def each(providers: Iterable[Provider], what: str) -> Iterator[Provider]:
        for provider in providers:
            tell(f"{next(steps)}/{total} {provider.experts}: {what}")
            yield provider

    with ExitStack() as stack:
        providers = [stack.enter_context(Provider(name, load)) for name in names]
        for provider in each(providers, "loading"):
            provider.wait()
        texts = {p.experts: p.generate(replace(text, trace=True)) for p in each(providers, "text")}
        prefills: dict[str, list] = {name: [] for name in names}
        decodes: dict[str, list] = {name: [] for name in names}
        for provider in each(turns(providers, rounds), "prefill and decoding"):
            prefills[provider.experts].append(provider.generate(prefill))
            decodes[provider.experts].append(provider.generate(text))
        weights = {p.experts: p.weight_bytes for p in providers}
        perplexities = {p.experts: p.perplexity(windows) for p in each(providers, "perplexity")} if windows else {}
        seconds: dict[str, list[float]] = {}
        for provider in each(turns(providers[: len(trained)], rounds if batches else 0), "training"):
            seconds.setdefault(provider.experts, []).extend(provider.train(batches))
    tokens = sum(map(len, batches[0])) if batches else 0
    return Comparison(texts, prefills, decodes, weights, perplexities, providers[0].dtype, seconds, tokens)


def turns(providers: list[Provider], rounds: int) -> Iterator[Provider]:
    """All of them in every round, and another one first in each: whoever follows finds a warmer or a busier machine."""
    for i in range(rounds):
        first = i % len(providers)
        yield from providers[first:] + providers[:first]
