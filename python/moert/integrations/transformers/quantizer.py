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
from moert.quant.format import Format, PackedTensor
from moert.quant.gptq import GPTQ
from moert.quant.quantize import Quantized, any_format_of, check_options, check_weights, pack_, skipped
from moert.quant.sub1 import SubOneBit, SubOneBitTensor
from moert.runtime.huge_pages import huge_pages_


@register_quantization_config("moert")
class MoertConfig(QuantizationConfigMixin):
    """How moert packs experts: `from_pretrained(dir, quantization_config=MoertConfig("int4", group=32))`.

    format, group, skip and precision as in moert.quantize_.  experts: of a saved model whose weights are in several
    formats or of a size that the format does not tell (sub1), the format, group and codewords of both weights of every
    module, by its name: {"model.layers.0.mlp.experts": [["sub1", None, 4711], ["int8", 32, None]]}.
    made_of and calibrated: the fingerprint of the checkpoint that `moert quantize` has read, and by which method and
    tokens it was calibrated.
    """

    def __init__(
        self,
        format: str = "int4",
        group: int | None = None,
        skip: list[str] | None = None,
        precision: str = "auto",
        experts: dict[str, list[list]] | None = None,
        made_of: str | None = None,
        calibrated: dict | None = None,
        quant_method: str = "moert",
    ):
        self.quant_method = quant_method
        self.format, self.group = format, group
        self.skip, self.precision = list(skip or ()), precision
        if experts is not None:
            _check_experts(experts)
            self.experts = experts
        if made_of is not None:
            self.made_of = made_of
        if calibrated is not None:
            self.calibrated = calibrated
        each = [fmt for name in experts or () for fmt, _ in self.formats_of(name)]
        check_options(skip or (), precision, each or [any_format_of(format, group)])

    def formats_of(self, name: str) -> list[tuple[Format | SubOneBit, int | None]]:
        """Format and codewords of the two weights of a module."""
        if not hasattr(self, "experts"):
            return [(any_format_of(self.format, self.group), None)] * 2
        if name not in self.experts:
            raise ValueError(f"quantization_config must say how {name} is packed, got {', '.join(self.experts)}")
        return [(any_format_of(format, group), codewords) for format, group, codewords in self.experts[name]]


def _check_experts(experts: dict) -> None:
    """Of a file: names, and for both weights a format, a group and a number of codewords."""
    for name, weights in experts.items() if isinstance(experts, dict) else [("experts", experts)]:
        try:
            (first, second) = weights
            for format, group, codewords in (first, second):
                fmt = any_format_of(format, group)
                whole = isinstance(codewords, int) and codewords >= 0
                if whole != isinstance(fmt, SubOneBit) or not (whole or codewords is None):
                    raise ValueError(f"got {codewords} codewords of {format}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"experts must have two formats with their sizes for {name}: {error}") from error


def config_of(model: nn.Module, skip: Sequence[str], precision: str) -> MoertConfig:
    """What a checkpoint of the model says of its packed experts."""
    packed = {name: module for name, module in experts_modules(model).items() if isinstance(module, PackedExperts)}
    weights = {name: module.packed_pair() for name, module in packed.items()}
    formats = list(dict.fromkeys(w.format for pair in weights.values() for w in pair))
    main = formats[0]
    if len(formats) == 1 and not isinstance(main, SubOneBit):
        return MoertConfig(main.spelling, main.group, skip, precision)
    experts = {name: [_entry(w) for w in pair] for name, pair in weights.items()}
    return MoertConfig(main.spelling, main.group, skip, precision, experts)


def _entry(w: PackedTensor | SubOneBitTensor) -> list:
    return [w.format.spelling, w.format.group, len(w.codes) if isinstance(w, SubOneBitTensor) else None]


@register_quantizer("moert")
class MoertQuantizer(HfQuantizer):
    """Packs the experts while a float checkpoint loads, layer by layer, or takes them packed from a moert one."""

    quantization_config: MoertConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs) -> None:
        config = self.quantization_config
        self._tied: list[tuple[PackedExperts, str, str]] = []
        for name, module in chosen_experts(model, config.skip).items():
            formats = config.formats_of(name)
            quantized_(module, formats[0][0], config.precision)
            for place, weight, (fmt, codewords) in zip(("w1", "w2"), weight_names(module), formats, strict=True):
                # A tie is of parameters: packed experts have none, and are stored with each of their modules.
                tied = model.all_tied_weights_keys.pop(f"{name}.{weight}", None)
                if tied and not self.pre_quantized:
                    self._tied.append((module, place, tied.rpartition(".")[0]))
                if tied or self.pre_quantized:
                    module.allocate_(place, fmt, codewords)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        """transformers fills what a checkpoint lacks with memory as it comes: here that is an error."""
        for module, place, owner in self._tied:
            source = model.get_submodule(owner)
            for part in (part for part in source.dtypes() if part.startswith(place)):
                setattr(module, part, getattr(source, part).clone())
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
            huge_pages_(module)  # the loader's memory is in small ones
        if not self.pre_quantized:  # now it can say how many codes sub1 has, which a checkpoint of it needs
            config = config_of(model, self.quantization_config.skip, self.quantization_config.precision)
            self.quantization_config = model.config.quantization_config = config

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
    fmt = any_format_of(config.format, config.group)
    experts = float_experts(model, config.skip, fmt, config.precision)
    try:
        layers = pack_(model, experts, calibration, fmt, settings)
    except BaseException:
        _only_in_memory_(model, config.skip)  # no checkpoint says which of them are packed
        raise
    if isinstance(model, PreTrainedModel):
        config = config_of(model, config.skip, config.precision)
        model.hf_quantizer = MoertQuantizer(config, pre_quantized=True)
        model.is_quantized, model.quantization_method = True, config.quant_method
        model.config.quantization_config = config
    return Quantized(experts, layers)


def _only_in_memory_(model: nn.Module, skip: Sequence[str]) -> None:
    """save_pretrained is an error from here on, if any experts are packed."""
    packed = any(isinstance(module, PackedExperts) for module in model.modules())
    if packed and isinstance(model, PreTrainedModel):
        model.hf_quantizer = InMemoryQuantizer(MoertConfig(skip=list(skip)), pre_quantized=True)
        model.is_quantized = True


class InMemoryQuantizer(MoertQuantizer):
    """Of a model that was left half packed."""

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
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        pair = [name.rpartition(".")[0] for name in (target, source)]
        if len(owned := [name for name in pair if name in chosen]) == 1 and all(name in found for name in pair):
            (left,) = set(pair) - set(owned)
            raise ValueError(f"skip must name all experts of common weights or none, got {left} without {owned[0]}")
    return chosen


def float_experts(model: nn.Module, skip: Sequence[str], fmt: Format | SubOneBit, precision: str) -> dict:
    """The chosen experts of a loaded model as they are packed, by name, their weights checked."""
    chosen = chosen_experts(model, skip)
    for name, module in chosen.items():
        check_weights(name, *(getattr(module, weight) for weight in weight_names(module)))
    return {name: FloatHfExperts(module, fmt, precision) for name, module in chosen.items()}
