"""Low-rank adapters of PEFT on expert weights (`target_parameters`), run as x A B without making W + dW.

PEFT's own way is to parametrize the weight during forward, which makes the whole W + dW of all experts in every call.
While an experts module runs on moert the factors are handed to it instead.
"""

import functools
import sys
from contextlib import contextmanager

from torch import Tensor, nn

_ADAPTABLE = ("gate_up_proj", "up_proj", "down_proj")


def adapts(experts: nn.Module) -> bool:
    return bool(getattr(experts, "_moert_factors", None))


def factors(experts: nn.Module, name: str) -> list[tuple[Tensor, Tensor, float]]:
    """The (lhs, rhs, scaling) of each active adapter; scaling * lhs @ rhs has the layout of the weight."""
    return getattr(experts, "_moert_factors", {}).get(name, [])


def weight(experts: nn.Module, name: str) -> Tensor:
    if hasattr(experts, "parametrizations"):
        install()
    return getattr(experts, name)


def install() -> None:
    """Teaches PEFT's wrapper to hand its factors to experts that run on moert; does nothing before PEFT is imported.

    PEFT imported later is met in the first forward that finds a weight parametrized.
    """
    layer = sys.modules.get("peft.tuners.lora.layer")
    wrapper = getattr(layer, "ParamWrapper", None)
    if not hasattr(wrapper, "get_delta_factors") or hasattr(wrapper._activate_lora, "_moert_original"):
        return
    original = wrapper._activate_lora

    @contextmanager
    def _activate_lora(self, active_adapters):
        adapters = [name for name in active_adapters or [] if name in self.lora_A]
        experts = self.get_base_layer()
        if not adapters or not _takes_factors(experts, self.parameter_name):
            with original(self, active_adapters):
                yield
            return
        if not hasattr(experts, "_moert_factors"):
            experts._moert_factors = {}
        experts._moert_factors[self.parameter_name] = [self.get_delta_factors(name) for name in adapters]
        try:
            yield
        finally:
            del experts._moert_factors[self.parameter_name]

    _activate_lora._moert_original = original
    wrapper._activate_lora = functools.wraps(original)(_activate_lora)


def _takes_factors(experts: nn.Module, name: str) -> bool:
    """One expert is PEFT's dense case, and below 16 bits PEFT adds in a wider type: both stay its own."""
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if implementation != "moert" or name not in _ADAPTABLE or not hasattr(experts, "is_transposed"):
        return False
    param = getattr(experts, name)
    return param.dim() == 3 and param.shape[0] > 1 and param.element_size() > 1
