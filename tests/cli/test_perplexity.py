import math

import pytest
import torch

from moert.cli.checkpoint import load_model
from moert.cli.errors import CommandError
from moert.cli.perplexity import BATCH_TOKENS, nats, tokens_of, windows


def test_windows_hold_every_token_once():
    ids = list(range(2 * BATCH_TOKENS + 700))
    made = list(windows(ids, 512))
    assert [tuple(w.shape) for w in made] == [(4, 512), (4, 512), (1, 512), (1, 188)]
    assert torch.cat([w.flatten() for w in made]).tolist() == ids
    assert [tuple(w.shape) for w in windows(ids[:5], 512)] == [(1, 5)]
    assert [tuple(w.shape) for w in windows(ids[:513], 512)] == [(1, 512)]  # a token alone predicts nothing


def test_nats_are_those_of_every_next_token(checkpoint):
    model = load_model(checkpoint, "eager", "auto")
    ids = torch.randint(256, (3, 9))
    total, count = nats(model, ids)
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)
    expected = -sum(log_p[b, i, ids[b, i + 1]].item() for b in range(3) for i in range(8))
    assert count == 24 and math.isclose(total, expected, rel_tol=1e-5)


def test_tokens_of_a_text(checkpoint, tmp_path):
    text = tmp_path / "text"
    text.write_text("def f():\n")
    assert tokens_of(checkpoint, text, 7) == list(b"def f()")
    with pytest.raises(CommandError, match="model must be a local directory"):
        tokens_of(tmp_path / "nothing", text, 7)
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(CommandError, match="the text must be a readable UTF-8 file, got"):
        tokens_of(checkpoint, text, 7)
    text.write_text("a")
    with pytest.raises(CommandError, match="the text must have at least 2 tokens, got 1 in .*text"):
        tokens_of(checkpoint, text, 7)
