import warnings

import torch
from tests.decode.models import llama
from torch import nn
from transformers import DynamicCache

from moert.decode.cached import CachedModel, forked, holding


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


def test_the_cache_has_the_name_that_the_model_knows():
    class Old(nn.Module):
        def forward(self, input_ids, past_key_values=None, use_cache=None): ...

    class New(nn.Module):
        def forward(self, input_ids, cache=None, use_cache=None): ...

    cache = DynamicCache()
    assert holding(Old(), cache) == {"past_key_values": cache, "use_cache": True}
    assert holding(New(), cache) == {"cache": cache, "use_cache": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # transformers says this of names that it will drop
        CachedModel(llama()).logits([1, 2, 3], 1)


def test_a_fork_leaves_the_cache_alone():
    model = llama()
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[1, 2, 3]]), **holding(model, cache))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    fork = forked(cache)
    got = model(torch.tensor([[4, 5]]), **holding(model, fork)).logits
    torch.testing.assert_close(got, model(torch.tensor([[1, 2, 3, 4, 5]]), use_cache=False).logits[:, 3:])
    assert (cache.get_seq_length(), fork.get_seq_length()) == (3, 5)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
