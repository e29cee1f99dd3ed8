import pytest
import torch
from tests.decode.models import greedy, llama

from moert import MoELayer
from moert.decode import ModelDraft, NGramDraft, speculative
from moert.experts import BlockExperts
from moert.routers import ReLUNormRouter
from moert.testing import OperatorsRan

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


class Wrong:
    """A draft whose guesses are right up to a number that changes."""

    def __init__(self, truth):
        self.truth, self.calls = truth, 0

    def propose(self, tokens, count, temperature, generator):
        self.calls += 1
        right = self.truth[len(tokens) : len(tokens) + count]
        return [t if i < self.calls % 4 else (t + 1) % 50 for i, t in enumerate(right)], None


def block_model():
    model = llama()
    for layer in model.model.layers:
        layer.mlp = MoELayer(ReLUNormRouter(64, 8), BlockExperts(64, 8, 16))
    return model.double().eval()


def drafts(model):
    truth = greedy(model, PROMPT, 45)[0].tolist()
    return {
        "other": ModelDraft(llama(1).double()),
        "itself": ModelDraft(model),
        "n-gram": NGramDraft(3),
        "wrong": Wrong(truth),
    }


def test_greedy_gives_the_same_tokens():
    model = block_model()
    expected = greedy(model, PROMPT, 40)
    for name, draft in drafts(model).items():
        out = speculative(model, draft, PROMPT, 40, num_draft=4)
        assert torch.equal(out.tokens, expected), name
        assert out.passes + out.accepted == 40 and out.accepted <= out.proposed
        if name == "itself":
            assert out.passes == 8 and out.accepted == out.proposed == 32
    plain = speculative(model, None, PROMPT, 40)
    assert torch.equal(plain.tokens, expected) and plain.passes == 40


def test_the_target_checks_a_draft_in_one_union_pass():
    model = block_model()
    with OperatorsRan() as ran:
        speculative(model, NGramDraft(1, [3, 3]), PROMPT, 6)
    assert set(ran.names) == {"union_experts"}


def test_stops_at_eos():
    model = block_model()
    expected = greedy(model, PROMPT, 30)[0].tolist()
    eos = expected[17]
    end = expected.index(eos, 5) + 1
    for draft in (None, ModelDraft(model)):
        assert speculative(model, draft, PROMPT, 30, eos=eos).tokens[0].tolist() == expected[:end]


@pytest.mark.parametrize("kind", ("model", "n-gram"))
def test_sampling_keeps_the_distribution(kind):
    """Pairs of tokens of a vocabulary of 4 against their exact probabilities, 600 draws."""
    sizes = {"vocab_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "initializer_range": 0.25}
    target, other, prompt = llama(0, **sizes), llama(5, **sizes), torch.tensor([[1, 2]])
    with torch.no_grad():
        first = (target(prompt).logits[0, -1] / 0.8).softmax(-1)
        pairs = torch.stack([
            first[a] * (target(torch.tensor([[1, 2, a]])).logits[0, -1] / 0.8).softmax(-1) for a in range(4)
        ])  # fmt: skip
    generator, counts, draws = torch.Generator().manual_seed(0), torch.zeros(4, 4), 600
    for _ in range(draws):
        draft = ModelDraft(other) if kind == "model" else NGramDraft(1, [1, 2, 0, 3])
        out = speculative(target, draft, prompt, 2, num_draft=3, temperature=0.8, generator=generator)
        counts[out.tokens[0, 2], out.tokens[0, 3]] += 1
    expected = draws * pairs
    big = expected >= 5
    chi2 = ((counts - expected)[big] ** 2 / expected[big]).sum().item()
    # Mean n - 1 and variance 2 (n - 1): four standard deviations above.
    n = big.sum().item() - 1
    assert n >= 5 and chi2 <= n + 4 * (2 * n) ** 0.5


@pytest.mark.parametrize(
    "options,message",
    [
        ({"input_ids": torch.zeros(2, 3)}, r"input_ids must have shape \[1, n\] with n >= 1, got \[2, 3\]"),
        ({"input_ids": torch.zeros(1, 0)}, r"input_ids must have shape \[1, n\] with n >= 1, got \[1, 0\]"),
        ({"num_draft": 0}, "num_draft must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must not be negative, got -1.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        speculative(**({"target": llama(), "draft": None, "input_ids": PROMPT, "max_new_tokens": 2} | options))
