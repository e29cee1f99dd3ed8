"""K-quants of ggml by their published layout, rounded plainly: the gguf package reads them and writes none."""

import numpy as np

K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")


def k_quantize(w: np.ndarray, name: str) -> np.ndarray:
    """w float32 [..., columns], columns a multiple of 256 -> blocks uint8 [..., bytes]."""
    blocks = w.reshape(-1, 256)
    octets = _q6_k(blocks) if name == "Q6_K" else _q45_k(blocks, int(name[1]))
    return octets.reshape(*w.shape[:-1], -1)


def _q45_k(w, bits):
    """w = d * scale * code - dmin * least: scale and least 6 bits of 32 columns, d and dmin float16 of 256."""
    groups = w.reshape(-1, 8, 32)
    least = np.maximum(-groups.min(2), 0)
    scale = (groups.max(2) + least) / (2**bits - 1)
    d, dmin = (_half(part.max(1) / 63) for part in (scale, least))
    scale, least = _codes(scale, d, 63), _codes(least, dmin, 63)
    step = (scale * d.astype(np.float32))[:, :, None]
    offset = (least * dmin.astype(np.float32))[:, :, None]
    codes = _codes(groups + offset, step, 2**bits - 1)
    head = [d.view(np.uint8), dmin.view(np.uint8), _six_bits(scale, least)]
    pairs = codes.reshape(-1, 4, 2, 32)  # the low four bits: columns j and 32 + j of 64 in a byte
    low = (pairs[:, :, 0] & 15 | (pairs[:, :, 1] & 15) << 4).reshape(-1, 128)
    if bits == 4:
        return np.concatenate([*head, low], 1)
    fifth = np.packbits(codes >> 4, 1, bitorder="little").reshape(-1, 32)  # bit i of byte j: column 32 i + j
    return np.concatenate([*head, fifth, low], 1)


def _six_bits(scale, least):
    """Eight scales and eight leasts: the low six bits of the first four of each, and the others in what is left."""
    low = scale[:, :4] | scale[:, 4:] >> 4 << 6, least[:, :4] | least[:, 4:] >> 4 << 6
    return np.concatenate([*low, scale[:, 4:] & 15 | (least[:, 4:] & 15) << 4], 1)


def _q6_k(w):
    """w = d * scale * (code - 32): scale int8 of 16 columns, d float16 of 256, last in the block."""
    groups = w.reshape(-1, 16, 16)
    scale = np.abs(groups).max(2) / 31
    d = _half(scale.max(1) / 127)
    scale = _codes(scale, d, 127)
    codes = _codes(groups + 32 * (step := (scale * d.astype(np.float32))[:, :, None]), step, 63).reshape(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4  # of 128 columns: 32 j + i in byte i of the high bits, two bits a j
    low = np.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2)
    high = (high << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(2, dtype=np.uint8)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), scale.view(np.uint8), d.view(np.uint8)], 1)


def _half(values):
    return values.astype(np.float16)[:, None]


def _codes(values, step, most):
    """The nearest multiple of step, 0 where that is 0."""
    step = np.asarray(step, np.float32)
    safe = np.where(step == 0, 1, step)
    return np.where(step == 0, 0, np.rint(values / safe)).clip(0, most).astype(np.uint8)
