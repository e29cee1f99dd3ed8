import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from moert import expert_choice, permute_plan
from moert.ops.expert_choice import expert_choice_ref
from moert.testing import DTYPES, LAYOUTS, strided

OPS = torch.ops.moert
# T, E, segments, largest capacity
SIZES = (
    pytest.param(0, 4, 1, 3, id="no-tokens"),
    pytest.param(1, 1, 1, 1, id="one-token"),
    pytest.param(9, 3, 0, 2, id="no-segment"),
    pytest.param(40, 8, 1, 12, id="one-batch"),
    pytest.param(61, 5, 7, 4, id="sequences-of-uneven-length"),
    pytest.param(50, 3, 2, 99, id="more-room-than-tokens"),
    pytest.param(3001, 16, 3, 200, id="several-threads"),
)


def same(plan, other):
    return all(torch.equal(getattr(plan, name), getattr(other, name)) for name in ("offsets", "tokens", "slots"))


def problem(T, E, D, most, dtype=torch.float32):
    """Scores with many ties, segments of which some take no part, capacities from 0."""
    scores = (torch.randint(-50, 50, (T, E)) / 8).to(dtype)
    return scores, torch.randint(-1, D + 1, (T,)), torch.randint(0, most + 1, (D, E))


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("T,E,D,most", SIZES)
def test_forward(T, E, D, most, dtype):
    scores, segments, capacity = problem(T, E, D, most, dtype)
    weights, ids, plan = expert_choice(scores, segments, capacity)
    ref_weights, ref_ids, ref_plan = expert_choice_ref(scores, segments, capacity)
    assert (weights.dtype, ids.dtype) == (torch.float64 if dtype == torch.float64 else torch.float32, torch.int32)
    assert torch.equal(ids, ref_ids) and torch.equal(weights, ref_weights)
    assert same(plan, ref_plan) and same(plan, permute_plan(ids, E))
    room = int(plan.offsets[-1]) + 3
    assert same(*(fn(scores, segments, capacity, E, room)[2] for fn in (expert_choice, expert_choice_ref)))


def test_backward():
    scores, segments, capacity = problem(30, 6, 2, 5)
    dweights = torch.randn(30, 6)
    grads = []
    for fn in (expert_choice, expert_choice_ref):
        x = scores.clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(x, segments, capacity)[0], x, dweights)[0])
    assert torch.equal(*grads) and (grads[0] != 0).sum() == (expert_choice(scores, segments, capacity)[1] < 6).sum()
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    segments, capacity = torch.zeros(12, dtype=torch.int32), torch.full((1, 3), 4)
    assert torch.autograd.gradcheck(lambda x: expert_choice(x, segments, capacity, 3)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: expert_choice(x, segments, capacity, 3)[0].square(), x)


def test_ties_go_to_the_earlier_token_and_zeros_are_equal():
    scores = torch.tensor([[0.0], [-0.0], [0.0], [-1.0]])
    assert expert_choice(scores, torch.zeros(4, dtype=torch.int8), torch.tensor([[2]]))[1].tolist() == [
        [0],
        [0],
        [1],
        [1],
    ]


def test_load_is_the_capacity():
    scores, capacity = torch.randn(64, 5), torch.tensor([[3, 0, 10, 32, 40], [1, 1, 1, 1, 1]])
    segments = torch.arange(64) % 2
    ids = expert_choice(scores, segments, capacity)[1]
    for d in (0, 1):
        load = torch.bincount(ids[segments == d].flatten().long(), minlength=6)[:5]
        assert load.tolist() == capacity[d].clamp_max(32).tolist()


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_special_scores(value):
    scores = torch.randn(6, 2)
    scores[2] = value
    everyone, apart = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 0, -1, 0, 0, 0])
    capacity = torch.full((1, 2), 2)
    if value != value:
        with pytest.raises(RuntimeError, match="scores must be numbers, got NaN"):
            expert_choice(scores, everyone, capacity)
    else:
        assert (expert_choice(scores, everyone, capacity)[1][2] < 2).all() == (value > 0)
    assert (expert_choice(scores, apart, capacity)[1][2] == 2).all()  # whatever it is, it takes no part


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    scores, segments, capacity = problem(40, 8, 3, 9)
    got = expert_choice(strided(scores, layout), strided(segments[None], layout)[0], strided(capacity, layout))
    expected = expert_choice(scores, segments, capacity)
    assert all(map(torch.equal, got[:2], expected[:2])) and same(got[2], expected[2])
    row = scores[:1].expand(7, 8)
    assert (
        expert_choice(row, torch.zeros(7, dtype=torch.int64), torch.ones(1, 8).int())[1][0] == torch.arange(8)
    ).all()


def test_values_beyond_32_bits_are_what_they_are():
    scores, segments = torch.randn(4, 1), torch.tensor([0, 2**32, -(2**63), 0])
    ids = expert_choice(scores, segments, torch.tensor([[2**40]]))[1]
    assert ids.flatten().tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("threads", (2, 3))
def test_same_bits_for_every_number_of_threads(threads):
    scores, segments, capacity = problem(3001, 16, 3, 200)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = expert_choice(scores, segments, capacity)
        torch.set_num_threads(threads)
        for _ in range(3):
            got = expert_choice(scores, segments, capacity)
            assert all(map(torch.equal, got[:2], expected[:2])) and same(got[2], expected[2])
    finally:
        torch.set_num_threads(before)


def test_compile():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(expert_choice, backend=counter, fullgraph=True, dynamic=True)
    for T in (2, 5, 33, 64):
        scores, segments, capacity = problem(T, 6, 2, 5)
        scores.requires_grad_()
        got, expected = compiled(scores, segments, capacity), expert_choice(scores, segments, capacity)
        assert all(map(torch.equal, got[:2], expected[:2])) and same(got[2], expected[2])
        assert torch.equal(*(torch.autograd.grad(w.square().sum(), scores)[0] for w, *_ in (got, expected)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("T,E,D,most", [p for p in SIZES if p.id != "several-threads"])
def test_opcheck(T, E, D, most):
    scores, segments, capacity = problem(T, E, D, most)
    for room in ((), (T * E + 2,)):
        opcheck(OPS.expert_choice.default, (scores.requires_grad_(), segments, capacity, E, *room))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"scores": torch.zeros(3)}, r"scores must be \[T, E\], got shape \[3\]"),
        ({"segments": torch.zeros(3)}, "segments must have an integer dtype, got Float"),
        ({"segments": torch.zeros(2).int()}, r"segments must have shape \[T=3\], got \[2\]"),
        ({"capacity": torch.zeros(2).int()}, r"capacity must have shape \[D, E=2\], got \[2\]"),
        ({"capacity": torch.full((1, 2), -3)}, "capacity must be at least 0, got -3"),
        ({"max_choices": 3}, r"max_choices must be in \[0, E=2\], got 3"),
        ({"max_slots": 1}, "max_slots must be at least the 2 choices of all experts, got 1"),
        ({"max_slots": -1}, r"max_slots must be in \[0, 2\^31\), got -1"),
        ({"max_choices": 1}, "max_choices must be at least the 2 experts that took a token, got 1"),
    ],
)
def test_errors(change, message):
    valid = {"scores": torch.zeros(3, 2), "segments": torch.zeros(3).int(), "capacity": torch.ones(1, 2).int()}
    with pytest.raises(RuntimeError, match=message):
        expert_choice(**(valid | change))
