import pytest
import torch

from moert import Experts


def test_forward_must_be_defined():
    class Unfinished(Experts):
        pass

    with pytest.raises(TypeError, match=r"Unfinished must define forward\(x, routing\)"):
        Unfinished()(torch.zeros(1, 2), None)
