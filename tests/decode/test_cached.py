import torch
from tests.decode.models import llama

from moert.decode.cached import CachedModel


def test_only_what_is_new_runs_and_what_changed_is_dropped():
    model = llama().double()
    cached, lengths = CachedModel(model), []

    def note(_, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    for tokens, last in (([1, 2, 3], 1), ([1, 2, 3, 4, 5, 6], 3), ([1, 2, 3, 4, 9, 9], 2), ([1, 2], 2), ([7, 8], 1)):
        got = cached.logits(tokens, last)
        lengths.append("plain")
        expected = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -last:]
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
        assert cached.cache.get_seq_length() == len(tokens)
    assert [n for n, after in zip(lengths, lengths[1:], strict=False) if after == "plain"] == [3, 3, 2, 2, 2]
