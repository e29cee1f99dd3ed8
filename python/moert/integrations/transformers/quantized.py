"""Experts of transformers' experts interface over packed weights, one class made from each of theirs.

Letters as in moert.types.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moert.experts.lora import PackedWeights
from moert.experts.quantized import activated, gates_first
from moert.integrations.transformers.gates import fused_activation
from moert.ops.fused_experts_quantized import fused_experts_quantized
from moert.quant.format import PARTS, Format, PackedTensor
from moert.quant.sub1 import PARTS as SUB_ONE_BIT_PARTS
from moert.quant.sub1 import SubOneBit, SubOneBitTensor
from moert.types import Routing


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of transformers' interface in the model, packed or not, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "is_concatenated")}


def weight_names(experts: nn.Module) -> tuple[str, str]:
    """What the class calls its two weights."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def quantized_(experts: nn.Module, fmt: Format | SubOneBit, precision: str) -> "PackedExperts":
    """Gives the module the class of packed experts; its weights stay as they are until pack_ or allocate_."""
    experts.__class__ = quantized_class(type(experts))
    experts.format, experts.precision = fmt, precision
    experts._is_hf_initialized = True  # transformers' initialisation of the class knows float weights only
    return experts


class PackedExperts(PackedWeights, nn.Module):
    """The forward of experts whose two weights are packed [E, 2I, H] and [E, H, I]: buffers w1_codes, w1_scales, …

    Scales in float are kept as bits, int16 or int32, so that casting the model cannot round them.  A gate that
    fused_experts knows runs on the packed weights (gate rows first, however the class lays them); any other, and
    adapters, run product by product, a few experts unpacked at a time.
    """

    format: Format | SubOneBit
    precision: str

    def pack_(self, place: str, weight: Tensor) -> None:
        """Packs the float weight, in the class's layout, as "w1" or "w2", and drops the parameter that it was."""
        self.pack_each_(place, weight.detach(), weight.shape)

    def pack_each_(self, place: str, experts: Iterable[Tensor], shape: torch.Size) -> None:
        """The same of a weight of this shape whose experts come one after the other."""
        rows = (self._rows(w) for w in experts)
        fused = self._fused
        mixed = place == "w1" and fused is not None and fused[1]
        with torch.device("cpu"):
            packed = self.format.pack_each((gates_first(w, 0) for w in rows) if mixed else rows, self._rows_of(shape))
            self.hold_(place, packed)

    def take_(self, place: str, packed: PackedTensor, in_halves: bool = False) -> None:
        """Packed rows [E, rows, columns] as "w1" or "w2", in place of the parameter: in the class's order of rows or,
        in_halves, gate rows before up rows."""
        name = weight_names(self)[place == "w2"]
        if (wanted := self._rows(getattr(self, name)).shape) != packed.shape:
            raise ValueError(f"{name} must have shape {list(wanted)} by the config, got {list(packed.shape)}")
        fused = self._fused
        if place == "w1" and fused is not None and fused[1] and not in_halves:
            if packed.format.block[0] > 1:
                raise ValueError(
                    f"{name} must have its gate rows before its up rows in {packed.format}, got both by turns"
                )
            parts = (getattr(packed, part) for part in PARTS)
            parts = [None if part is None else gates_first(part, 1) for part in parts]
            packed = PackedTensor(packed.format, packed.columns, *parts)
        self.hold_(place, packed)

    def allocate_(self, place: str, fmt: Format | SubOneBit | None = None, codewords: int | None = None) -> None:
        """Buffers of the packed weight's size in place of the parameter, on the meta device; codewords are of sub1."""
        shape, fmt = getattr(self, weight_names(self)[place == "w2"]).shape, fmt or self.format
        size = () if codewords is None else (codewords,)
        with torch.device("meta"):
            self.hold_(place, fmt.empty(self._rows_of(shape), *size))

    def dtypes(self) -> dict[str, torch.dtype]:
        """What every part must be: bytes of another format may have the same shape."""
        empty = {place: getattr(self, f"{place}_format").empty((0, 0, 0)) for place in ("w1", "w2")}
        parts = {f"{at}_{part}": getattr(packed, part) for at, packed in empty.items() for part in _parts_of(packed)}
        return {name: _bits(value).dtype for name, value in parts.items() if value is not None}

    def packed(self, place: str) -> PackedTensor | SubOneBitTensor:
        fmt = getattr(self, f"{place}_format")
        if isinstance(fmt, SubOneBit):
            parts = [getattr(self, f"{place}_{part}") for part in SUB_ONE_BIT_PARTS]
            return SubOneBitTensor(getattr(self, f"{place}_columns"), *parts[:-1], parts[-1].view(torch.bfloat16))
        scales = getattr(self, f"{place}_scales")
        scales = scales if scales.dtype == torch.uint8 else scales.view(fmt.scale_dtype)
        codes, zeros = getattr(self, f"{place}_codes"), getattr(self, f"{place}_zeros", None)
        return PackedTensor(fmt, getattr(self, f"{place}_columns"), codes, scales, zeros)

    def packed_pair(self) -> tuple[PackedTensor, PackedTensor]:
        return self.packed("w1"), self.packed("w2")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k] -> [T, H], as experts_forward."""
        x, w1, w2 = hidden_states, self.packed("w1"), self.packed("w2")
        weights = top_k_weights.to(x.dtype if top_k_weights.dtype == x.dtype else torch.float32)
        routing = Routing(top_k_index, weights, w1.shape[0])
        fused = self._fused
        b1, b2 = self._biases(x.dtype)
        if fused is None:
            return self.run_unfused(x, routing, (b1, b2), self._own_gate, self._own_norm)
        activation, interleaved = fused
        b1 = gates_first(b1, 1) if interleaved and b1 is not None else b1
        if any(self.adapters):
            return self.run_unfused(x, routing, (b1, b2), lambda h: activated(h, activation), lambda y: y)
        return fused_experts_quantized(x, routing, w1, w2, (b1, b2), activation, self.precision)

    def extra_repr(self) -> str:
        E, rows, H = self.packed("w1").shape
        sizes = f"num_experts={E}, hidden={H}, intermediate={self.w2_columns}"
        formats = dict.fromkeys((self.w1_format, self.w2_format))
        return f"{sizes}, format={', '.join(map(str, formats))}, precision={self.precision}"

    @property
    def _fused(self):
        return None if self.has_post_expert_norm else fused_activation(self)

    def _own_gate(self, h_SI: Tensor) -> Tensor:
        return self._apply_gate(h_SI) if self.has_gate else self.act_fn(h_SI)

    def _own_norm(self, y_SH: Tensor) -> Tensor:
        return self.post_expert_norm(y_SH) if self.has_post_expert_norm else y_SH

    def _rows(self, weight: Tensor) -> Tensor:
        """The weight as [E, rows, columns], or an expert's as [rows, columns]."""
        return weight.mT if self.is_transposed else weight

    def _rows_of(self, shape: torch.Size) -> torch.Size:
        E, *matrix = shape
        return torch.Size([E, *(reversed(matrix) if self.is_transposed else matrix)])

    def _biases(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        if not self.has_bias:
            return None, None
        return tuple(getattr(self, f"{name}_bias").to(dtype) for name in weight_names(self))

    def hold_(self, place: str, packed: PackedTensor) -> None:
        """The parts of packed as buffers, in place of the parameter."""
        for part in _parts_of(packed):
            if (value := getattr(packed, part)) is not None:
                self.register_buffer(f"{place}_{part}", _bits(value))
        setattr(self, f"{place}_columns", packed.columns)
        setattr(self, f"{place}_format", packed.format)
        delattr(self, weight_names(self)[place == "w2"])


@functools.cache
def quantized_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of packed experts made from a class of transformers' interface."""
    members = {"unpacked_class": cls, "__reduce_ex__": _reduce, "__module__": __name__}
    return type(f"Quantized{cls.__name__}", (PackedExperts, cls), members)


def _reduce(self, protocol):
    """A copy is made through the class that can be imported."""
    return _remake, (type(self).unpacked_class,), self.__dict__


def _remake(cls: type[nn.Module]) -> nn.Module:
    made = quantized_class(cls)
    return made.__new__(made)


def _parts_of(packed: PackedTensor | SubOneBitTensor) -> tuple[str, ...]:
    return SUB_ONE_BIT_PARTS if isinstance(packed, SubOneBitTensor) else PARTS


def _bits(part: Tensor) -> Tensor:
    if not part.dtype.is_floating_point:
        return part
    return part.view(torch.int16 if part.itemsize == 2 else torch.int32)
