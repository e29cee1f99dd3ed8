import pytest
import torch

from moert.cli.checkpoint import load_model
from moert.cli.errors import CommandError
from moert.cli.generation import Request
from moert.cli.measure import Generator

PROMPT = "def f("


@pytest.fixture(scope="module")
def generator(checkpoint):
    sent = []
    generator = Generator(checkpoint, "eager", "auto", sent.append)
    generator.sent = sent
    return generator


def test_greedy_is_the_best_byte_each_time(generator, checkpoint):
    got = generator.generate(Request(PROMPT, 12, trace=True))
    model, ids, gaps = load_model(checkpoint, "eager", "auto"), list(PROMPT.encode()), []
    with torch.no_grad():
        for _ in range(12):
            best, second = model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
            gaps.append(best - second)
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert got.ids == ids[len(PROMPT) :]
    assert got.gaps == pytest.approx(gaps, abs=1e-4)
    assert got.text == bytes(got.ids).decode(errors="replace")


def test_every_token_is_timed(generator):
    got = generator.generate(Request(PROMPT, 5))
    assert got.prompt_tokens == len(PROMPT) and len(got.token_seconds) == 4 and got.gaps is None
    assert got.prefill_seconds > 0 and min(got.token_seconds) > 0
    assert got.peak_bytes > got.generation_bytes >= 0
    assert len(generator.generate(Request(PROMPT, 1)).token_seconds) == 0


def test_stream_is_the_text(generator):
    generator.sent.clear()
    got = generator.generate(Request(PROMPT, 20, stream=True))
    assert "".join(piece["text"] for piece in generator.sent).strip() == got.text.strip()


def test_sampling_follows_the_seed(generator):
    def sample(seed, **options):
        return generator.generate(Request(PROMPT, 16, temperature=1.5, seed=seed, **options)).ids

    assert sample(1) == sample(1) != sample(2)
    greedy = generator.generate(Request(PROMPT, 16)).ids
    assert sample(1, top_k=1) == greedy == sample(3, top_p=1e-6)


def test_training_steps_are_timed_and_the_weights_stay(generator):
    before = {name: parameter.clone() for name, parameter in generator.model.named_parameters()}
    ids = generator.generate(Request(PROMPT, 8)).ids
    batches = [[[1, 2, 3, 4, 5, 6]] * 2, [[6, 5, 4, 3, 2, 1]] * 2]
    times = generator.train(batches) + generator.train(batches)
    assert len(times) == 4 and min(times) > 0
    assert all(torch.equal(before[name], parameter) for name, parameter in generator.model.named_parameters())
    assert not generator.model.training and generator.generate(Request(PROMPT, 8)).ids == ids


def test_empty_prompt(generator):
    with pytest.raises(CommandError, match="prompt must be at least one token, got none"):
        generator.generate(Request("", 4))
