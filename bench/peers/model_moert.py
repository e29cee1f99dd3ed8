"""A checkpoint in transformers, its experts run by transformers or by moert, as bench/whole_models.py asks for it."""

import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401  so that loading a model imports no more
from transformers.generation.streamers import BaseStreamer

import moert.integrations.transformers.quantizer  # noqa: F401
from moert.cli.checkpoint import load_model
from moert.runtime import huge_pages_


class _Clock(BaseStreamer):
    """When the prompt and each new token came by."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


class _Calls:
    """The seconds of every call of the modules while it is entered."""

    def __init__(self, modules: list):
        self.modules, self.seconds, self.started = modules, [], 0.0

    def __enter__(self):
        self.hooks = [module.register_forward_pre_hook(self._begin) for module in self.modules]
        self.hooks += [module.register_forward_hook(self._end) for module in self.modules]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def of_a_token(self) -> float:
        """The median over the tokens but the first, whose calls are of the whole prompt."""
        tokens = np.reshape(self.seconds, (-1, len(self.modules))).sum(1)
        return float(np.median(tokens[1:]))

    def _begin(self, *_):
        self.started = time.perf_counter()

    def _end(self, *_):
        self.seconds.append(time.perf_counter() - self.started)


class Model:
    def __init__(self, spec: dict, threads: int):
        torch.set_num_threads(threads)
        self.model = load_model(Path(spec["path"]), spec["experts"], spec["dtype"])
        if spec["experts"] == "moert":
            huge_pages_(self.model)  # as `moert run` has it
        tensors = (*self.model.parameters(), *self.model.buffers())
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors)
        self.experts = [module for name, module in self.model.named_modules() if name.endswith(".mlp.experts")]

    def prefill(self, ids: list[int]) -> float:
        """Seconds until the first new token is known."""
        times = self._generate(ids, 1)
        return times[1] - times[0]

    def decode(self, ids: list[int], count: int) -> list[float]:
        """Seconds of every new token but the first."""
        times = self._generate(ids, count)[1:]
        return [b - a for a, b in zip(times[:-1], times[1:], strict=True)]

    def parts(self, ids: list[int], count: int) -> dict[str, float]:
        """Median seconds of a token: all of it, of it the model's forward, of that its experts."""
        with _Calls([self.model]) as forward, _Calls(self.experts) as experts:
            times = self.decode(ids, count)
        return {"token": median(times), "forward": forward.of_a_token(), "experts": experts.of_a_token()}

    def logits(self, ids: list[int], prompt: int) -> np.ndarray:
        """[len(ids) - prompt + 1, vocabulary]: after the first `prompt` ids and after each one more."""
        with torch.inference_mode():
            rows = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        return rows[0, prompt - 1 :].float().numpy()

    def _generate(self, ids: list[int], count: int) -> list[float]:
        clock, prompt = _Clock(), torch.tensor([ids])
        with torch.inference_mode():
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                do_sample=False,
                num_beams=1,
                streamer=clock,
            )
        return clock.times
