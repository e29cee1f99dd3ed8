"""Gradients of experts that are added to buffers that others own."""

from torch import nn

from moert.ops.kinds import expect


def add_to_main_grad_(module: nn.Module, wanted: bool = True) -> nn.Module:
    """Have the backward of fused_experts add the gradients of the module's parameters to their main_grad; the module.

    Megatron-LM's gradient accumulation fusion.  Concerns the weights and biases that fused_experts is given as they
    are and that carry a tensor main_grad (float32, float64 for float64 parameters; contiguous, of their shape) when
    the forward runs; others get their gradients as ever.  wanted=False ends it.
    """
    expect(nn.Module, module=module)
    for parameter in module.parameters():
        parameter.adds_to_main_grad = wanted
    return module
