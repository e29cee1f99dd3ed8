from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moert.cli import demo_train
from moert.cli.corpus import Corpus, bigram_loss, evenly_spaced
from moert.cli.demo_train import DemoSettings, evaluate, expert_load, train

TINY = DemoSettings(
    layers=2, hidden=32, heads=2, experts=4, intermediate=16, sequence=32, batch=4, steps=12, warmup=2, seconds=1e9
)


@pytest.fixture(scope="module")
def corpus():
    text = torch.tensor(list(b"for i in range(10):\n    total += i\n" * 200), dtype=torch.uint8)
    return Corpus(text[:6000], text[6000:], (2, 1))


@pytest.fixture(scope="module")
def trained(corpus):
    steps = []
    return *train(TINY, corpus, steps.append), steps


def test_default_model_is_what_the_issue_of_size_asks_for():
    with torch.device("meta"):
        model = demo_train.Qwen3MoeForCausalLM(DemoSettings().config())
    assert 5e6 <= sum(p.numel() for p in model.parameters()) <= 20e6
    assert model.config.num_experts >= 16 and model.config.num_experts_per_tok >= 2
    assert model.config.vocab_size == 256


def test_it_learns_and_records(trained, corpus):
    model, record, steps = trained
    assert record.losses[-1] < record.losses[0] - 0.5
    assert [s.loss for s in steps] == record.losses and [s.step for s in steps] == list(range(1, 13))
    assert record.parameters == sum(p.numel() for p in model.parameters()) > record.active_parameters
    windows = evenly_spaced(corpus.heldout, 32, 128)
    assert record.heldout[-1] == (12, pytest.approx(evaluate(model, windows)[0]))
    assert record.bigram_loss == bigram_loss(corpus.train, windows)
    assert torch.tensor(record.expert_load).sum(1) == pytest.approx(torch.ones(2))
    assert not model.training


def test_the_experts_are_moerts(trained):
    assert trained[0].config._experts_implementation == "moert"


def test_same_seed_same_weights(trained, corpus):
    again, record = train(TINY, corpus, lambda step: None)
    assert record.losses == trained[1].losses
    assert all(torch.equal(a, b) for a, b in zip(trained[0].parameters(), again.parameters(), strict=True))


def test_moert_trains_as_eager_does(trained, corpus):
    _, record = train(replace(TINY, implementation="eager"), corpus, lambda step: None)
    assert record.losses == pytest.approx(trained[1].losses, rel=1e-3)


def test_time_ends_it(corpus):
    _, record = train(replace(TINY, steps=10**6, seconds=2.0), corpus, lambda step: None)
    assert 1 <= len(record.losses) < 10**6 and record.heldout[-1][0] == len(record.losses)


def test_evaluate_is_the_mean_over_all_but_the_first_byte(trained, corpus):
    model, windows = trained[0], evenly_spaced(corpus.heldout, 32, 20)
    with torch.no_grad():
        log_p = F.log_softmax(model(input_ids=windows).logits[:, :-1], -1)
    by_hand = -log_p.gather(2, windows[:, 1:, None]).mean().item()
    loss, load = evaluate(model, windows)
    assert loss == pytest.approx(by_hand, rel=1e-5)
    assert load.shape == (2, 4) and load.sum(1).tolist() == [20 * 32 * 2] * 2


def test_expert_load_counts_choices():
    config = TINY.config()
    logits = torch.tensor([[3.0, 2.0, 0.0, 1.0], [0.0, 5.0, 4.0, 1.0]])
    assert expert_load((logits, -logits), config).tolist() == [[1, 2, 1, 0], [1, 0, 1, 2]]


def test_balance_loss_is_one_where_all_is_even_and_larger_where_not():
    config = TINY.config()
    even = torch.eye(4).roll(1, 0) * 1e-3 + torch.eye(4) * 2e-3
    assert demo_train._balance_loss((even,), config).item() == pytest.approx(1, abs=1e-3)
    uneven = torch.tensor([[9.0, 8.0, 0.0, 0.0]]).expand(4, 4)
    assert demo_train._balance_loss((uneven,), config).item() == pytest.approx(2, abs=0.01)
