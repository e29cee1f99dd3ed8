"""GPTQ of a checkpoint larger than memory: the model runs layer by layer, one layer's weights read at a time.

The model's own forward is called for each layer: of the layers before it the last one's output is returned again, and
the pass ends behind it. Masks, positions and other arguments of a layer are those that the model makes.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import get_module_from_name

from moert.integrations.transformers.calibrated import FloatHfExperts
from moert.integrations.transformers.quantized import weight_names
from moert.integrations.transformers.streaming import Layer, Read, Weight, kept, weights_of
from moert.quant.calibration import calibrate_quietly_
from moert.quant.float_experts import LayerReport
from moert.quant.gptq import GPTQ
from moert.quant.quantize import check_weights


class _Left(BaseException):
    """Ends a forward pass behind the layer at work; no `except Exception` of a model is meant by it."""


class Layerwise(nn.Module):
    """Packs layers, in order, by calibration: `pack`, or `take` for those that were packed before.

    model is on the meta device, made in dtype; names are those of the checkpoint's tensors, and read gives one.  In
    memory: what the model has outside of its layers, but for the output embeddings; one layer; what it returned for
    every batch; and GPTQ's own (moert.quant.calibration).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: Iterable[str],
        read: Read,
        dtype: torch.dtype,
        layers: Iterable[Layer],
        batches: list[dict[str, Any]],
        settings: GPTQ = GPTQ(),
    ):
        super().__init__()
        self.model, self.batches, self.settings = model, batches, settings
        self.stack = _stack([layer.name for layer in layers])
        self.weights = Weights(model, names, read, dtype)
        self._taken: dict[str, tuple[Layer, Callable[[], dict[str, Tensor]]]] = {}
        self._outputs: list[Any] = []
        self._at, self._number = -1, 0
        self.eval()

    def pack(self, layer: Layer, advance: Callable[[int], None]) -> tuple[dict[str, Tensor], LayerReport]:
        """The packed tensors by the names that save_pretrained gives them; advance hears of experts that are done."""
        with torch.no_grad():
            self._reach(int(layer.name.removeprefix(f"{self.stack}.").partition(".")[0]))
        module, fmt = self.model.get_submodule(layer.name), layer.module.format
        check_weights(layer.name, *(getattr(module, name) for name in weight_names(module)))
        experts = {layer.name: FloatHfExperts(module, fmt, layer.module.precision)}
        batches = [{"number": number} for number in range(len(self.batches))]
        (report,) = calibrate_quietly_(self, experts, batches, fmt, self.settings, lambda count, _: advance(count))
        return layer.saved(module), report

    def take(self, layer: Layer, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """The layer was packed before; its tensors are asked for when a later one is packed."""
        self._taken[layer.name] = layer, tensors

    def forward(self, number: int) -> tuple[Any, list[dict]]:
        """Batch `number` as far as the layer at work; what that returns, and what mappings among its arguments hold.

        Gemma 4, for one, hands keys on to later layers in such a mapping.
        """
        self._number, returned = number, []

        def leave(module, args, kwargs, output):
            returned.append(tree_map(_copied, (output, [dict(each) for each in _mappings(args, kwargs)])))
            raise _Left

        hook = self._layers[self._at].register_forward_hook(leave, with_kwargs=True)
        try:
            with suppress(_Left):
                self.model(**self.batches[number])
        finally:
            hook.remove()
        return returned[0]

    @property
    def _layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.stack)

    def _reach(self, index: int) -> None:
        while self._at < index:
            if self._at < 0:
                self.weights.load_(self._outside())
            else:
                self._leave()
            self._at += 1
            self._enter()

    def _outside(self) -> dict[str, nn.Module]:
        """The modules that are not in the layers; the output embeddings are not reached."""
        within = {*self._layers.modules(), self.model.get_output_embeddings()}
        return {name: module for name, module in self.model.named_modules() if module not in within}

    def _enter(self) -> None:
        prefix = f"{self.stack}.{self._at}"
        modules = {f"{prefix}.{name}".rstrip("."): module for name, module in self._layers[self._at].named_modules()}
        taken = {name: self._taken.pop(name) for name in modules if name in self._taken}
        self.weights.load_({name: module for name, module in modules.items() if name not in taken})
        for name, (layer, tensors) in taken.items():
            self.weights.load_({name: modules[name]}, but=weight_names(modules[name]))
            layer.hold_(modules[name], tensors())
        if self._at == 0 and len(self._layers) > 1:
            self._check_chain(self(0)[0])

    def _leave(self) -> None:
        """What the layer at work, its experts packed, makes of every batch; then its memory is free."""
        layer = self._layers[self._at]
        self._outputs = [self(number) for number in range(len(self.batches))]
        layer.forward = partial(self._replay, self._at)
        layer.to("meta")

    def _replay(self, index: int, *args, **kwargs) -> Any:
        """In place of a layer that was left; copies, since the model may write into them."""
        output, written = tree_map(_copied, self._outputs[self._number])
        if index == self._at - 1:
            for mapping, items in zip(_mappings(args, kwargs), written, strict=True):
                mapping.update(items)
        return output

    def _check_chain(self, output: Any) -> None:
        """An error unless the model calls each layer once, in order, with no more than the one before it returned."""
        last = len(self._layers) - 1
        other = tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, output)
        calls, same = self._dry([output] * (last + 1))
        _, changed = self._dry([other] * (last - 1) + [output] * 2)
        name = type(self.model).__name__
        if calls != list(range(last + 1)):
            raise ValueError(f"model must call each layer once, in order, to be calibrated as it streams, got {name}")
        if len(same) != len(changed) or not all(map(_equal, same, changed)):
            raise ValueError(f"layers must depend on the one before to be calibrated as they stream, got {name}")

    def _dry(self, outputs: list[Any]) -> tuple[list[int], list[Any]]:
        """Which layers are called, and the last one's arguments, in a pass of a batch where they return outputs."""
        calls, arguments = [], []

        def stand_in(index, *args, **kwargs):
            calls.append(index)
            if index == len(outputs) - 1:
                arguments.extend(tree_leaves(tree_map(_copied, (args, kwargs))))
            return tree_map(_copied, outputs[index])

        def stop(*_):
            raise _Left

        output = self.model.get_output_embeddings()  # of which there are no weights here
        hook = output.register_forward_pre_hook(stop) if output is not None else None
        for index, layer in enumerate(self._layers):
            layer.forward = partial(stand_in, index)
        try:
            with suppress(_Left):
                self.model(**self.batches[0])
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)
            if hook is not None:
                hook.remove()
        return calls, arguments


class Weights:
    """The tensors of a checkpoint as the weights of a model on the meta device, made in dtype."""

    def __init__(self, model: PreTrainedModel, names: Iterable[str], read: Read, dtype: torch.dtype):
        self.model, self.read, self.dtype = model, read, dtype
        self._made_by = {target: w for w in weights_of(model, names).values() for target in w.targets}
        for module in model.modules():
            module._is_hf_initialized = True  # what initialize_weights passes over

    def load_(self, modules: Mapping[str, nn.Module], but: Sequence[str] = ()) -> None:
        """The parameters and buffers of the modules' own, as from_pretrained has them; those called `but` stay."""
        found: dict[str, Weight] = {}
        places: dict[str, list[str]] = defaultdict(list)
        for owner, module in modules.items():
            for name, empty in _stored(module).items():
                key = f"{owner}.{name}".lstrip(".")
                source = key if key in self._made_by else self.model.all_tied_weights_keys.get(key, key)
                if name in but:
                    continue
                if source in self._made_by:
                    found[self._made_by[source].name] = self._made_by[source]
                    places[source].append(key)
                elif self._may_lack(key):
                    setattr(module, name, _like(empty))
                else:
                    raise ValueError(f"checkpoint must hold tensors for {key}, got none")
        for weight in found.values():
            for source, tensor in self._made(weight).items():
                for key in places.get(source, ()):
                    self._set(key, tensor)
        self._initialize(modules.values())

    def _made(self, weight: Weight) -> dict[str, Tensor]:
        empty = self.model.get_parameter_or_buffer(weight.name)
        as_float = kept(self.model, self.dtype, weight.name, empty.dtype)

        def read(name: str) -> Tensor:
            return self.read(name).to(as_float)

        if not weight.is_a_list:
            return weight.made(self.model, read)
        whole = torch.empty(empty.shape, dtype=as_float)
        for one, expert in zip(whole, weight.experts(empty.shape, self.model, read), strict=True):
            one.copy_(expert)
        return {weight.name: whole}

    def _set(self, key: str, tensor: Tensor) -> None:
        module, name = get_module_from_name(self.model, key)
        if (wanted := getattr(module, name).shape) != tensor.shape:
            raise ValueError(f"{key} must have shape {list(wanted)} by the config, got {list(tensor.shape)}")
        value = tensor if name in module._buffers else nn.Parameter(tensor, requires_grad=False)
        value._is_hf_initialized = True
        setattr(module, name, value)

    def _may_lack(self, key: str) -> bool:
        return any(re.search(pattern, key) for pattern in self.model._keys_to_ignore_on_load_missing or ())

    def _initialize(self, modules: Iterable[nn.Module]) -> None:
        """The buffers that no checkpoint holds, such as the frequencies of rotary positions, by the model's class."""
        for module in modules:
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers[name]) is not None:
                    setattr(module, name, torch.empty_like(buffer, device="cpu"))
            module._is_hf_initialized = False
        self.model.initialize_weights()


def _stack(names: list[str]) -> str:
    """The list of layers in which all of these modules are."""
    stacks = {re.match(r"(.*?)\.\d+\.", name)[1] for name in names if re.match(r"(.*?)\.\d+\.", name)}
    if len(stacks) != 1:
        got = ", ".join(sorted(stacks)) or "none"
        raise ValueError(f"experts must be in one list of layers to be calibrated as they stream, got {got}")
    return stacks.pop()


def _stored(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of the module's own that a checkpoint holds."""
    buffers = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
    return {name: tensor for name, tensor in (module._parameters | buffers).items() if tensor is not None}


def _like(empty: Tensor) -> Tensor:
    like = torch.empty_like(empty, device="cpu")
    return nn.Parameter(like, requires_grad=False) if isinstance(empty, nn.Parameter) else like


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b)


def _mappings(args: tuple, kwargs: dict[str, Any]) -> list[MutableMapping]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, MutableMapping)]
