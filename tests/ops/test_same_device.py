import pytest
import torch

from moert import permute, permute_plan
from moert.ops.same_device import same_device
from moert.types import DispatchPlan

X, META = torch.zeros(2, 3), torch.zeros(2, 3, device="meta")


def test_one_device_passes():
    same_device(x=X, w=X, bias=None)
    same_device(x=META, bias=None, w=META)


def test_errors():
    with pytest.raises(RuntimeError, match="^bias must be on the device of x, cpu, got meta$"):
        same_device(x=X, w=X, bias=META)
    with pytest.raises(RuntimeError, match="^w must be on the device of x, meta, got cpu$"):
        same_device(x=META, w=X)


def test_an_operator_refuses_a_plan_without_data():
    plan = permute_plan(torch.zeros(2, 1, dtype=torch.int32), 1)
    with pytest.raises(RuntimeError, match="tokens must be on the device of x, cpu, got meta"):
        permute(X, DispatchPlan(plan.offsets, plan.tokens.to("meta"), plan.slots))
