"""Jobs in forked processes, which keep what cannot be pickled: the variants of an experiment are closures."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any

import torch

Work = Callable[[Any, Callable[[Any], None]], None]  # (job, send)


def spread(work: Work, jobs: Iterable[Any], processes: int) -> Iterator[tuple[Any, Any]]:
    """(job, message) for every message that work(job, send) sends, as they come; so many jobs at a time.

    A process has one thread: OpenMP's do not survive a fork, and a core each is the better use of the cores.
    """
    context, waiting, running = multiprocessing.get_context("fork"), list(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_alone, args=(work, waiting[0], sender.send))
                process.start()
                sender.close()  # the process has its own: it ends with the process
                running[receiver] = waiting.pop(0), process
            for receiver in wait(list(running)):
                job, process = running[receiver]
                try:
                    yield job, receiver.recv()
                except EOFError:
                    process.join()
                    del running[receiver]
                    if process.exitcode != 0:
                        raise RuntimeError(f"{job} ended with exit code {process.exitcode}, see above") from None
    finally:
        for _, process in running.values():
            process.terminate()


def _alone(work: Work, job: Any, send: Callable[[Any], None]) -> None:
    torch.set_num_threads(1)
    work(job, send)
