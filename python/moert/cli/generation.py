"""What is asked of a process that generates, what it answers, and how answers are compared and summed up."""

from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Request:
    """Generate after prompt; temperature 0 is greedy, None leaves a choice to the checkpoint's generation config.

    trace also records how far apart the two best logits were at each token; stream sends the text as it comes.
    """

    prompt: str
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    trace: bool = False
    stream: bool = False


@dataclass(frozen=True)
class Generation:
    """The new tokens and their text; token_seconds are the decode steps, one fewer than the tokens.

    peak_bytes is the largest memory of the process, or of its GPU, so far, loading included; generation_bytes is the
    part of its peak since then that lies above the loaded model.
    """

    ids: list[int]
    text: str
    prompt_tokens: int
    prefill_seconds: float
    token_seconds: list[float]
    peak_bytes: int
    generation_bytes: int
    gaps: list[float] | None = None


@dataclass(frozen=True)
class Difference:
    """The first place where another provider chose another token, and the gap of the two best logits there."""

    provider: str
    position: int
    expected: int | None
    got: int | None
    gap: float | None


def first_difference(reference: Generation, other: Generation, provider: str) -> Difference | None:
    if reference.ids == other.ids:
        return None
    shared = min(len(reference.ids), len(other.ids))
    pairs = zip(reference.ids, other.ids, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), shared)
    return Difference(
        provider,
        at,
        reference.ids[at] if at < len(reference.ids) else None,
        other.ids[at] if at < len(other.ids) else None,
        reference.gaps[at] if reference.gaps and at < len(reference.gaps) else None,
    )


def summarize(prefills: list[Generation], decodes: list[Generation]) -> dict:
    """The row of one provider: medians over the rounds, and the spread of the time per token (p20, p80)."""
    prefill = median(g.prompt_tokens / g.prefill_seconds for g in prefills)
    steps = [seconds for g in decodes for seconds in g.token_seconds]
    row = {
        "prefill_tokens": prefills[0].prompt_tokens,
        "prefill_tokens_per_second": prefill,
        "decode_tokens": len(decodes[0].ids),
        "rounds": len(decodes),
        "peak_bytes": max(g.peak_bytes for g in prefills + decodes),
        "generation_bytes": max(g.generation_bytes for g in prefills + decodes),
        "decode_tokens_per_second": None,
        "milliseconds_per_token": None,
    }
    if steps:
        row["decode_tokens_per_second"] = 1 / median(steps)
        row["milliseconds_per_token"] = milliseconds(steps)
    return row


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """The median, and the spread around it."""
    p20, _, _, p80 = quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else 4 * seconds
    return {"p20": 1e3 * p20, "p50": 1e3 * median(seconds), "p80": 1e3 * p80}
