"""examples/train_ep.py under torchrun: a worker that is killed, and a later call on another number of ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

FAULTS = {"PYTHONFAULTHANDLER": "1"}
SCRIPT = Path(__file__).parents[2] / "examples" / "train_ep.py"


@contextmanager
def torchrun(out: Path, ranks: int, steps: int) -> Iterator[subprocess.Popen]:
    """A run that prints into OUT.log, none of whose processes outlives the block."""
    # The address is named because torchrun waits without end for a worker that cannot resolve the machine's name.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--max-restarts", "3"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"]
    command += [str(SCRIPT), str(out), "--steps", str(steps), "--save-every", "2", "--batch", "4"]
    with (
        open(out.with_suffix(".log"), "w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | FAULTS) as run,
    ):
        try:
            yield run
        finally:
            if run.poll() is None:
                for process in [*psutil.Process(run.pid).children(recursive=True), run]:
                    process.kill()


def printed(run: subprocess.Popen, out: Path) -> str:
    """All that a run printed, which must come to a good end; where it does not, also what its workers were at."""
    try:
        run.wait(120)
    except subprocess.TimeoutExpired:
        for worker in psutil.Process(run.pid).children(recursive=True):
            worker.send_signal(signal.SIGABRT)
        time.sleep(2)
    text = out.with_suffix(".log").read_text()
    assert run.returncode == 0, text
    return text


def losses(text: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"saved step (\d+), loss ([\d.]+)", text)}


def whole(out: Path, ranks: int, steps: int) -> str:
    with torchrun(out, ranks, steps) as run:
        return printed(run, out)


def killed_after_a_save(out: Path, steps: int) -> str:
    """A run of two ranks, the second of which is killed once a checkpoint is there."""
    with torchrun(out, 2, steps) as run:
        deadline = time.monotonic() + 120
        while not (out / "latest").exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (out / "latest").exists(), out.with_suffix(".log").read_text()
        workers = [p for p in psutil.Process(run.pid).children(recursive=True) if str(SCRIPT) in p.cmdline()]
        victim = next(p for p in workers if p.environ().get("RANK") == "1")
        os.kill(victim.pid, signal.SIGKILL)
        return printed(run, out)


def test_a_batch_that_cannot_be_shared_evenly(tmp_path):
    call = [sys.executable, str(SCRIPT), str(tmp_path), "--batch", "8"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=100, env=os.environ | {"WORLD_SIZE": "3"})
    assert done.returncode == 2 and done.stderr.endswith("--batch must be a multiple of the 3 ranks, got 8\n")


def test_it_goes_on_after_a_kill_and_on_one_rank(tmp_path):
    expected = losses(whole(tmp_path / "alone", 1, 12))
    assert list(expected) == [2, 4, 6, 8, 10, 12] and expected[12] < expected[2]
    text = killed_after_a_save(tmp_path / "killed", 10)
    before, resumed, _ = re.split(r"goes on after step (\d+)", text)
    # What was printed as saved is not made again; the kill may come before the first such line.
    assert int(resumed) >= max(losses(before), default=2)
    got = losses(text)
    assert 10 in got and min(losses(text[len(before) :]), default=12) > int(resumed)
    later = whole(tmp_path / "killed", 1, 12)
    assert "goes on after step 10" in later
    got |= losses(later)
    assert all(abs(expected[step] - loss) < 1e-3 for step, loss in got.items()), (got, expected)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["latest", "step-12"]
