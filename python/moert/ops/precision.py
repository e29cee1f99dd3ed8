"""What torch's settings say of float32 products on a GPU."""

import torch
from torch import Tensor


def rounds_to_tf32(x: Tensor) -> bool:
    """Whether torch may round the factors of a product like x's to tf32.

    That is what torch.backends.cuda.matmul.fp32_precision says, which torch.set_float32_matmul_precision and
    allow_tf32 set as well.  torch.compile reads the last alone, and compiles again when it changes.
    """
    if not (x.is_cuda and x.dtype == torch.float32):
        return False
    settings = torch.backends.cuda.matmul
    return settings.allow_tf32 if torch.compiler.is_compiling() else settings.fp32_precision == "tf32"
