"""examples/train_ep.py under torchrun: workers that are killed, another number of ranks, what it writes, its bar."""

import functools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM

from moert.cli.demo_train import DemoSettings
from moert.parallel import load_checkpoint
from stock import stock_logits

ENVIRONMENT = {"PYTHONFAULTHANDLER": "1", "FORCE_COLOR": ""}  # with rich's colours lines would not be found
SCRIPT = Path(__file__).parents[2] / "examples" / "train_ep.py"
BEGINS = r"^(?:goes on after step (\d+)|begins)$"


@contextmanager
def torchrun(out: Path, ranks: int, steps: int, *options: str, **environment: str) -> Iterator[subprocess.Popen]:
    """A run that saves every step and prints into OUT.log, none of whose processes outlives the block."""
    # The address is named because torchrun waits without end for a worker that cannot resolve the machine's name.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *options]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"]
    command += [str(SCRIPT), str(out), "--steps", str(steps), "--save-every", "1", "--batch", "2"]
    environment = os.environ | ENVIRONMENT | environment
    with (
        open(out.with_suffix(".log"), "w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as run,
    ):
        try:
            yield run
        finally:
            if run.poll() is None:
                for process in [*psutil.Process(run.pid).children(recursive=True), run]:
                    with suppress(psutil.Error):  # a worker that has just ended
                        process.kill()


def printed(run: subprocess.Popen, out: Path, steps: int) -> str:
    """All that a run printed, which must come to a good end; where it does not, also what its workers were at."""
    try:
        run.wait(100 + 5 * steps)
    except subprocess.TimeoutExpired:
        for worker in psutil.Process(run.pid).children(recursive=True):
            worker.send_signal(signal.SIGABRT)
        time.sleep(2)
    text = log_of(out)
    assert run.returncode == 0, text
    return text


def log_of(out: Path) -> str:
    return out.with_suffix(".log").read_text()


def losses(text: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"^saved step (\d+), loss ([\d.]+)$", text, re.M)}


def starts(text: str) -> list[tuple[int, dict[int, str]]]:
    """After which step each start went on, and what it saved; without those that ended before they said so."""
    _, *parts = re.split(BEGINS, text, flags=re.M)
    return [(int(after or 0), losses(part)) for after, part in zip(parts[::2], parts[1::2], strict=True)]


def whole(out: Path, ranks: int, steps: int) -> str:
    with torchrun(out, ranks, steps) as run:
        return printed(run, out, steps)


class Killer:
    """Kills a worker of each start but the last, at a point that chance says."""

    def __init__(self, run: subprocess.Popen, out: Path, seed: int):
        self.run, self.out, self.chance = run, out, random.Random(seed)
        self.number, self.time_to_begin = 0, 0.0

    def kill_one(self, where: str) -> None:
        workers = self._until(self._workers, "two workers")
        before, seen = self._begun(), time.monotonic()
        if where == "as it starts":
            # The last start may have taken longer than this one will.
            end = seen + self.chance.uniform(0, self.time_to_begin)
            self._until(lambda: time.monotonic() >= end or self._begun() > before, "a start")
        else:
            self._until(lambda: self._begun() > before, "a start")
            self.time_to_begin = time.monotonic() - seen
            {"as it trains": self._as_it_trains, "as it saves": self._as_it_saves}[where]()
        try:
            self.chance.choice(workers).kill()
        except psutil.NoSuchProcess:  # it has ended: another start, if there is one
            self.kill_one(where)
            return
        psutil.wait_procs(workers, timeout=60)  # torchrun ends the other
        self.number += 1

    def _begun(self) -> int:
        return len(re.findall(BEGINS, log_of(self.out), re.M))

    def _as_it_trains(self) -> None:
        """Between a step that is saved and one or two later."""
        steps, begun = self.chance.randint(1, 3), time.monotonic()
        self._until(lambda: len(starts(log_of(self.out))[-1][1]) >= steps, f"{steps} steps")
        time.sleep(self.chance.uniform(0, 1) * (time.monotonic() - begun) / steps)

    def _as_it_saves(self) -> None:
        # It is soon written: who misses one waits for the next step's.
        self._until(self._unfinished, "a checkpoint that is being written", pause=0.001)
        time.sleep(self.chance.uniform(0, 0.02))

    def _unfinished(self) -> list[str]:
        """Folders with files, but not yet the one that is written last."""
        with suppress(FileNotFoundError):  # of a step that is no longer kept
            written = {f.path: os.listdir(f.path) for f in os.scandir(self.out) if f.name.startswith("step-")}
            return [
                path for path, names in written.items()
                if ".metadata" not in names and any(name.endswith(".distcp") for name in names)
            ]  # fmt: skip
        return []

    def _workers(self) -> list[psutil.Process]:
        found = []
        with suppress(psutil.Error):  # the run has ended
            for process in psutil.Process(self.run.pid).children():
                with suppress(psutil.Error):
                    if process.environ().get("TORCHELASTIC_RESTART_COUNT") == str(self.number):
                        found.append(process)
        return found if len(found) == 2 else []

    def _until(self, true: Callable, what: str, pause: float = 0.005):
        deadline = time.monotonic() + 120
        while not (got := true()):
            late = self.run.poll() is not None or time.monotonic() > deadline
            assert not late, f"no {what} in start {self.number}: {log_of(self.out)}"
            time.sleep(pause)
        return got


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[int], tuple[str, Path]]:
    """What two ranks print and write that nobody disturbs."""

    @functools.cache
    def run(steps: int) -> tuple[str, Path]:
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        return whole(out, 2, steps), out

    return run


def killed(out: Path, steps: int, kills: int, seed: int) -> str:
    where = ["as it trains", "as it saves", "as it starts"]
    with torchrun(out, 2, steps, "--max-restarts", str(kills)) as run:
        killer = Killer(run, out, seed)
        for number in range(kills):
            killer.kill_one(where[number % 3])
        return printed(run, out, steps)


SLOW = pytest.mark.slow, pytest.mark.timeout(1800)


@pytest.mark.parametrize("kills,seed", [(3, 0), *(pytest.param(10, seed, marks=SLOW) for seed in range(1, 6))])
def test_workers_are_killed(tmp_path, undisturbed, kills, seed):
    # A start that trains makes five steps at most before it is killed, one that saves or begins one or two.
    out, steps = tmp_path / "killed", 4 * kills + 3
    expected = losses(undisturbed(steps)[0])
    assert list(expected) == [*range(1, steps + 1)] and float(expected[steps]) < float(expected[1])
    text = killed(out, steps, kills, seed)
    last = 0
    for after, saved in starts(text):
        # What was printed as saved is not made again; a kill may come between the save and its line.
        assert after in (last, last + 1), text
        assert list(saved) == [*range(after + 1, after + 1 + len(saved))], text
        assert saved == {step: expected[step] for step in saved}
        last = max(saved, default=after)
    assert last == steps and sorted(p.name for p in out.iterdir()) == ["latest", "model", f"step-{steps}", "untrained"]
    (after, saved), *none = starts(whole(out, 1, steps + 2))  # on another number of ranks
    assert not none and after == steps and [*saved] == [steps + 1, steps + 2]


def test_one_process_makes_a_plain_checkpoint_of_a_spread_one(tmp_path, undisturbed):
    """As the ranks themselves do after the last step, bit for bit; stock transformers loads it."""
    _, out = undisturbed(15)
    model = Qwen3MoeForCausalLM(DemoSettings().config())
    model.set_experts_implementation("moert")
    load_checkpoint(out / "step-15", model)
    model.save_pretrained(tmp_path / "plain")
    plain, written, untrained = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", out / "model", out / "untrained")
    )
    # What is tied transformers writes once, but of a spread model under both names.
    assert torch.equal(written.pop("lm_head.weight"), written["model.embed_tokens.weight"])
    assert plain.keys() == written.keys() == untrained.keys()
    for name, weight in plain.items():
        assert torch.equal(weight, written[name]) and not torch.equal(weight, untrained[name]), name
    ids = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    for logits in stock_logits(ids, [tmp_path / "plain", out / "model"]):
        assert (logits - expected).norm() <= 1e-5 * expected.norm()


def test_its_bar_is_on_the_first_rank_alone(tmp_path):
    out, logs = tmp_path / "out", tmp_path / "logs"
    redirected = "--redirects", "3", "--log-dir", str(logs)
    with torchrun(out, 2, 2, *redirected, FORCE_COLOR="1") as run:  # as if each rank had a terminal of its own
        printed(run, out, 2)
    first, second = (b"".join(p.read_bytes() for p in logs.glob(f"*/attempt_0/{rank}/std*.log")) for rank in "01")
    assert all(b"\r\x1b[2Kstep %d/2 " % step in first for step in (1, 2)), first  # drawn anew where it stands
    assert b"saved step 2, loss" in re.sub(rb"\x1b\[[\d;]*m", b"", first) and second == b""


def test_a_batch_that_cannot_be_shared_evenly(tmp_path):
    call = [sys.executable, str(SCRIPT), str(tmp_path), "--batch", "8"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=100, env=os.environ | {"WORLD_SIZE": "3"})
    assert done.returncode == 2 and done.stderr.endswith("--batch must be a multiple of the 3 ranks, got 8\n")
