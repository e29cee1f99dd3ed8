"""swap_: moert in the MoE blocks that transformers keeps outside its experts interface."""

import functools

from torch import nn

from moert.integrations.transformers import swapped, swapped_mlp
from moert.integrations.transformers.stacked import Stacked

# By the full name of exactly this class: looking needs no import of it, and a subclass may compute something else.
_MODELS = "transformers.models"
SWAPS: dict[str, type] = {
    f"{_MODELS}.dbrx.modeling_dbrx.DbrxExperts": swapped.DbrxExperts,
    f"{_MODELS}.jetmoe.modeling_jetmoe.JetMoeMoE": swapped.JetMoeMoE,
    f"{_MODELS}.jetmoe.modeling_jetmoe.JetMoeParallelExperts": swapped.JetMoeParallelExperts,
    f"{_MODELS}.llama4.modeling_llama4.Llama4TextMoe": swapped.Llama4TextMoe,
    f"{_MODELS}.longcat_flash.modeling_longcat_flash.LongcatFlashExperts": swapped.LongcatFlashExperts,
    f"{_MODELS}.nllb_moe.modeling_nllb_moe.NllbMoeExperts": swapped_mlp.NllbMoeExperts,
    f"{_MODELS}.step3p7.modeling_step3p7.Step3p7Experts": swapped.Step3p7Experts,
    f"{_MODELS}.switch_transformers.modeling_switch_transformers.SwitchTransformersExperts": (
        swapped_mlp.SwitchTransformersExperts
    ),
    f"{_MODELS}.vitpose_backbone.modeling_vitpose_backbone.VitPoseNaiveMoe": swapped.VitPoseNaiveMoe,
}


def swap_(model: nn.Module) -> nn.Module:
    """Makes the MoE blocks of a loaded model run on moert, in place; returns the model.

    Each block keeps its parameters, their names and its hooks and takes another forward: a checkpoint saved afterwards
    is an ordinary one.  A second call changes nothing, but for packing what has been laid apart since the first.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = blocks(model)
    if not found:
        raise ValueError(f"model must have a block of {_known()}, got {_described(model)}")
    for name, module in found:
        # Hooks that move weights between devices replace forward on the instance, where no class can reach it.
        if "forward" in module.__dict__ and not _is_swapped(module):
            raise ValueError(
                f"{name} must run the forward of its class, got one of its own (swap_ before adding hooks)"
            )
    for _, module in found:
        if not _is_swapped(module):
            module.__class__ = swapped_class(type(module))
        if isinstance(module, Stacked):
            module.pack_()
    return model


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The names and modules that swap_ serves, swapped or not."""
    return [(name, module) for name, module in model.named_modules() if _is_swapped(module) or _swap_of(module)]


def unswap_(model: nn.Module) -> nn.Module:
    """Gives every swapped block the class back that it had; returns the model."""
    for module in model.modules():
        if _is_swapped(module):
            module.__class__ = type(module).unswapped
    return model


@functools.cache
def swapped_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that takes the place of a known one."""
    swap = SWAPS[_full_name(cls)]
    members = {"unswapped": cls, "__reduce_ex__": _reduce, "__module__": __name__}
    return type(f"Moert{cls.__name__}", (swap, cls), members)


def _reduce(self, protocol):
    """A copy is made through the class that can be imported."""
    return _remake, (type(self).unswapped,), self.__dict__


def _remake(cls: type[nn.Module]) -> nn.Module:
    made = swapped_class(cls)
    return made.__new__(made)


def _swap_of(module: nn.Module) -> type | None:
    return SWAPS.get(_full_name(type(module)))


def _is_swapped(module: nn.Module) -> bool:
    return "unswapped" in vars(type(module))


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _known() -> str:
    return ", ".join(sorted(name.rpartition(".")[2] for name in SWAPS))


def _described(model: nn.Module) -> str:
    names = sorted({type(m).__name__ for m in model.modules() if not type(m).__module__.startswith("torch.")})
    text = f"{type(model).__name__} with modules of {', '.join(names)}"
    if any(hasattr(module, "is_concatenated") for module in model.modules()):
        text += ' (model.set_experts_implementation("moert") serves it)'
    return text
