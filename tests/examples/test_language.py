import torch

from experiment import Progress
from experiment.language import Block, LanguageModel, parameters, train
from moert import GluExperts, MoELayer, Routing, TopKRouter


class Recorder(TopKRouter):
    """Keeps the contexts that it is given, and adds a loss."""

    def forward(self, x, context=None):
        self.seen = context
        routing = super().forward(x)
        return Routing(routing.ids, routing.weights, 4, routing.logits, {"some": 0 * routing.logits.sum()})


def test_trains_and_hands_each_router_the_one_before():
    ffns = [MoELayer(Recorder(16, 4, 2), GluExperts(4, 16, 16)) for _ in range(2)]
    model = LanguageModel([Block(16, 2, ffn) for ffn in ffns], 16, 64)
    before, seen = parameters(model), []
    start = [p.detach().clone() for p in model.parameters()]
    loss = train(model, 5, 0, Progress(lambda *ticks: None, True), after_step=seen.append)
    assert 4 < loss < 7  # a byte at random costs 5.5
    first, second = (ffn.router.seen for ffn in ffns)
    assert first.previous is None and second.previous.num_experts == 4
    assert first.cu_seqlens.tolist() == list(range(0, 64 * 8 + 1, 64)) and len(seen[0]) == 2
    assert parameters(model) == before
    assert any(not torch.equal(p, q) for p, q in zip(start, model.parameters(), strict=True))


def test_no_byte_sees_a_later_one():
    model = LanguageModel([Block(16, 2, torch.nn.Linear(16, 16))], 16, 8)
    ids = torch.randint(0, 256, (2, 8))
    changed = ids.clone()
    changed[:, 5:] = 0
    one, other = model(ids)[0], model(changed)[0]
    assert torch.equal(one[:, :5], other[:, :5]) and not torch.equal(one[:, 5:], other[:, 5:])
