import pytest
import torch

from moert.ops.once_differentiable import once_differentiable


def test_the_error_names_the_forward():
    with torch.library._scoped_library("moert_test", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: 2 * x, "CPU")
        once_differentiable("moert_test::double", "half")
        y = torch.ops.moert_test.double(torch.ones(2, requires_grad=True))
        with pytest.raises(RuntimeError, match="half must be differentiated at most once, got a second backward"):
            y.sum().backward()
