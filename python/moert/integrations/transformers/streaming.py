"""Which tensors of a checkpoint make which packed experts, by transformers' conversion mapping; a layer at a time."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from moert.integrations.transformers.quantized import PackedExperts, quantized_, weight_names
from moert.integrations.transformers.quantizer import MoertConfig, chosen_experts
from moert.quant.quantize import any_format_of, check_skip
from moert.quant.sub1 import SubOneBit

Read = Callable[[str], Tensor]


@dataclass
class Weight:
    """One float weight: how it is made, and of which tensors, those of each pattern in order."""

    name: str
    transform: WeightRenaming | WeightConverter
    sources: dict[str, list[str]] = field(default_factory=dict)

    def experts(self, shape: torch.Size, model: PreTrainedModel, read: Read) -> Iterable[Tensor]:
        """The experts of the weight one after the other, where each has tensors of its own, or all at once."""
        if not self.is_a_list:
            whole = self._made_of(self.sources, model, read)
            _check_shape(self.name, whole.shape, shape)
            return whole
        for pattern, names in self.sources.items():
            if len(names) != shape[0]:
                raise ValueError(f"{self.name} must have {shape[0]} tensors like {pattern}, got {len(names)}")
        return self._one_by_one(shape, model, read)

    def _one_by_one(self, shape: torch.Size, model: PreTrainedModel, read: Read) -> Iterator[Tensor]:
        for i in range(shape[0]):
            one = self._made_of({pattern: [names[i]] for pattern, names in self.sources.items()}, model, read)
            _check_shape(f"expert {i} of {self.name}", one.shape[1:], shape[1:])
            yield one[0]

    @property
    def targets(self) -> list[str]:
        """The weights that are made at once: several where the transform splits its tensors."""
        patterns = self.transform.target_patterns if isinstance(self.transform, WeightConverter) else [""]
        return [self.name, *(self.name.replace(patterns[0], pattern) for pattern in patterns[1:])]

    def made(self, model: PreTrainedModel, read: Read) -> dict[str, Tensor]:
        """All of them."""
        return self._made(self.sources, model, read)

    @property
    def is_a_list(self) -> bool:
        operations = getattr(self.transform, "operations", None) or [None]
        first, others = operations[0], operations[1:]
        within = all(type(operation) is Concatenate and operation.dim > 0 for operation in others)
        return type(first) is MergeModulelist and first.dim == 0 and within

    def _made_of(self, sources: dict[str, list[str]], model: PreTrainedModel, read: Read) -> Tensor:
        made = self._made(sources, model, read)
        if list(made) != [self.name]:
            raise ValueError(f"tensors of {self.name} must make it alone, got {', '.join(made)}")
        return made[self.name]

    def _made(self, sources: dict[str, list[str]], model: PreTrainedModel, read: Read) -> dict[str, Tensor]:
        transform = copy.deepcopy(self.transform)
        for pattern, names in sources.items():
            for name in names:
                transform.add_tensor(self.name, name, pattern, functools.partial(read, name))
        made = transform.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Layer:
    """The experts of one module, on the meta device, and the weights that they are packed from."""

    name: str
    model: PreTrainedModel
    module: PackedExperts
    weights: list[Weight]

    @property
    def sources(self) -> list[str]:
        return [name for weight in self.weights for names in weight.sources.values() for name in names]

    @property
    def num_experts(self) -> int:
        return len(getattr(self.module, weight_names(self.module)[0]))

    def empty(self) -> dict[str, Tensor]:
        """The packed tensors without their memory, by the names that save_pretrained gives them.

        sub1, whose codes have a size only once they are there, with two bits a weight.
        """
        return self.saved(self._allocated())

    def pack(self, dtype: torch.dtype, read: Read) -> dict[str, Tensor]:
        """The packed tensors of what read gives, bit for bit as from_pretrained in dtype and quantize_ make them."""
        module = copy.deepcopy(self.module)
        for place, attribute, weight in zip(("w1", "w2"), weight_names(module), self.weights, strict=True):
            read_as = functools.partial(_read_as, read, kept(self.model, dtype, weight.name))
            shape = getattr(module, attribute).shape
            module.pack_each_(place, weight.experts(shape, self.model, read_as), shape)
        return self.saved(module)

    def saved(self, module: PackedExperts) -> dict[str, Tensor]:
        """The parts of the module, packed, by the names that save_pretrained gives them."""
        return {name: getattr(module, part) for part, name in self._names(module).items()}

    def hold_(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Makes the float module the packed one whose tensors save_pretrained has named."""
        quantized_(module, self.module.format, self.module.precision)
        for place in ("w1", "w2"):
            module.allocate_(place)
        for part, name in self._names(module).items():
            setattr(module, part, tensors[name])

    def entry(self, shapes: Mapping[str, tuple[int, ...]]) -> list[list] | None:
        """What MoertConfig.experts says of the module with tensors of these shapes; None where the format says it."""
        fmt = self.module.format
        if not isinstance(fmt, SubOneBit):
            return None
        names = self._names(self._allocated())
        return [[fmt.spelling, fmt.group, shapes[names[f"{place}_codes"]][0]] for place in ("w1", "w2")]

    def _allocated(self) -> PackedExperts:
        module = copy.deepcopy(self.module)
        for place, attribute in zip(("w1", "w2"), weight_names(module), strict=True):
            sized = isinstance(module.format, SubOneBit)
            module.allocate_(place, codewords=getattr(module, attribute).numel() // 8 if sized else None)
        return module

    def _names(self, module: PackedExperts) -> dict[str, str]:
        """What save_pretrained calls the parts of the module."""
        mark = torch.empty(0, device="meta")
        names = {part: f"{self.name}.{part}" for part in module.dtypes()}
        return {part: next(iter(revert_weight_conversion(self.model, {name: mark}))) for part, name in names.items()}


def layers(model: PreTrainedModel, config: MoertConfig, names: Iterable[str]) -> list[Layer]:
    """The layers of the model, on the meta device, that config packs; names are those of the checkpoint's tensors."""
    check_skip(model, config.skip)
    chosen = chosen_experts(model, config.skip)
    weights, tied = weights_of(model, names), model.all_tied_weights_keys
    fmt = any_format_of(config.format, config.group)
    found = []
    for name, module in chosen.items():
        own = [f"{name}.{attribute}" for attribute in weight_names(module)]
        own = [key if key in weights else tied.get(key, key) for key in own]  # DiffusionGemma's encoder: its decoder's
        if missing := [key for key in own if key not in weights]:
            raise ValueError(f"checkpoint must hold tensors for {missing[0]}, got none")
        packed = quantized_(module, fmt, config.precision)
        found.append(Layer(name, model, packed, [weights[key] for key in own]))
    return found


def weights_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Weight]:
    """Every tensor under the weight of the model that it belongs to, as transformers' loader collects them."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    meta, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Weight] = {}
    for name in sorted(names, key=dot_natural_key):  # the experts of a list in the order of their numbers
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if renamed not in meta and name in meta:
            renamed, pattern = rename_source_key(name, [], [], prefix, meta)
        if renamed not in found:
            transform = WeightRenaming(name, renamed) if pattern is None else by_pattern[pattern]
            found[renamed] = Weight(renamed, transform)
        found[renamed].sources.setdefault(pattern or name, []).append(name)
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]  # what save_pretrained will undo
    return {weight.name: weight for each in found.values() for weight in _dealt_out(each)}


def check_shapes(model: PreTrainedModel, stored: Mapping[str, tuple[int, ...]]) -> None:
    """An error where tensors of these shapes make no weights of the model's, which is on the meta device.

    Before it is loaded: the loader allocates what is missing or of another shape at the size that the config says.
    """

    def read(name: str) -> Tensor:
        return torch.empty(stored[name], device="meta")

    left = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for weight in list(weights_of(model, stored).values()):
        try:
            made = weight.made(model, read)
        except Exception:  # whatever operations of transformers raise: the loader will say it of the tensors
            made = {}
        for name, tensor in made.items():
            if (wanted := left.pop(name, None)) is not None:
                _check_shape(name, tensor.shape, wanted)
    missing = sorted(left.keys() - model.all_tied_weights_keys.keys())
    held = sum(prod(shape) for shape in stored.values())
    if sum(prod(left[name]) for name in missing) > held:  # else they cost little, and the loader says it
        raise ValueError(f"checkpoint must hold every weight, got none for {missing[0]} and {len(missing) - 1} more")


def _dealt_out(weight: Weight) -> list[Weight]:
    """The weights of several modules whose experts are one list in the checkpoint, each of its share; else itself.

    Ernie 4.5 VL: of the experts 0 … 2E - 1 the first half reads text, the other pictures.
    """
    operations = getattr(weight.transform, "operations", None) or [None]
    if type(operations[0]) is not ErnieFuseAndSplitTextVisionExperts:
        return [weight]
    (dealing,), targets = operations, weight.transform.target_patterns
    within = [Concatenate(dealing.concat_dim)] if len(weight.transform.source_patterns) > 1 else []
    dealt = []
    for i, target in enumerate(targets):
        transform = WeightConverter(
            weight.transform.source_patterns, target, [MergeModulelist(dealing.stack_dim), *within]
        )
        shares = {p: dealing.split_list_into_chunks(names, len(targets))[i] for p, names in weight.sources.items()}
        dealt.append(Weight(weight.name.replace(targets[0], target), transform, shares))
    return dealt


def _check_shape(name: str, got: torch.Size, wanted: torch.Size) -> None:
    if got != wanted:
        raise ValueError(f"{name} must have shape {list(wanted)} by the config, got {list(got)}")


def _read_as(read: Read, dtype: torch.dtype, name: str) -> Tensor:
    tensor = read(name)
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    return tensor.to(dtype)


def kept(model: PreTrainedModel, dtype: torch.dtype, name: str, else_as: torch.dtype | None = None) -> torch.dtype:
    """The dtype of one weight: some classes keep weights in float32, others are of else_as (None: dtype)."""
    plan = model._get_dtype_plan(dtype)
    found = None
    if plan:
        pattern, globs, _ = build_glob_alternation(list(plan))
        found = pattern.search(name)
    return plan[globs[found.lastgroup]] if found else else_as or dtype
