import numpy as np
import pytest
import torch
from tests.ops.test_rank_capacity import Unread
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moert.integrations.transformers  # noqa: F401
from analysis.traces import layer, random_trace
from moert import GluExperts, MoELayer, TopKRouter
from moert.analysis import RoutingTrace, record_routings
from moert.analysis.trace import LayerTrace, experts_in
from moert.routers import recorded_routings
from moert.testing import random_routing
from moert.types import Routing


class Stack(nn.Module):
    def __init__(self, layers=2, H=16, E=5, k=2):
        super().__init__()
        self.blocks = nn.ModuleList(MoELayer(TopKRouter(H, E, k), GluExperts(E, H, 8)) for _ in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def same(a, b):
    return len(a.layers) == len(b.layers) and all(
        (m.name, m.num_experts) == (n.name, n.num_experts)
        and np.array_equal(m.ids, n.ids)
        and np.array_equal(m.calls, n.calls)
        for m, n in zip(a.layers, b.layers, strict=True)
    )


def test_what_the_routers_said_is_recorded():
    model, batches = Stack(), [torch.randn(3, 4, 16), torch.randn(0, 16), torch.randn(7, 16)]
    with record_routings(model) as recorder, recorded_routings(model) as calls:
        for x in batches:
            model(x)
    model(batches[0])  # outside
    trace = recorder.trace()
    assert [each.name for each in trace.layers] == ["blocks.0.experts", "blocks.1.experts"]
    for i, recorded in enumerate(trace.layers):
        routings = [routing for name, routing in calls if name == f"blocks.{i}.router"]
        assert torch.equal(torch.from_numpy(recorded.ids), torch.cat([r.ids for r in routings]).short())
        assert recorded.calls.tolist() == [12, 0, 7] and recorded.num_experts == 5
        members = sum(r.members().sum(0) for r in routings)
        assert torch.equal(torch.from_numpy(recorded.loads()), members)
        assert torch.equal(recorder.loads()[recorded.name], members)


def test_nothing_is_read_on_the_host():
    """Until somebody asks what was recorded."""
    model, x = Stack(), torch.randn(6, 16)
    with record_routings(model) as recorder, record_routings(model, keep_ids=False) as loads:
        for _ in range(2):
            with Unread():
                model(x)
    assert all(torch.equal(loads.loads()[name], load) for name, load in recorder.loads().items())
    with Unread(), pytest.raises(AssertionError, match="read on the host"):
        recorder.trace()
    assert [len(each.ids) for each in recorder.trace().layers] == [12, 12]


def test_a_model_compiled_inside():
    torch._dynamo.reset()
    model = Stack()
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(9, 16)
    with record_routings(model) as recorder:
        compiled(x)
        compiled(x)
    with record_routings(model) as plain:
        model(x)
    assert {name: loads.tolist() for name, loads in recorder.loads().items()} == {
        name: (2 * loads).tolist() for name, loads in plain.loads().items()
    }


def test_loads_alone_keep_no_ids():
    model = Stack()
    with record_routings(model, keep_ids=False) as recorder:
        for _ in range(3):
            model(torch.randn(6, 16))
    assert {name: loads.sum().item() for name, loads in recorder.loads().items()} == {
        "blocks.0.experts": 36,
        "blocks.1.experts": 36,
    }
    with pytest.raises(ValueError, match="keep_ids must be True for a trace, got False"):
        recorder.trace()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_ids_that_are_none_are_dropped(dtype):
    experts = GluExperts(4, 16, 8)
    ids = torch.tensor([[0, 3], [4, 100], [2, -1 if dtype.is_signed else 255]]).to(dtype)
    with record_routings(experts) as recorder:
        experts(torch.randn(3, 16), Routing(ids, torch.ones(3, 2), 4))
        experts(torch.randn(1, 16), Routing(ids[:1, :1], torch.ones(1, 1), 4))
    (recorded,) = recorder.trace().layers
    assert recorded.ids.tolist() == [[0, 3], [-1, -1], [2, -1], [0, -1]]
    assert recorder.loads()[""].tolist() == recorded.loads().tolist() == [2, 0, 1, 1]


@pytest.mark.parametrize("implementation", ["moert", "eager", "grouped_mm"])
def test_hugging_face_models(implementation):
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, vocab_size=64, num_experts=6, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    tokens = torch.randint(64, (2, 5))
    with torch.no_grad(), record_routings(model) as recorder:
        logits = model(tokens, output_router_logits=True).router_logits
        model(tokens[:, :1])
    trace = recorder.trace()
    assert [each.name for each in trace.layers] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    for recorded, scores in zip(trace.layers, logits, strict=True):
        assert recorded.calls.tolist() == [10, 2] and recorded.num_experts == 6
        chosen = scores.reshape(10, 6).topk(2).indices
        assert np.array_equal(np.sort(recorded.ids[:10]), chosen.sort().values.numpy())


def test_experts_within_experts_count_once():
    class Outer(GluExperts):
        def __init__(self):
            super().__init__(4, 16, 8)
            self.inner = GluExperts(4, 16, 8)

    model = nn.ModuleDict({"a": Outer(), "ab": GluExperts(4, 16, 8)})
    assert list(experts_in(model)) == ["a", "ab"]


def test_pairs_are_those_of_a_loop():
    trace = random_trace()
    for i in range(2):
        expected = np.zeros((8, 8), dtype=int)
        for one, two in zip(trace.layers[i].ids, trace.layers[i + 1].ids, strict=True):
            for e in one[one >= 0]:
                for f in two[two >= 0]:
                    expected[e, f] += 1
        assert np.array_equal(trace.pairs(i), expected)
    short = RoutingTrace((trace.layers[0], layer([[0]], 8, name="b")))
    with pytest.raises(ValueError, match="layers must have seen the same rows, got 60 in layers.0 and 1 in b"):
        short.pairs(0)


def test_halves_share_the_rows_of_every_call():
    trace = random_trace(calls=(11, 0, 49))
    even, odd = trace.halves()
    for whole, one, two in zip(trace.layers, even.layers, odd.layers, strict=True):
        assert one.calls.tolist() == [6, 0, 25] and two.calls.tolist() == [5, 0, 24]
        assert np.array_equal(one.ids, np.concatenate([whole.ids[:11:2], whole.ids[11::2]]))
        assert np.array_equal(one.loads() + two.loads(), whole.loads())


def test_traces_of_ranks_are_joined_call_by_call():
    one, two = random_trace(layers=2, calls=(10, 0, 50), k=3), random_trace(layers=2, T=9, calls=(5, 4, 0), seed=1)
    joined = RoutingTrace.of_ranks([one, two])
    for both, a, b in zip(joined.layers, one.layers, two.layers, strict=True):
        assert both.calls.tolist() == [15, 4, 50] and (both.name, both.num_experts) == (a.name, 8)
        widened = np.concatenate([b.ids, np.full((9, 1), -1)], axis=1)
        expected = np.concatenate([a.ids[:10], widened[:5], a.ids[10:10], widened[5:], a.ids[10:]])
        assert np.array_equal(both.ids, expected)
    assert same(RoutingTrace.of_ranks([one]), one)
    with pytest.raises(ValueError, match="traces must be at least one, got none"):
        RoutingTrace.of_ranks([])
    with pytest.raises(ValueError, match="traces must have the same layers and calls, got .* of rank 1 and"):
        RoutingTrace.of_ranks([one, random_trace(layers=2, calls=(60,))])


@pytest.mark.parametrize("trace", [random_trace(), RoutingTrace(()), random_trace(T=0, calls=())], ids="abc")
def test_files_come_back(trace, tmp_path):
    trace.save(tmp_path / "t.npz")
    assert same(RoutingTrace.load(tmp_path / "t.npz"), trace)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_broken_files_say_so(tmp_path):
    path = tmp_path / "t.npz"
    with pytest.raises(OSError):
        RoutingTrace.load(path)
    good = {"moert_trace": np.array([1]), "layers": np.array(["a"]), "num_experts": np.array([2])}
    good |= {"ids_0": np.array([[0], [1]]), "calls_0": np.array([2])}
    for change, message in (
        ({"moert_trace": np.array([2])}, "version \\[2\\], where 1 is known"),
        ({"moert_trace": None}, "no array 'moert_trace'"),
        ({"calls_0": None}, "no array 'calls_0'"),
        ({"num_experts": np.array([2, 2])}, "layers \\[1\\] with num_experts \\[2\\]"),
        ({"num_experts": np.array([0])}, "num_experts must be in .1, 1048576., got 0"),
        ({"ids_0": np.array([[0], [2]])}, "ids must be in \\[-1, E=2\\), got 0 to 2"),
        ({"ids_0": np.array([[0], [-(2**63)]])}, "ids must be in"),
        ({"ids_0": np.array([0, 1])}, "ids must be signed integers \\[T, k >= 1\\], got int64 \\[2\\]"),
        ({"ids_0": np.array([[0.0], [1.0]])}, "ids must be signed integers \\[T, k >= 1\\], got float64 \\[2, 1\\]"),
        ({"calls_0": np.array([3])}, "calls must be integers \\[n\\] that sum to T=2, got int64 \\[3\\]"),
        ({"calls_0": np.array([3, -1])}, "calls must be integers"),
        ({"calls_0": np.array([2**62, 2**62, 2**62, 2**62, 2])}, "calls must be integers"),
    ):
        np.savez(path, **{name: value for name, value in (good | change).items() if value is not None})
        with pytest.raises(ValueError, match=f"{path} must be a routing trace of moert, got .*{message}"):
            RoutingTrace.load(path)


def test_nothing_to_record():
    with pytest.raises(ValueError, match="model must have experts of moert or .* interface, got Linear"):
        record_routings(nn.Linear(2, 2)).__enter__()


def test_a_file_cannot_ask_for_counts_of_any_size():
    for E, k in ((2**40, 2), (0, 2), (4, 0)):
        with pytest.raises(ValueError, match="num_experts must be in|k >= 1"):
            LayerTrace("a", E, np.zeros((3, k), dtype=np.int16), np.array([3]))
    wide = LayerTrace("a", 2**20, np.zeros((3, 1), dtype=np.int32), np.array([3]))
    with pytest.raises(ValueError, match="pairs of experts must be at most 67108864, got 1048576 x 1048576"):
        RoutingTrace((wide, wide)).pairs(0)


def test_arguments_by_name_in_any_order():
    experts = GluExperts(4, 8, 6)
    routing = random_routing(5, 4, 2)
    with record_routings(nn.Sequential(experts)) as recorder:
        experts(routing=routing, x=torch.randn(5, 8))
    assert np.array_equal(recorder.trace().layers[0].ids, routing.ids)
    with pytest.raises(TypeError, match="ids of a must be integers, got torch.float32"):
        recorder.see("a", torch.ones(3, 2), 4)
