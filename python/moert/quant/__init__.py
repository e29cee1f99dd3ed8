from moert.quant.bit_nested import BitNested
from moert.quant.format import Format, PackedTensor
from moert.quant.fp8 import Fp8
from moert.quant.gptq import GPTQ
from moert.quant.int4 import Int4, Int4Asymmetric
from moert.quant.int8 import Int8
from moert.quant.mxfp4 import Mxfp4
from moert.quant.sub1 import SubOneBit, SubOneBitTensor
from moert.quant.ternary import Ternary2, Ternary5

__all__ = [
    "GPTQ",
    "BitNested",
    "Format",
    "Fp8",
    "Int4",
    "Int4Asymmetric",
    "Int8",
    "Mxfp4",
    "PackedTensor",
    "SubOneBit",
    "SubOneBitTensor",
    "Ternary2",
    "Ternary5",
]
