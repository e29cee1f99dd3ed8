"""Perplexity of a language model on tokens, in windows that know nothing of each other.

Letters: B windows, L tokens of one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moert.cli.checkpoint import check_files, load_tokenizer
from moert.cli.errors import CommandError, first_line

BATCH_TOKENS = 2048
TEXT_TOKENS = 16384  # of a text, where nothing else is said
WINDOW = 512


def tokens_of(model: Path, text: Path, limit: int) -> list[int]:
    """The first tokens of a text, by the tokenizer of the checkpoint."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"the text must be a readable UTF-8 file, got {first_line(error)}") from error
    check_files(model)
    ids = load_tokenizer(model)(content)["input_ids"][:limit]
    if len(ids) < 2:
        raise CommandError(f"the text must have at least 2 tokens, got {len(ids)} in {text}")
    return ids


def windows(ids: Sequence[int], length: int) -> Iterator[Tensor]:
    """The tokens in order, as [B, L] int64 of at most BATCH_TOKENS; what is left over is a window of its own."""
    whole = len(ids) // length * length
    if whole:
        yield from torch.tensor(ids[:whole]).view(-1, length).split(max(1, BATCH_TOKENS // length))
    if len(ids) - whole > 1:
        yield torch.tensor(ids[whole:])[None]


def nats(model, ids: Tensor) -> tuple[float, int]:
    """Summed over all tokens [B, L] but the first of each window, and how many these are."""
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="none")
    return losses.double().sum().item(), losses.numel()
