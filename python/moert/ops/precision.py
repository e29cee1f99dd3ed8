"""What torch's settings say of float32 products on a GPU."""

import torch
from torch import Tensor


def rounds_to_tf32(x: Tensor) -> bool:
    """Whether torch may round the factors of a product like x's to tf32.

    That is what torch.backends.cuda.matmul.fp32_precision says, which torch.set_float32_matmul_precision and
    allow_tf32 set as well.  torch.compile compiles again when it changes.
    """
    return x.is_cuda and x.dtype == torch.float32 and _allows_tf32()


def _allows_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# Dynamo cannot trace it, but guards each graph on this setting.  torch.compiler.assume_constant_result sets this,
# and imports Dynamo.
_allows_tf32._dynamo_marked_constant = True
