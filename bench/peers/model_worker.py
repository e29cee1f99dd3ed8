"""One whole model in a process of its own: `model_worker.py FAMILY THREADS`, driven by bench/whole_models.py.

Reads one JSON object a line and answers with one: {"load": spec} -> {"weight_bytes"}, {"prefill": [ids]} ->
{"seconds"}, {"decode": [ids, count]} -> {"seconds": [...]}, {"parts": [ids, count]} -> seconds of a token by name, of
the family that tells, {"logits": [ids, prompt], "path": file} -> {"saved": file}, {"memory": []} -> {"peak", "held"}:
resident bytes of the process above what its imports took, at most and now; nulls where Linux does not say.  What
raises is answered with {"error": why}.
"""

import contextlib
import importlib
import sys
from pathlib import Path

import numpy as np
from worker import said, serve, status_bytes


class ModelWorker:
    def __init__(self, family: str, threads: int):
        self.module, self.threads, self.imported = importlib.import_module(f"model_{family}"), threads, None
        with contextlib.suppress(OSError, LookupError):  # no Linux
            self.imported = status_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")

    def answer(self, request: dict) -> dict:
        """To one line; the first name in it says what is asked."""
        asked = next(iter(request))
        try:
            return getattr(self, f"_{asked}")(request[asked], request)
        except Exception as error:  # whatever keeps a model from running is what there is to report of it
            return {"error": said(error)}

    def _load(self, spec: dict, _) -> dict:
        self.model = self.module.Model(spec, self.threads)
        return {"weight_bytes": self.model.weight_bytes}

    def _prefill(self, asked: list, _) -> dict:
        return {"seconds": self.model.prefill(*asked)}

    def _decode(self, asked: list, _) -> dict:
        return {"seconds": self.model.decode(*asked)}

    def _parts(self, asked: list, _) -> dict:
        return self.model.parts(*asked)

    def _logits(self, asked: list, request: dict) -> dict:
        np.save(request["path"], self.model.logits(*asked))
        return {"saved": request["path"]}

    def _memory(self, *_) -> dict:
        if self.imported is None:
            return {"peak": None, "held": None}
        held = status_bytes("VmRSS")  # first: what is taken between the two is part of the peak
        return {"peak": status_bytes("VmHWM") - self.imported, "held": held - self.imported}


def main() -> None:
    sys.path.append(str(Path(__file__).parent))
    serve(ModelWorker(sys.argv[1], int(sys.argv[2])).answer)


if __name__ == "__main__":
    main()
