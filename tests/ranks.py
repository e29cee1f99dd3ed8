"""Runs a function on several processes that are joined by Gloo, as the ranks of one job."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist


def ranks(n: int, function: Callable, *args, timeout: float = 150, may_end: tuple[int, ...] = ()) -> list:
    """What function(*args) returns in each of n processes, in the order of their ranks.

    The function must be found by import, and what goes in and comes out must not be tensors.  An error of a rank is
    raised here with its traceback; ranks that are silent after `timeout` seconds are named.  No process outlives the
    call.  Ranks in may_end may stop or end without a result, and are not waited for: theirs is None.
    A function that only asserts gives [None] * n, which its test compares: every rank came to the function's end.
    """
    # A process that has imported these, and nothing else, is forked for each rank: importing torch takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moert.parallel", "moert.integrations.transformers"])
    with tempfile.TemporaryDirectory() as folder:
        processes, readers = [], []
        try:
            for rank in range(n):
                reader, writer = context.Pipe(duplex=False)
                job = (rank, n, f"file://{folder}/store", timeout, writer, function, args)
                processes.append(context.Process(target=_run, args=job, daemon=True))
                processes[-1].start()
                writer.close()  # so that the end of the process is the end of the pipe
                readers.append(reader)
            results = _collect(readers, timeout, may_end)
            for rank, process in enumerate(processes):
                process.join(0 if rank in may_end else 10)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def error_of(call: Callable, *args) -> str:
    """The text of the error that call(*args) raises; empty where it raises none."""
    try:
        call(*args)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return ""


def _collect(readers: list[Connection], timeout: float, may_end: tuple[int, ...]) -> list:
    results, deadline = dict.fromkeys(may_end), time.monotonic() + timeout
    while len(results) < len(readers):
        waiting = {reader: rank for rank, reader in enumerate(readers) if rank not in results}
        ready = wait(waiting, max(0, deadline - time.monotonic()))
        if not ready:
            silent = ", ".join(map(str, waiting.values()))
            raise TimeoutError(f"every rank must finish within {timeout:g} s, got nothing from {silent}")
        errors = []
        for reader in ready:
            try:
                error, results[waiting[reader]] = reader.recv()
            except EOFError:
                error = "ended without a result"
            if error:
                errors.append(f"rank {waiting[reader]} of {len(readers)}: {error}")
        # The others fail because one did: what comes first is the cause.
        if errors:
            raise RuntimeError("\n".join(errors))
    return [results[rank] for rank in range(len(readers))]


def _run(rank: int, n: int, store: str, timeout: float, writer: Connection, function: Callable, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    try:
        # Ends a rank whose parent was killed; later than the collector, which is to be the first to miss one.
        limit = timedelta(seconds=timeout + 30)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=n, timeout=limit)
        message = None, function(*args)
    except Exception:
        message = traceback.format_exc(), None
    writer.send(message)
    if dist.is_initialized():
        dist.destroy_process_group()
