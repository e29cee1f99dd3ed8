"""Feed-forward experts in QMoE's sub-1-bit code (moert.quant.sub1, arXiv 2310.16795)."""

import torch
from torch import Tensor

from moert.experts.base import Experts
from moert.experts.glu import GluExperts
from moert.experts.lora import PackedWeights
from moert.experts.quantized import PROJECTIONS, Parts, activated, bias_of, check_state, parts_of
from moert.ops.fused_experts_quantized import fused_experts_quantized
from moert.quant.sub1 import PARTS, SubOneBitTensor, dictionary_hash
from moert.types import Activation, Routing


class SubOneBitExperts(PackedWeights, Experts):
    """QuantizedExperts in the dictionary code.

    Buffers gate_up_proj_codes, _row_ptr, _matrix_base,
    _minmax (bfloat16 as int16 bits), down_proj_codes …; a state dict names its dictionary.  A new module holds no
    codes: load into it, or make it by moert.quantize_.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        activation: str | Activation = "swiglu",
        bias: bool = False,
        precision: str = "auto",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.precision = precision
        self.num_experts, self.hidden, self.intermediate = num_experts, hidden, intermediate
        self.activation = Activation.of(activation)
        rows = 2 * intermediate if self.activation.gated else intermediate, hidden
        for name, N in zip(PROJECTIONS, rows, strict=True):
            sizes = {"codes": (0,), "row_ptr": (num_experts, N + 1), "matrix_base": (num_experts + 1,)}
            sizes["minmax"] = num_experts, N, 2
            kinds = torch.uint16, torch.int32, torch.int64, torch.int16
            for part, kind in zip(PARTS, kinds, strict=True):
                self.register_buffer(f"{name}_{part}", torch.zeros(sizes[part], dtype=kind))
            self.register_buffer(f"{name}_bias", torch.zeros(num_experts, N, dtype=dtype) if bias else None)

    @classmethod
    def holding(
        cls, experts: GluExperts, packed: tuple[SubOneBitTensor, SubOneBitTensor], precision: str = "auto"
    ) -> "SubOneBitExperts":
        """The experts over weights that were packed from theirs, gate rows first."""
        sizes = experts.num_experts, experts.hidden, experts.intermediate
        out = cls(*sizes, experts.activation, experts.down_proj_bias is not None, precision)
        for name, w in zip(PROJECTIONS, packed, strict=True):
            for part in PARTS:
                value = getattr(w, part)
                setattr(out, f"{name}_{part}", value.view(torch.int16) if part == "minmax" else value)
            setattr(out, f"{name}_bias", bias_of(experts, name))
        return out.train(experts.training)

    def packed_pair(self) -> tuple[SubOneBitTensor, SubOneBitTensor]:
        return self._packed_of(parts_of(self, PARTS))

    def _packed_of(self, parts: Parts) -> tuple[SubOneBitTensor, SubOneBitTensor]:
        packed = []
        for name, K in zip(PROJECTIONS, (self.hidden, self.intermediate), strict=True):
            *others, minmax = (parts[f"{name}_{part}"] for part in PARTS)
            packed.append(SubOneBitTensor(K, *others, minmax.view(torch.bfloat16)))
        return tuple(packed)

    @property
    def nbytes(self) -> int:
        """Of the packed weights, row tables included."""
        return sum(w.nbytes for w in self.packed_pair())

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        if not len(self.gate_up_proj_codes) and self.num_experts * self.intermediate * self.hidden:
            raise RuntimeError("SubOneBitExperts must hold codes, got none: load a state_dict into them first")
        bias = self.gate_up_proj_bias, self.down_proj_bias
        if any(self.adapters):
            return self.run_unfused(x, routing, bias, lambda h: activated(h, self.activation), lambda y: y)
        return fused_experts_quantized(x, routing, *self.packed_pair(), bias, self.activation, self.precision)

    def get_extra_state(self) -> Tensor:
        """The dictionary's hash as text, in a tensor."""
        return torch.tensor(list(dictionary_hash().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if (text := bytes(state.tolist()).decode()) != dictionary_hash():
            raise ValueError(f"state_dict must be coded with dictionary {dictionary_hash()}, got {text}")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        own = parts_of(self, PARTS)
        room = {}  # for as many codewords as there are
        for name in (f"{name}_codes" for name in PROJECTIONS):
            codes = state_dict.get(prefix + name)
            if isinstance(codes, Tensor) and codes.dim() == 1:
                room[name] = own[name].new_zeros(codes.shape)
        check_state(self, {**own, **room}, state_dict, prefix)
        self._buffers.update(room)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, hidden={self.hidden}, intermediate={self.intermediate}"
        rest = f"activation={self.activation.name}, bias={self.down_proj_bias is not None}"
        return f"{sizes}, {rest}, precision={self.precision}"
