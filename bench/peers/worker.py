"""One family of peers in a process and an environment of its own: `worker.py FAMILY THREADS`, driven by layers.py.

Reads one JSON object a line and answers with one: {"load": problem} -> {"providers": [names], "missing": {name: why}}
and, of moert, "weight_bytes": of all experts as they are stored,
{"time": name, "seconds": s} -> {"times": [...]}, {"save": name, "path": file} -> {"saved": file},
{"memory": name} -> {"bytes": what one call takes beyond what was there before it; null where Linux does not say},
{"limits": seconds} -> {"limits": {name: median seconds}} of moert's process.  A call that raises is answered with
{"error": why}, and the others go on.
"""

import ctypes
import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from problem import ROUTINGS, Problem, forget


class Worker:
    def __init__(self, family: str, threads: int):
        self.family, self.threads, self.turn = family, threads, 0
        self.providers: dict = {}
        self.weights: Problem | None = None

    def load(self, problem: dict) -> dict:
        self.providers, problem = {}, Problem(**problem)
        if problem.of_weights() != self.weights:  # those of the one before go first
            forget()
        self.weights = problem.of_weights()
        try:
            module = importlib.import_module(f"peer_{self.family}")
            found = module.providers(problem, self.threads)
            self.providers = {name: call for name, call in found.items() if callable(call)}
            missing = {name: why for name, why in found.items() if not callable(why)}
            answer = {"providers": list(self.providers), "missing": missing}
            return answer | ({"weight_bytes": module.weight_bytes(problem)} if hasattr(module, "weight_bytes") else {})
        except Exception as error:  # whatever keeps a peer from running is what there is to report of it
            forget()  # others may need the memory
            return {"providers": [], "missing": {self.family: said(error)}}

    def time(self, name: str, seconds: float) -> dict:
        """Times of single calls, at least one, for about that long; each call takes the next routing."""
        call, times, end = self.providers[name], [], time.perf_counter() + seconds
        while not times or time.perf_counter() + min(times) < end:
            self.turn = (self.turn + 1) % ROUTINGS
            start = time.perf_counter()
            call(self.turn)
            times.append(time.perf_counter() - start)
        return {"times": times}

    def memory(self, name: str) -> dict:
        """The peak of a call over what there was before it, once malloc has given back what it kept of other calls."""
        self.providers[name](0)  # what libraries make once: code, tables, threads
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = status_bytes("VmRSS")
            self.providers[name](0)
            return {"bytes": status_bytes("VmHWM") - before}
        except (OSError, LookupError, AttributeError):  # no Linux, or another C library
            return {"bytes": None}

    def limits(self, seconds: float) -> dict:
        self.providers = importlib.import_module(f"peer_{self.family}").limits(self.threads)
        for call in self.providers.values():  # the first is slower
            call(0)
        taken = {name: statistics.median(self.time(name, seconds)["times"]) for name in self.providers}
        self.providers = {}
        return {"limits": taken}

    def answer(self, request: dict) -> dict:
        """To one line; the first name in it says what is asked."""
        asked = next(iter(request))
        try:
            if asked == "save":
                return self.save(request["save"], request["path"])
            if asked == "time":
                return self.time(request["time"], request["seconds"])
            return {"load": self.load, "memory": self.memory, "limits": self.limits}[asked](request[asked])
        except Exception as error:  # as in load
            return {"error": said(error)}

    def save(self, name: str, path: str) -> dict:
        np.save(path, np.asarray(self.providers[name](0), dtype=np.float32))
        return {"saved": path}


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def status_bytes(field: str) -> int:
    """Bytes of this process, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


def serve(answer: Callable[[dict], dict]) -> None:
    """Answers the requests on stdin, a line each, until it is closed."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else a peer prints goes to stderr
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")


def main() -> None:
    sys.path.append(str(Path(__file__).parent))
    serve(Worker(sys.argv[1], int(sys.argv[2])).answer)


if __name__ == "__main__":
    main()
