"""Quantized matrices as other libraries write them, from their published layouts and apart from moert's readers.

w float32 [rows, columns] -> (parts by name, the float32 weights that those stand for).
"""

import numpy as np
import torch

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the row of eight at each place of a word


def affine(w, group, symmetric):
    """codes int64 [rows, columns], zeros int64 and scales float16 [rows, groups]: plain rounding."""
    w = w.double().numpy()
    rows, columns = w.shape
    group = columns if group == -1 else group
    codes, zeros, scales = [], [], []
    for start in range(0, columns, group):
        part = w[:, start : start + group]
        if symmetric:
            scale, zero = np.abs(part).max(1) / 7, np.full(rows, 8)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / 15
            zero = np.rint(-low / scale)
        scale = scale.astype(np.float16)
        codes.append(np.clip(np.rint(part / scale[:, None]) + zero[:, None], 0, 15))
        zeros.append(zero)
        scales.append(scale)
    return np.concatenate(codes, 1).astype(np.int64), np.stack(zeros, 1).astype(np.int64), np.stack(scales, 1)


def value(codes, zeros, scales, groups):
    """float32 weights: (code - zero) * scale of the column's group, exact in float64."""
    w = (codes - zeros[:, groups]) * scales.astype(np.float64)[:, groups]
    return torch.from_numpy(w.astype(np.float32))


def words(numbers, axis, order=range(8)):
    """Numbers below 16, eight a 32-bit word along the axis; order says which lies at each place from the lowest."""
    moved = np.moveaxis(numbers, axis, -1)
    out = np.zeros((*moved.shape[:-1], moved.shape[-1] // 8), np.uint32)
    for place, index in enumerate(order):
        out |= moved[..., index::8].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(out, -1, axis)).view(np.int32))


def gptq(w, group=32, symmetric=True, v1=True, act_order=False):
    columns = w.shape[1]
    width = columns if group == -1 else group
    order = np.arange(columns)
    if act_order:
        order = np.random.default_rng(1).permutation(columns)  # the columns in the order of their groups
    codes, zeros, scales = affine(w[:, order], group, symmetric)
    groups, back = np.empty(columns, np.int64), np.empty_like(codes)
    groups[order], back[:, order] = np.arange(columns) // width, codes
    parts = {
        "qweight": words(back.T, 0),
        "qzeros": words(zeros.T - (1 if v1 else 0), 1),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return parts, value(back, zeros, scales, groups)


def awq(w, group=32):
    codes, zeros, scales = affine(w, group, symmetric=False)
    groups = np.arange(w.shape[1]) // (w.shape[1] if group == -1 else group)
    parts = {
        "qweight": words(codes.T, 1, AWQ_ORDER),
        "qzeros": words(zeros.T, 1, AWQ_ORDER),
        "scales": torch.from_numpy(scales.T.copy()),
    }
    return parts, value(codes, zeros, scales, groups)


def fp8(w):
    rows, columns = w.shape
    scales = torch.ones(-(-rows // 128), -(-columns // 128))
    codes, expected = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = w[block].abs().max() / 448
            codes[block] = (w[block] / scales[i, j]).to(torch.float8_e4m3fn)
            expected[block] = codes[block].float() * scales[i, j]
    return {"weight": codes, "weight_scale_inv": scales}, expected


def mxfp4(w):
    """blocks and scales of w [..., rows, columns]: OCP's rounding by a table of the 16 values."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([table, -table])
    groups = w.unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1).log2().floor().clamp(-120, 120) - 2
    codes = (groups[..., None] / exponent.exp2()[..., None, None] - table).abs().argmin(-1)
    parts = {
        "blocks": (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8),
        "scales": (exponent + 127).to(torch.uint8),
    }
    return parts, (table[codes] * exponent.exp2()[..., None]).flatten(-2)


def spoiled(parts, data, st):
    """The parts with one of the faults that a hostile file has."""
    parts = {name: tensor.clone() for name, tensor in parts.items()}
    name = data.draw(st.sampled_from(sorted(parts)))
    fault = data.draw(st.sampled_from(["bytes", "bytes", "bytes", "shorter", "type", "gone", "flat"]))
    tensor = parts[name]
    if fault == "bytes":
        octets = tensor.reshape(-1).view(torch.uint8)
        for _ in range(data.draw(st.integers(1, 4))):
            octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    elif fault == "shorter":
        dim = data.draw(st.integers(0, tensor.dim() - 1))
        parts[name] = tensor.narrow(dim, 0, data.draw(st.integers(0, tensor.shape[dim] - 1)))
    elif fault == "type":
        parts[name] = tensor.to(data.draw(st.sampled_from([torch.float64, torch.int16, torch.bool])))
    elif fault == "flat":
        parts[name] = tensor.flatten()
    else:
        del parts[name]
    return parts
