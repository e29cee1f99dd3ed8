"""The processes that generate, seen from the command: one per way of running the experts."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moert.cli.errors import CommandError, first_line
from moert.cli.generation import Generation, Request

STOCK = ("eager", "grouped_mm")
PROVIDERS = (*STOCK, "moert")


@dataclass(frozen=True)
class Load:
    """What every provider loads, and how; random: the directory has a configuration and no weights."""

    directory: Path
    dtype: str = "auto"
    threads: int | None = None
    random: bool = False


class Provider:
    """A process that has loaded the model and answers requests one after another; a context manager."""

    def __init__(self, experts: str, load: Load):
        self.experts = experts
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in __exit__
        command = [sys.executable, "-m", "moert.cli.measure", "--model", str(load.directory)]
        command += ["--experts", experts, "--dtype", load.dtype]
        command += ["--threads", str(load.threads)] if load.threads else []
        command += ["--random"] if load.random else []
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
        self._ready = True
        return answer["ready"]

    def generate(self, request: Request, on_text: Callable[[str], None] | None = None) -> Generation:
        if not self._ready:
            self.wait()
        try:
            self._process.stdin.write(json.dumps(asdict(request)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are in stdout or stderr
        while "text" in (answer := self._answer()) and "ids" not in answer:
            if on_text:
                on_text(answer["text"])
        return Generation(**answer)

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


def compare(load: Load, text: Request, prefill: Request, rounds: int) -> tuple[dict, dict[str, list], dict[str, list]]:
    """All providers side by side: the traced text of each, then prefills and decodes in interleaved rounds."""
    with ExitStack() as stack:
        providers = [stack.enter_context(Provider(name, load)) for name in PROVIDERS]
        for provider in providers:
            provider.wait()
        texts = {p.experts: p.generate(replace(text, trace=True)) for p in providers}
        prefills: dict[str, list] = {name: [] for name in PROVIDERS}
        decodes: dict[str, list] = {name: [] for name in PROVIDERS}
        for i in range(rounds):
            # Another one goes first in each round: whoever follows finds a warmer or a busier machine.
            for provider in providers[i % 3 :] + providers[: i % 3]:
                prefills[provider.experts].append(provider.generate(prefill))
                decodes[provider.experts].append(provider.generate(text))
    return texts, prefills, decodes
