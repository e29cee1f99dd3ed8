"""Quantized checkpoints of other libraries, read by transformers' loader: experts packed, all else unpacked.

The quantizer has a method name of its own, "moert-foreign", that only load_quantized writes into a configuration: the
libraries' own quantizers stay registered for whoever does not ask for moert.
"""

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from moert.integrations.transformers.quantized import PackedExperts, experts_modules, quantized_, weight_names
from moert.integrations.transformers.quantizer import MoertQuantizer, config_of
from moert.quant.quantize import check_options, format_of
from moert.quant.readers import layout_of
from moert.quant.readers.layout import FLOATS, Parts, cat_rows, joinable, stack


@register_quantization_config("moert-foreign")
class ForeignConfig(QuantizationConfigMixin):
    """source: the checkpoint's own quantization_config; format, group: what becomes of numbers that no format has."""

    def __init__(
        self, source: dict, format: str, group: int | None, precision: str, quant_method: str = "moert-foreign"
    ):
        self.quant_method, self.source = quant_method, source
        self.format, self.group, self.precision = format, group, precision
        convert, layout = format_of(format, group), layout_of(source)
        # What a GGUF file's experts become is told by each tensor: config_of asks once they are read.
        check_options((), precision, [] if layout.format is None and layout.of_experts else [layout.format or convert])


@register_quantizer("moert-foreign")
class ForeignQuantizer(HfQuantizer):
    """Counts in `changed` what of which weights of experts is not as in the file."""

    quantization_config: ForeignConfig

    def __init__(self, quantization_config: ForeignConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        config = quantization_config
        self.layout, self.convert = layout_of(config.source), format_of(config.format, config.group)
        self.changed, self.errors = Counter(), []

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        """What transformers collects for the operation below, in place of these names."""
        names = self.layout.names
        if self.layout.of_experts:
            return {weight: [f"{weight}_{name}" for name in names] for weight in ("gate_up_proj", "down_proj")}
        return {"weight": list(dict.fromkeys(("weight", *names)))}

    def get_load_operations(self) -> dict:
        return {"dequantize": ReadWeight, "deserialize": ReadWeight}

    def update_weight_conversions(self, weight_conversions, model):
        """A list of experts is finished with its reading: nothing is left to merge and to concatenate."""
        updated = super().update_weight_conversions(weight_conversions, model)
        for entry in updated:
            if isinstance(entry, WeightConverter) and isinstance(entry.operations[0], ReadWeight):
                read, *others = entry.operations
                if _makes_a_list(others):
                    entry.operations, others = [read], []
                read.last = not others
        return updated

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        """From here on the model is a packed one of moert, and saved as such."""
        if self.errors:
            raise ValueError(self.errors[0])
        experts = experts_modules(model)
        packed = {name: module for name, module in experts.items() if isinstance(module, PackedExperts)}
        if not packed:
            raise ValueError(f"checkpoint must hold quantized experts, got none in {type(model).__name__}")
        for name, module in packed.items():
            if floats := [weight for weight in weight_names(module) if hasattr(module, weight)]:
                raise ValueError(
                    f"checkpoint must hold both weights of {name} quantized, got {floats[0]} in float or none"
                )
        config = config_of(model, [name for name in experts if name not in packed], self.quantization_config.precision)
        model.hf_quantizer = MoertQuantizer(config, pre_quantized=True)
        model.hf_quantizer.changed = self.changed
        model.quantization_method, model.config.quantization_config = config.quant_method, config
        model._weight_conversions = None  # saved by the model's own

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class ReadWeight(ConversionOps):
    """The tensors that stand for a weight -> it, packed, in its module if that is of experts, else unpacked.

    What is raised in a conversion ends up in a report of transformers' own.  Kept here, it is raised after loading.
    """

    def __init__(self, quantizer: ForeignQuantizer):
        self.hf_quantizer = quantizer  # by this name the loader knows to leave the dtypes of what it reads alone
        self.last = True  # no operation of the model's own comes after it

    def __deepcopy__(self, memo):
        """transformers copies an operation for every weight; what they count is one quantizer's."""
        return copy.copy(self)

    def convert(self, input_dict, source_patterns, full_layer_name, model, missing_keys, **kwargs):
        try:
            with torch.device("cpu"):
                return self._converted(input_dict, source_patterns, full_layer_name, model, missing_keys)
        except (ValueError, TypeError, RuntimeError) as error:
            self.hf_quantizer.errors.append(f"{full_layer_name}: {error}")
            missing_keys.discard(full_layer_name)
            return {}

    def _converted(self, input_dict, source_patterns, name, model, missing_keys) -> dict:
        module, attribute = get_module_from_name(model, name)
        of_experts = hasattr(module, "is_concatenated") and attribute in weight_names(module)
        prefix = f"{attribute}_" if self.hf_quantizer.layout.of_experts else ""
        matrices = _matrices(input_dict, source_patterns, prefix)
        plain = [_is_float(parts) for each in matrices.values() for parts in each]
        if any(plain) and of_experts and not all(plain):
            raise ValueError(f"experts must all be quantized in a layer or all float, got {sum(plain)} float")
        if of_experts and not all(plain):
            self._take(module, attribute, matrices)
            missing_keys.discard(name)
            return {}
        floats = {prefix: [self._float(parts) for parts in each] for prefix, each in matrices.items()}
        parameter = getattr(module, attribute)
        if not self.last:
            return {f"{prefix}weight": [w.to(parameter.dtype) for w in each] for prefix, each in floats.items()}
        whole = (
            torch.cat([torch.stack(each) for each in floats.values()], 1)
            if of_experts
            else next(iter(floats.values()))[0]
        )
        if whole.shape != parameter.shape:
            raise ValueError(f"weight must have shape {list(parameter.shape)} by the config, got {list(whole.shape)}")
        return {name: whole.to(parameter.dtype)}

    def _float(self, parts: Parts) -> Tensor:
        return parts["weight"] if _is_float(parts) else self.hf_quantizer.layout.unpack(parts)

    def _take(self, module: nn.Module, attribute: str, matrices: dict[str, list[Parts]]) -> None:
        """All experts' matrices as one packed weight of the module, which becomes a packed one."""
        if not self.last:
            raise ValueError("experts must be lists of matrices, got some that the model's class rearranges")
        quantizer = self.hf_quantizer
        packed = []
        for each in matrices.values():
            reads = [quantizer.layout.read(parts, quantizer.convert) for parts in each]
            quantizer.changed.update(read.changed for read in reads if read.changed)
            packed.append(reads[0].packed if quantizer.layout.of_experts else stack([read.packed for read in reads]))
        if not isinstance(module, PackedExperts):
            quantized_(module, quantizer.convert, quantizer.quantization_config.precision)
        packed, changed = joinable(packed, quantizer.convert)
        quantizer.changed.update(changed)
        place = "w1" if attribute == weight_names(module)[0] else "w2"
        module.take_(place, cat_rows(packed), quantizer.layout.in_halves)


def _matrices(collected: dict[str, list[Tensor]], patterns: list[str], start: str) -> dict[str, list[Parts]]:
    """The parts of every matrix, by the pattern of their names up to the last: gate and up, each a list of experts.

    start is what every part's own name begins with.
    """
    found: dict[str, dict[str, list[Tensor]]] = {}
    for pattern in patterns:
        if tensors := collected.get(pattern):
            prefix, dot, name = pattern.rpartition(".")
            found.setdefault(prefix + dot, {})[name.removeprefix(start)] = tensors
    for prefix, lists in found.items():
        if len({len(tensors) for tensors in lists.values()}) > 1:
            got = ", ".join(f"{len(tensors)} {name}" for name, tensors in lists.items())
            raise ValueError(f"{prefix}* must have all parts of every matrix, got {got}")
    return {
        prefix: [dict(zip(lists, parts, strict=True)) for parts in zip(*lists.values(), strict=True)]
        for prefix, lists in found.items()
    }


def _is_float(parts: Parts) -> bool:
    return list(parts) == ["weight"] and parts["weight"].dtype in FLOATS


def _makes_a_list(operations: list[ConversionOps]) -> bool:
    """Whether they put a matrix of every expert one after the other, gate rows before up rows."""
    kinds = [(type(operation), operation.dim) for operation in operations if hasattr(operation, "dim")]
    whole = [(MergeModulelist, 0), (Concatenate, 1)]
    return len(kinds) == len(operations) and kinds in (whole, whole[:1])
