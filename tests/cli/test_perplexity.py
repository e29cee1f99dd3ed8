import math

import torch

from moert.cli.checkpoint import load_model
from moert.cli.perplexity import BATCH_TOKENS, nats, windows


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
