"""Feed-forward experts over packed weights (moert.quant, docs/quantized.md)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moert.experts.base import Experts
from moert.experts.glu import GluExperts
from moert.experts.lora import PackedWeights
from moert.ops.fused_experts import apply_activation
from moert.ops.fused_experts_quantized import fused_experts_quantized
from moert.quant.format import PARTS, Format, PackedTensor
from moert.types import Activation, Routing

PROJECTIONS = ("gate_up_proj", "down_proj")
Parts = Mapping[str, Tensor | None]  # gate_up_proj_codes and so on


class QuantizedExperts(PackedWeights, Experts):
    """num_experts feed-forward networks of one shape, frozen: gate_up_proj [E, 2I, H], down_proj [E, H, I] in formats.

    Buffers: gate_up_proj_codes, _scales, _zeros, down_proj_codes … as PackedTensor has them, gate_up_proj_bias and
    down_proj_bias.  A conversion of the module to another dtype leaves the packed parts as they are.  A state dict
    names its formats and loads only into the same ones.  A new module is all zeros: load, or `pack` float experts.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        formats: tuple[Format, Format],
        activation: str | Activation = "swiglu",
        bias: bool = False,
        precision: str = "auto",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_experts, self.hidden, self.intermediate = num_experts, hidden, intermediate
        self.activation = Activation.of(activation)
        self.formats, self.precision = formats, precision
        width = 2 * intermediate if self.activation.gated else intermediate
        shapes = (num_experts, width, hidden), (num_experts, hidden, intermediate)
        for name, fmt, shape in zip(PROJECTIONS, formats, shapes, strict=True):
            packed = fmt.empty(shape)
            for part in PARTS:
                self.register_buffer(f"{name}_{part}", getattr(packed, part))
            self.register_buffer(f"{name}_bias", torch.zeros(shape[:2], dtype=dtype) if bias else None)

    @classmethod
    def pack(cls, experts: GluExperts, formats: tuple[Format, Format], precision: str = "auto") -> "QuantizedExperts":
        """The experts in (the format of gate_up_proj, that of down_proj), in Hugging Face's default layout.

        One expert at a time, so that no more than one is there in float32.
        """
        packed = [
            fmt.pack_each((matrix_of(experts, name, e) for e in range(experts.num_experts)), shape_of(experts, name))
            for name, fmt in zip(PROJECTIONS, formats, strict=True)
        ]
        return cls.holding(experts, tuple(packed), precision)

    @classmethod
    def holding(
        cls, experts: GluExperts, packed: tuple[PackedTensor, PackedTensor], precision: str = "auto"
    ) -> "QuantizedExperts":
        """The experts over weights that were packed from theirs, gate rows first."""
        bias = experts.down_proj_bias is not None
        sizes = experts.num_experts, experts.hidden, experts.intermediate
        with torch.device("meta"):  # every buffer is replaced
            out = cls(*sizes, tuple(w.format for w in packed), experts.activation, bias, precision)
        for name, w in zip(PROJECTIONS, packed, strict=True):
            for part in PARTS:
                setattr(out, f"{name}_{part}", getattr(w, part))
            setattr(out, f"{name}_bias", bias_of(experts, name))
        return out.train(experts.training)

    def packed_pair(self) -> tuple[PackedTensor, PackedTensor]:
        return self.packed()

    def packed(self) -> tuple[PackedTensor, PackedTensor]:
        return self._packed_of(parts_of(self, PARTS))

    def _packed_of(self, parts: Parts) -> tuple[PackedTensor, PackedTensor]:
        columns = self.hidden, self.intermediate
        return tuple(
            PackedTensor(fmt, K, *(parts[f"{name}_{part}"] for part in PARTS))
            for name, fmt, K in zip(PROJECTIONS, self.formats, columns, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Of the packed weights, scales included."""
        return sum(w.nbytes for w in self.packed())

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        bias = self.gate_up_proj_bias, self.down_proj_bias
        if any(self.adapters):
            return self.run_unfused(x, routing, bias, lambda h: activated(h, self.activation), lambda y: y)
        return fused_experts_quantized(x, routing, *self.packed(), bias, self.activation, self.precision)

    def get_extra_state(self) -> Tensor:
        """The formats as text, in a tensor: what every container of tensors can hold."""
        return torch.tensor(list(self._format_text().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if (text := bytes(state.tolist()).decode()) != self._format_text():
            raise ValueError(f"state_dict must hold experts in {self._format_text()}, got {text}")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        check_state(self, parts_of(self, PARTS), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _format_text(self) -> str:
        return ", ".join(map(_format_text, self.formats))

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        before = {name: t for name, t in parts_of(self, PARTS).items() if t is not None}
        super()._apply(fn, recurse)
        for name, packed in before.items():
            if (moved := self._buffers[name]).dtype != packed.dtype:  # bits are not numbers to convert
                self._buffers[name] = packed.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden={self.hidden}, intermediate={self.intermediate}, "
            f"activation={self.activation.name}, bias={self.down_proj_bias is not None}, "
            f"formats=({self._format_text()}), precision={self.precision}"
        )


def parts_of(module: nn.Module, parts: tuple[str, ...]) -> Parts:
    return {name: getattr(module, name) for name in (f"{name}_{part}" for name in PROJECTIONS for part in parts)}


def check_state(module: nn.Module, own: Parts, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Before any of it is loaded: formats, types and values, whether or not the state dict names its formats.

    own: the module's parts; copying into one would round or wrap what is of another type.
    """
    if f"{prefix}_extra_state" in state_dict:
        module.set_extra_state(state_dict[f"{prefix}_extra_state"])
    loaded = {}
    for name, part in own.items():
        value = state_dict.get(prefix + name)
        if part is None or not isinstance(value, Tensor):
            continue
        if value.dtype != part.dtype:
            raise ValueError(f"{prefix}{name} must be {part.dtype}, got {value.dtype}")
        if value.shape == part.shape:  # any other torch refuses and does not load
            loaded[name] = value
    after = {**own, **loaded}
    if not loaded or any(part is not None and part.is_meta for part in after.values()):
        return
    for packed in module._packed_of(after):
        packed.format.check_values(packed)


def _format_text(fmt: Format) -> str:
    return fmt.spelling if fmt.spelling == "fp8" else f"{fmt.spelling} group {fmt.group or 'row'}"


def shape_of(experts: GluExperts, name: str) -> torch.Size:
    """[E, rows, columns] of gate_up_proj or down_proj, whatever its layout."""
    weights = getattr(experts, name)
    return weights.mT.shape if experts.layout.transposed else weights.shape


def matrix_of(experts: GluExperts, name: str, e: int) -> Tensor:
    """The matrix [rows, columns] of expert e, gate rows first."""
    weight = getattr(experts, name).detach()[e]
    weight = weight.mT if experts.layout.transposed else weight
    return gates_first(weight, 0) if _mixed(experts, name) else weight


def bias_of(experts: GluExperts, name: str) -> Tensor | None:
    """A copy of the bias [E, rows], gate rows first."""
    if (bias := getattr(experts, f"{name}_bias")) is None:
        return None
    return (gates_first(bias, 1) if _mixed(experts, name) else bias).detach().clone()


def _mixed(experts: GluExperts, name: str) -> bool:
    return name == "gate_up_proj" and experts.layout.interleaved and experts.activation.gated


def activated(h: Tensor, activation: Activation) -> Tensor:
    """The activation in float32 (float64 of float64), rounded once."""
    return apply_activation(h.to(torch.promote_types(h.dtype, torch.float32)), activation).to(h.dtype)


def gates_first(rows: Tensor, dim: int) -> Tensor:
    """Alternating gate and up rows along a dimension -> all gates, then all ups."""
    return rows.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)
