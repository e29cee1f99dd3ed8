"""fp8 e4m3 with a float32 scale a block of 128 x 128, the format of DeepSeek-V3's checkpoints."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from moert import _C
from moert.pages import in_large_pages
from moert.quant.format import Format, PackedTensor, flat, float_weights


@dataclass(frozen=True)
class Fp8(Format):
    """8 bits: w = scale * e4m3(code), scale = max|w| / 448 of 128 rows x 128 columns, float32.

    Packed scales are [..., ceil(rows / 128), ceil(columns / 128)]: DeepSeek's `weight_scale_inv`.
    """

    name = "fp8"
    scale_dtype = torch.float32
    codes_per_byte = 1

    @property
    def block(self) -> tuple[int, int]:
        return 128, 128

    def nbytes(self, shape: tuple[int, ...]) -> int:
        *matrices, rows, columns = shape
        return prod(matrices) * (rows * 16 * -(-columns // 16) + 4 * -(-rows // 128) * -(-columns // 128))

    def empty(self, shape: tuple[int, ...]) -> PackedTensor:
        *matrices, rows, columns = shape
        codes = in_large_pages(torch.empty(*matrices, rows, 16 * -(-columns // 16), dtype=torch.uint8)).zero_()
        return PackedTensor(self, columns, codes, torch.zeros(*matrices, -(-rows // 128), -(-columns // 128)))

    def check_values(self, packed: PackedTensor) -> None:
        if not packed.scales.isfinite().all():
            raise ValueError(f"scales must be finite for {self}, got inf or nan")
        self.check_codes(packed.codes, packed.columns)

    def foreign(self, codes: Tensor) -> Tensor:
        return codes & 0x7F == 0x7F  # NaN

    def pack(self, w: Tensor) -> PackedTensor:
        w = float_weights(w)
        parts = _C.fp8_quantize(flat(w, 2).numpy(), torch.get_num_threads())
        codes, scales = (torch.from_numpy(part).view(*w.shape[:-2], *part.shape[1:]) for part in parts)
        return PackedTensor(self, w.shape[-1], codes, scales)

    def unpack(self, packed: PackedTensor) -> Tensor:
        self.check(packed)
        codes, scales = flat(packed.codes, 2).numpy(), flat(packed.scales, 2).numpy()
        w = _C.fp8_dequantize(codes, scales, packed.columns, torch.get_num_threads())
        return torch.from_numpy(w).view(packed.shape)


def pack_ref(w: Tensor) -> tuple[Tensor, Tensor]:
    """w float32 [rows, columns] -> codes uint8 [rows, row_bytes], scales float32 by block, with torch's own float8."""
    rows, columns = w.shape
    scales = w.new_zeros(-(-rows // 128), -(-columns // 128))
    codes = torch.zeros(rows, 16 * -(-columns // 16), dtype=torch.uint8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, min(rows, 128 * i + 128)), slice(128 * j, min(columns, 128 * j + 128)))
            scales[i, j] = w[block].abs().max() / 448
            if scales[i, j]:
                scaled = (w[block] / scales[i, j]).clamp(-448, 448)
                codes[block] = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, scales


def unpack_ref(codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    """The way back from pack_ref: w float32 [rows, columns]."""
    w = codes[:, :columns].contiguous().view(torch.float8_e4m3fn).float()
    return w * scales.repeat_interleave(128, 0)[: len(w)].repeat_interleave(128, 1)[:, :columns]
