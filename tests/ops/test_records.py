import pytest
import torch

from moert.ops.records import fields_of, gradient_records, gradients_of, numbers_of, record_bytes
from moert.types import DispatchPlan


@pytest.mark.parametrize(
    "kind, there, back",
    [
        ((torch.bfloat16, torch.float32, 2048, 8), 4096 + 32 + 16, 4096 + 32),
        ((torch.bfloat16, torch.float32, 3, 1), 16, 16),  # 6 bytes, 2 until weights are aligned, 4, 2, and 2 at the end
        ((torch.float64, torch.float64, 1, 3), 48, 32),
        ((torch.float32, torch.float32, 0, 0), 16, 16),  # a group moves no rows of no bytes
    ],
)
def test_sizes(kind, there, back):
    assert record_bytes(*kind) == there and record_bytes(*kind, ids=False) == back


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("H, k", [(1, 1), (5, 3), (16, 2)])
def test_fields_do_not_overlap(H, k, dtype, weight_dtype):
    records = torch.zeros(4, record_bytes(dtype, weight_dtype, H, k), dtype=torch.uint8)
    rows, weights, ids = fields_of(records, dtype, weight_dtype, H, k)
    for field, shape, value in ((rows, (4, H), 1), (weights, (4, k), 2), (ids, (4, k), 3)):
        assert field.shape == shape
        field.fill_(value)
    assert (rows == 1).all() and (weights == 2).all() and (ids == 3).all()
    assert (records != 0).any(0).sum() <= H * dtype.itemsize + k * weight_dtype.itemsize + 2 * k  # the rest is padding
    same = numbers_of(records, dtype, weight_dtype, H, k)
    assert torch.equal(same[0], rows) and torch.equal(same[1], weights)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradients_go_home(needs):
    """Of two tokens, the first with copies 0 and 2: added up; a choice that is not the copy's has no gradient."""
    drows, dweights = torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.tensor([[1.0, 9], [2, 3], [9, 4]])
    ids = torch.tensor([[0, -1], [1, 0], [-1, 2]]).short()
    plan = DispatchPlan(None, torch.tensor([0, 1, 0]).int(), torch.tensor([[0, 2], [1, -1]]).int())
    records = gradient_records(drows, dweights, ids, needs)
    types = torch.float32, torch.float32
    dx, dw = gradients_of(records, types, ((2, 2), (2, 2)), plan, needs)
    assert (dx is None) != needs[0] and (dw is None) != needs[1]
    assert dx is None or dx.tolist() == [[6, 8], [3, 4]]
    assert dw is None or dw.tolist() == [[1, 4], [2, 3]]
