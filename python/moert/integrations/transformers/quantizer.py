"""Quantized checkpoints of transformers: `quant_method: "moert"` in config.json, saved and loaded as any other."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from moert.integrations.transformers.calibrated import FloatHfExperts
from moert.integrations.transformers.quantized import PackedExperts, experts_modules, quantized_, weight_names
from moert.quant.format import RowFormat
from moert.quant.gptq import GPTQ
from moert.quant.quantize import Quantized, check_options, check_weights, format_of, pack_, skipped
from moert.quant.sub1 import SubOneBit


@register_quantization_config("moert")
class MoertConfig(QuantizationConfigMixin):
    """How moert packs experts: `from_pretrained(dir, quantization_config=MoertConfig("int4", group=32))`.

    format, group, skip and precision as in moert.quantize_.
    """

    def __init__(
        self,
        format: str = "int4",
        group: int | None = None,
        skip: list[str] | None = None,
        precision: str = "auto",
        quant_method: str = "moert",
    ):
        self.quant_method = quant_method
        self.format, self.group = format, group
        self.skip, self.precision = list(skip or ()), precision
        format_of(format, group)
        check_options(skip or (), precision)


@register_quantizer("moert")
class MoertQuantizer(HfQuantizer):
    """Packs the experts while a float checkpoint loads, layer by layer, or takes them packed from a moert one."""

    quantization_config: MoertConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        for module in chosen_experts(model, self.quantization_config.skip).values():
            config = self.quantization_config
            quantized_(module, format_of(config.format, config.group), config.precision)
            if self.pre_quantized:
                module.allocate_("w1")
                module.allocate_("w2")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        """transformers fills what a checkpoint lacks with memory as it comes: here that is an error."""
        for name, module in experts_modules(model).items():
            if not isinstance(module, PackedExperts):
                continue
            missing = [weight for weight in weight_names(module) if hasattr(module, weight)]
            if self.pre_quantized:
                buffers = module.named_buffers(recurse=False)
                missing = [part for part, tensor in buffers if not getattr(tensor, "_is_hf_initialized", False)]
            if missing:
                raise ValueError(f"checkpoint must hold every part of its experts, got no {name}.{missing[0]}")
            for part, dtype in module.dtypes().items():
                if (got := getattr(module, part).dtype) != dtype:
                    raise ValueError(f"{name}.{part} must be {dtype} for {module.packed(part[:2]).format}, got {got}")
            for place in ("w1", "w2"):
                packed = module.packed(place)
                packed.format.check_values(packed)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, PackedExperts) and name in weight_names(module)

    def get_quantize_ops(self) -> ConversionOps:
        return Pack()

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters over the packed experts; these have no gradients of their own."""
        return True


class Pack(ConversionOps):
    """A float weight that has just been read -> the buffers of its module."""

    def convert(self, input_dict, model=None, full_layer_name=None, missing_keys=None, **kwargs):
        (value,) = input_dict.values()
        module, name = get_module_from_name(model, full_layer_name)
        module.pack_("w1" if name == weight_names(module)[0] else "w2", value[0] if isinstance(value, list) else value)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def quantize_(
    model: nn.Module, config: MoertConfig, calibration: Iterable[Any] | None = None, settings: GPTQ = GPTQ()
) -> Quantized:
    """Packs the experts of a loaded transformers model in place, one after the other; returns their names.

    calibration and settings as in moert.quantize_.  save_pretrained then writes a checkpoint that from_pretrained loads
    packed.
    """
    fmt = format_of(config.format, config.group)
    experts = float_experts(model, config.skip, fmt, config.precision)
    try:
        layers = pack_(model, experts, calibration, fmt, settings)
    except BaseException:
        _only_in_memory_(model, config.skip)  # no checkpoint says which of them are packed
        raise
    if isinstance(model, PreTrainedModel):
        model.hf_quantizer = MoertQuantizer(config, pre_quantized=True)
        model.is_quantized, model.quantization_method = True, config.quant_method
        model.config.quantization_config = config
    return Quantized(experts, layers)


def quantize_in_memory_(
    model: nn.Module, fmt: SubOneBit, skip: Sequence[str], calibration: Iterable[Any] | None, settings: GPTQ
) -> Quantized:
    """The same in a format that no checkpoint has: the model runs, and save_pretrained is an error."""
    experts = float_experts(model, skip, fmt, "full")
    try:
        return Quantized(experts, pack_(model, experts, calibration, fmt, settings))
    finally:
        _only_in_memory_(model, skip)


def _only_in_memory_(model: nn.Module, skip: Sequence[str]) -> None:
    """save_pretrained is an error from here on, if any experts are packed."""
    packed = any(isinstance(module, PackedExperts) for module in model.modules())
    if packed and isinstance(model, PreTrainedModel):
        model.hf_quantizer = InMemoryQuantizer(MoertConfig(skip=list(skip)), pre_quantized=True)
        model.is_quantized = True


class InMemoryQuantizer(MoertQuantizer):
    """Of a model whose experts are in a format that checkpoints do not have."""

    def is_serializable(self) -> bool:
        return False


def chosen_experts(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Module]:
    """The experts modules that skip does not name, by name: what is packed."""
    found = experts_modules(model)
    packed = [name for name, module in found.items() if isinstance(module, PackedExperts)]
    if packed:
        raise ValueError(f"model must have float experts, got packed ones in {packed[0]}")
    chosen = {name: module for name, module in found.items() if not skipped(name, skip)}
    if not chosen:
        got = f"{len(found)} of them in {type(model).__name__}, skip={list(skip)}"
        raise ValueError(f"model must have experts of transformers' interface that skip does not name, got {got}")
    return chosen


def float_experts(model: nn.Module, skip: Sequence[str], fmt: RowFormat | SubOneBit, precision: str) -> dict:
    """The chosen experts of a loaded model as they are packed, by name, their weights checked."""
    chosen = chosen_experts(model, skip)
    for name, module in chosen.items():
        check_weights(name, *(getattr(module, weight) for weight in weight_names(module)))
    return {name: FloatHfExperts(module, fmt, precision) for name, module in chosen.items()}
