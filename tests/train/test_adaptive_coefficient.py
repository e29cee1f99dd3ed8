import pytest

from moert.train import AdaptiveCoefficient

# every 2 steps, held for 4: a falling loss, then rising ones, then a jump.
LOSSES = [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.505, 0.505, 5, 5, 5, 5]
# Step 4: q = 0.5, from 1 to 0.5 over steps 4..6; step 6: q = 1, stays; step 8: q = 1.01 < 1.025;
# step 10: q = 9.9, capped at 4; step 12: q = 1.
COEFFICIENTS = [1, 1, 1, 1, 0.75, 0.5, 0.5, 0.5, 0.50625, 0.5125, 2.25625, 4]


def test_a_written_table():
    coefficient = AdaptiveCoefficient(1.0, hold=4, every=2)
    got = [coefficient.step(loss) for loss in LOSSES]
    assert got == pytest.approx(COEFFICIENTS)


def test_cap():
    coefficient = AdaptiveCoefficient(0.05, hold=4, every=2)
    for step in range(200):
        assert coefficient.step(1.5**step) <= 0.2 + 1e-12
    assert coefficient.value == pytest.approx(0.2)


def test_a_loss_of_zero_moves_nothing():
    coefficient = AdaptiveCoefficient(0.5, hold=4, every=2)
    assert [coefficient.step(0.0) for _ in range(9)] == [0.5] * 9


def test_state_dict():
    one, other = (AdaptiveCoefficient(1.0, hold=4, every=2) for _ in range(2))
    for loss in LOSSES[:7]:
        one.step(loss)
    other.load_state_dict(one.state_dict())
    assert [one.step(loss) for loss in LOSSES[7:]] == [other.step(loss) for loss in LOSSES[7:]]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"initial": 0.0}, "initial must be positive, got 0.0"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"hold": 100}, r"hold must be at least 2 \* every = 200, got 100"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveCoefficient(**({"initial": 1.0} | options))
