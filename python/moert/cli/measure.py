"""One provider in a process of its own, so that its peak memory is its own: `python -m moert.cli.measure`.

Reads Requests from stdin and answers with Generations on stdout, one JSON object a line; windows of tokens are answered
with their perplexity, batches of windows with the seconds of a training step of each.  provider.py is the other end.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from transformers import LogitsProcessor, TextStreamer

from moert.cli.checkpoint import load_model, load_tokenizer
from moert.cli.errors import CommandError, first_line
from moert.cli.generation import Generation, Request
from moert.cli.machine import DeviceMemory
from moert.cli.perplexity import nats
from moert.runtime import huge_pages_


class _Clock(TextStreamer):
    """Notes when the prompt and each new token come by; sends text on where `send` is given."""

    def __init__(self, tokenizer, send=None):
        super().__init__(tokenizer, skip_prompt=True)
        self.send = send
        self.times: list[float] = []

    def put(self, value):
        self.times.append(time.perf_counter())
        if self.send:
            super().put(value)

    def end(self):
        if self.send:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if text:
            self.send({"text": text})


class _Gaps(LogitsProcessor):
    """Notes how far the best logit is above the second; changes nothing."""

    def __init__(self):
        self.gaps: list[float] = []

    def __call__(self, input_ids, scores):
        best, second = scores[0].float().topk(2).values.tolist()
        self.gaps.append(best - second)
        return scores


class Generator:
    """The loaded model of one provider."""

    def __init__(
        self,
        directory: Path,
        experts: str,
        dtype: str,
        send,
        random: bool = False,
        packing: str | None = None,
        device: str = "cpu",
    ):
        self.send = send
        self.device = device
        self.memory = DeviceMemory(device)
        self.tokenizer = load_tokenizer(directory)
        self.model = load_model(directory, experts, dtype, random, packing).to(device)
        if experts == "moert" and device == "cpu":
            huge_pages_(self.model)  # as README has it
        self.peak = self.memory.peak()
        self.memory.reset_peak()
        self.loaded = self.memory.now()
        self.optimizer = None

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in chain(self.model.parameters(), self.model.buffers()))

    def perplexity(self, windows: list[list[int]]) -> float:
        """Of every token but the first of each window."""
        measured = [nats(self.model, torch.tensor([window], device=self.device)) for window in windows]
        return math.exp(sum(total for total, _ in measured) / sum(count for _, count in measured))

    def train(self, batches: list[list[list[int]]]) -> list[float]:
        """Seconds of a step of each batch, as demo_train trains; its learning rate is zero, so the weights stay."""
        from moert.cli.demo_train import make_optimizer, train_step

        batches = [torch.tensor(windows, device=self.device) for windows in batches]
        self.model.train()
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model)
            train_step(self.model, self.optimizer, batches[0])  # makes what the optimizer keeps
        times = []
        for ids in batches:
            start = time.perf_counter()
            train_step(self.model, self.optimizer, ids)
            times.append(time.perf_counter() - start)
        self.model.eval()
        return times

    def generate(self, request: Request) -> Generation:
        inputs = self.tokenizer(request.prompt, return_tensors="pt")
        if inputs["input_ids"].shape[1] == 0:
            raise CommandError("prompt must be at least one token, got none")
        inputs = inputs.to(self.device)
        clock = _Clock(self.tokenizer, self.send if request.stream else None)
        gaps = _Gaps() if request.trace else None
        torch.manual_seed(request.seed)
        start = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                max_new_tokens=request.max_new_tokens,
                streamer=clock,
                logits_processor=[gaps] if gaps else None,
                **_sampling(request),
            )
        encoder = self.model.config.is_encoder_decoder  # which has run before the streamer sees the prompt
        ids = output[0, 1 if encoder else inputs["input_ids"].shape[1] :].tolist()
        first = clock.times[1] - (start if encoder else clock.times[0])
        steps = [b - a for a, b in zip(clock.times[1:-1], clock.times[2:], strict=True)]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        above = max(0, self.memory.peak() - self.loaded)
        return Generation(
            ids,
            text,
            inputs["input_ids"].shape[1],
            first,
            steps,
            max(self.peak, self.memory.peak()),
            above,
            gaps.gaps if gaps else None,
        )


def _sampling(request: Request) -> dict:
    if request.temperature == 0:
        return {"do_sample": False, "num_beams": 1}
    chosen = {"top_p": request.top_p, "top_k": request.top_k}
    return {
        "do_sample": True,
        "num_beams": 1,
        "temperature": request.temperature,
        **{name: value for name, value in chosen.items() if value is not None},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--experts", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--packing")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    # The answers keep stdout to themselves: whatever else prints there goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(answer: dict) -> None:
        answers.write(json.dumps(answer) + "\n")

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        generator = Generator(
            arguments.model,
            arguments.experts,
            arguments.dtype,
            send,
            arguments.random,
            arguments.packing,
            arguments.device,
        )
        dtype = str(generator.model.dtype).removeprefix("torch.")
        send({"ready": type(generator.model).__name__, "weight_bytes": generator.weight_bytes, "dtype": dtype})
        for line in sys.stdin:
            asked = json.loads(line)
            if "windows" in asked:
                send({"perplexity": generator.perplexity(asked["windows"])})
            elif "batches" in asked:
                send({"seconds": generator.train(asked["batches"])})
            else:
                send(asdict(generator.generate(Request(**asked))))
    except CommandError as error:
        send({"error": str(error)})
    except Exception as error:  # a model can fail in any way; the caller gets it in one line
        send({"error": f"{arguments.experts} must generate, got {type(error).__name__}: {first_line(error)}"})
        raise


if __name__ == "__main__":
    main()
