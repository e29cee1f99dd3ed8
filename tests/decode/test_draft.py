import pytest
import torch
from tests.decode.models import greedy, llama

from moert.decode import ModelDraft, NGramDraft


def test_n_gram():
    draft = NGramDraft(2, [1, 2, 3, 1, 2, 3, 1, 2, 4])
    assert draft.propose([9, 1, 2], 3, 0.0, None) == ([3, 1, 2], None)  # 3 followed (1, 2) twice, 4 once
    assert draft.propose([9, 1, 2, 4, 1, 2, 4, 1, 2], 2, 0.0, None)[0] == [4, 1]  # what is decoded counts as well
    assert draft.propose([77], 3, 0.0, None) == ([], None)


def test_the_longest_context_counts_and_the_lower_token_of_two():
    draft = NGramDraft(2, [1, 5, 1, 5, 2, 5, 7])
    assert draft.propose([2, 5], 1, 0.0, None)[0] == [7]  # after (2, 5), though 5 alone is followed by 1 as often
    assert draft.propose([9, 5], 1, 0.0, None)[0] == [1]  # 1, 2 and 7 followed 5 once each


def test_n_gram_counts_each_token_once():
    draft = NGramDraft(1)
    for end in range(2, 8):
        draft.propose([5, 6, 5, 7, 5, 7, 5][:end], 1, 0.0, None)
    assert dict(draft._followers[(5,)]) == {6: 1, 7: 2}
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        NGramDraft(0)


def test_model():
    model, prompt = llama(), torch.tensor([[3, 1, 4]])
    tokens, drawn_from = ModelDraft(model).propose([3, 1, 4], 5, 0.0, None)
    assert tokens == greedy(model, prompt, 5)[0, 3:].tolist() and drawn_from is None
    tokens, drawn_from = ModelDraft(model).propose([3, 1, 4], 2, 0.5, torch.Generator().manual_seed(0))
    expected = (model(torch.tensor([[3, 1, 4, tokens[0]]])).logits[0, -2:] / 0.5).softmax(-1)
    torch.testing.assert_close(drawn_from, expected, rtol=1e-4, atol=1e-6)
