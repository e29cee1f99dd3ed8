"""GluExperts as calibration reads them (moert.quant.calibration)."""

from torch import Tensor, nn

from moert.experts.glu import GluExperts
from moert.experts.quantized import PROJECTIONS, QuantizedExperts, bias_of, matrix_of, shape_of
from moert.experts.sub_one_bit import SubOneBitExperts
from moert.ops.fused_experts import apply_activation
from moert.quant.float_experts import FloatExperts, Packed
from moert.quant.sub1 import SubOneBitTensor
from moert.types import Onto, Routing


class FloatGluExperts(FloatExperts):
    """The GluExperts that `owner` has as `attribute`."""

    def __init__(self, owner: nn.Module, attribute: str, precision: str = "auto"):
        self.owner, self.attribute, self.precision = owner, attribute, precision
        self.module: GluExperts = getattr(owner, attribute)
        self.bias = bias_of(self.module, "gate_up_proj")
        self.shapes = tuple(shape_of(self.module, name) for name in PROJECTIONS)

    def inputs(self, x: Tensor, routing: Routing, onto: Onto | None = None) -> tuple[Tensor, Tensor]:
        return x, routing.ids

    def matrix(self, place: int, e: int) -> Tensor:
        return matrix_of(self.module, PROJECTIONS[place], e).float()

    def middle(self, h: Tensor, e: int) -> Tensor:
        return apply_activation(h if self.bias is None else h + self.bias[e].float(), self.module.activation)

    def replace(self, packed: tuple[Packed, Packed]) -> None:
        if isinstance(packed[0], SubOneBitTensor):
            experts = SubOneBitExperts.holding(self.module, packed, self.precision)
        else:
            experts = QuantizedExperts.holding(self.module, packed, self.precision)
        setattr(self.owner, self.attribute, experts)
        self.module = experts  # the float one may go
