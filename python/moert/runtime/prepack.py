"""Weights laid out once in the panels that the CPU's GEMM kernels read, so that no call lays them out again."""

import torch
from torch import Tensor, nn

from moert import _C
from moert.experts.glu import GluExperts
from moert.ops.kinds import expect
from moert.types import ExpertLayout


def prepack_(module: nn.Module) -> list[str]:
    """Lay out the weights of the experts below `module` for inference; the names of the experts it was done for.

    These are GluExperts and, in a transformers model, experts whose gate fused_experts knows, with weights on the CPU
    and sizes that fill whole panels (multiples of 32 on AVX-512).  The bits of the results may change in their last
    places; they no longer depend on how many tokens share a call.

    A weight [E, N, K] becomes a parameter [E, N / columns, K / depth, columns, depth] with the same number of bytes;
    peak memory is that of the largest weight more.  state_dict (and save_pretrained) still gives names, shapes and
    values as before; load_state_dict, and unprepack_, put the weights back.  No gradients: a call that wants them is
    an error.
    """
    expect(nn.Module, module=module)
    forms = {name: (each, form) for name, each in module.named_modules() if (form := _form(each)) is not None}
    if not forms:
        raise ValueError(f"module must hold experts that fused_experts runs, got none in {type(module).__name__}")
    return [name for name, (experts, form) in forms.items() if _prepack(experts, form)]


def unprepack_(module: nn.Module) -> list[str]:
    """Put the weights back as they were; the names of the experts it was done for."""
    return [name for name, each in module.named_modules() if hasattr(each, "_unpacked_form") and _restore(each)]


def _form(experts: nn.Module) -> tuple[str, str, ExpertLayout] | None:
    """The names of the two weights and how they lie when they are not in panels; None where others read them too."""
    if isinstance(experts, GluExperts):
        alternate = experts.layout.interleaved and experts.activation.gated
        return "gate_up_proj", "down_proj", ExpertLayout(experts.layout.transposed, alternate)
    if not hasattr(experts, "is_concatenated"):
        return None
    from moert.integrations.transformers.experts import prepackable  # the class is transformers': it is there

    return prepackable(experts)


def _prepack(experts: nn.Module, form: tuple[str, str, ExpertLayout]) -> bool:
    first, second, layout = form
    weights = [experts._parameters.get(name) for name in (first, second)]
    if not all(type(w) is nn.Parameter and w.device.type == "cpu" and w.dim() == 3 for w in weights):
        return False
    matrices = [_rows(w.detach(), layout, w is weights[0]) for w in weights]
    columns, depth = _C.panel(str(weights[0].dtype).removeprefix("torch."))
    I = matrices[1].shape[2]  # a panel must not hold rows of the gate and of the up half
    if any(m.shape[1] % columns or m.shape[2] % depth for m in matrices) or I % columns:
        return False
    for weight, matrix in zip(weights, matrices, strict=True):
        E, N, K = matrix.shape
        panels = matrix.reshape(E, N // columns, columns, K // depth, depth).transpose(2, 3)
        weight.data = panels.contiguous()
    if not hasattr(experts, "_unpacked_form"):
        experts._unpacked_form = form
        experts.register_state_dict_post_hook(_show_restored)
        experts.register_load_state_dict_pre_hook(_restore_before_load)
    return True


def _restore(experts: nn.Module) -> bool:
    first, second, layout = experts._unpacked_form
    done = False
    for name in (first, second):
        weight = experts._parameters.get(name)
        if weight is not None and weight.dim() == 5:
            weight.data = _unpacked(weight.detach(), layout, name == first)
            done = True
    return done


def _show_restored(experts: nn.Module, state_dict: dict, prefix: str, _) -> None:
    first, second, layout = experts._unpacked_form
    for name in (first, second):
        weight = state_dict.get(prefix + name)
        if weight is not None and weight.dim() == 5:
            state_dict[prefix + name] = _unpacked(weight.detach(), layout, name == first)


def _restore_before_load(experts: nn.Module, *_) -> None:
    _restore(experts)


def _rows(weight: Tensor, layout: ExpertLayout, is_first: bool) -> Tensor:
    """The weight as [E, N, K], of the first the gate half before the up half."""
    weight = weight.mT if layout.transposed else weight
    return torch.cat([weight[:, ::2], weight[:, 1::2]], 1) if is_first and layout.interleaved else weight


def _unpacked(panels: Tensor, layout: ExpertLayout, is_first: bool) -> Tensor:
    """Panels in the layout in which the module had its weight."""
    E, blocks, depths, columns, depth = panels.shape
    weight = panels.transpose(2, 3).reshape(E, blocks * columns, depths * depth)
    if is_first and layout.interleaved:
        weight = torch.stack(weight.chunk(2, 1), 2).flatten(1, 2)
    return weight.mT.contiguous() if layout.transposed else weight
