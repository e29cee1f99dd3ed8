"""Packed weights as hostile files: whatever the bytes are, decoding ends with a result or one clear error.

    python tests/fuzz/fuzz_packed.py FOLDER -max_total_time=60    # `make fuzz`; all options of libFuzzer

FOLDER keeps the inputs that were worth keeping, and has some random ones to begin with.

The inputs are sizes and bytes; a crash, a hang, an error of a kind that no user can read, or a result of another shape
than was promised is a finding, and its bytes are left in crash-*.  Run it over a build with the address sanitizer
(`make test-asan` makes one) to see reads outside of an array too.
"""

import struct
import sys
import tempfile
from pathlib import Path
from types import FunctionType

import atheris
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from moert import Routing, fused_experts_quantized
from moert.cli import checkpoint
from moert.cli.errors import CommandError
from moert.quant import BitNested, Fp8, Int4, Int4Asymmetric, Int8, Mxfp4, SubOneBit, Ternary2, Ternary5
from moert.quant.format import PackedTensor
from moert.quant.quantize import PRECISIONS
from moert.quant.readers import layout_of
from moert.quant.readers.ggml import Ggml
from moert.quant.readers.gguf_file import gguf_experts
from moert.quant.sub1 import SubOneBitTensor

FORMATS = [Int8(), Int8(32), Int4(32), Int4(128), Int4Asymmetric(64), Mxfp4(), Ternary2(), Ternary5(), Ternary5(32)]
FORMATS += [Fp8(), BitNested(), BitNested(5, 4, 32)]
CONFIGS = [
    {"quant_method": "gptq", "bits": 4, "group_size": 32},
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "mxfp4"},
]
CONFIGS += [
    {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"a": {"weights": weights}}}
    for kind, weights in (
        ("pack-quantized", {"num_bits": 4, "group_size": 32}),
        ("pack-quantized", {"num_bits": 4, "group_size": 32, "symmetric": False, "actorder": "group"}),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": False}),
    )
]
GGML = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "MXFP4", "TQ1_0", "TQ2_0", "Q4_K", "Q5_K", "Q6_K")
DTYPES = [torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.int8]
PART_DTYPES = {"qweight": torch.int32, "qzeros": torch.int32, "g_idx": torch.int32, "blocks": torch.uint8}
PART_DTYPES |= {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32}
PART_DTYPES |= {"weight_packed": torch.int32, "weight_shape": torch.int64, "weight_zero_point": torch.int8}
PART_DTYPES |= {"weight_g_idx": torch.int32}
ERRORS = (ValueError, TypeError, RuntimeError, CommandError)
MOST = 40  # of a size: small problems meet every edge, and many fit into a second
LENGTH = 4096  # of an input: what is missing is read as zeros, and the shortest input of a kind is an empty tensor


class Source(atheris.FuzzedDataProvider):
    """Sizes and tensors out of the fuzzer's bytes."""

    def size(self) -> int:
        return self.ConsumeIntInRange(0, MOST)

    def pick(self, choices: list):
        return choices[self.ConsumeIntInRange(0, len(choices) - 1)]

    def tensor(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        data = np.frombuffer(self.ConsumeBytes(count).ljust(count, b"\x5a"), np.uint8).copy()
        return torch.from_numpy(data).view(dtype).view(shape)

    def any_tensor(self) -> torch.Tensor:
        return self.tensor(self.pick(DTYPES), *(self.size() for _ in range(self.ConsumeIntInRange(0, 4))))

    def near(self, part: torch.Tensor) -> torch.Tensor:
        """Bytes in the shape of part, sometimes in another one or of another kind."""
        if self.ConsumeProbability() < 0.9:
            return self.tensor(part.dtype, *part.shape)
        return self.any_tensor()

    def packed(self, fmt, *shape: int) -> PackedTensor:
        good = fmt.pack(torch.ones(shape))
        parts = [None if part is None else self.near(part) for part in (good.codes, good.scales, good.zeros)]
        if parts[2] is not None and parts[2].dtype == torch.uint8 and self.ConsumeBool():
            parts[2] %= 16
        columns = shape[-1] if self.ConsumeProbability() < 0.9 else self.ConsumeIntInRange(-3, 2**40)
        return PackedTensor(fmt, columns, *parts)


@atheris.instrument_func
def unpack(source: Source) -> None:
    shape = (source.size(), source.size(), source.size())
    packed = source.packed(source.pick(FORMATS), *shape)
    w = packed.format.unpack(packed)
    assert w.shape == packed.shape and w.dtype == torch.float32


def sub1(source: Source, matrices: int, rows: int, columns: int) -> SubOneBitTensor:
    parts = [
        source.tensor(torch.uint16, source.size()),
        source.tensor(torch.int32, matrices, rows + 1),
        source.tensor(torch.int64, matrices + 1),
        source.tensor(torch.bfloat16, matrices, rows, 2),
    ]
    if source.ConsumeBool():  # offsets that begin and end as they should
        parts[1] = parts[1] % (source.size() + 1)
        parts[2] = torch.linspace(0, len(parts[0]), matrices + 1).long()
        if matrices:  # no more codewords than the last rows say
            parts[1][:, -1] = parts[2].diff()
    return SubOneBitTensor(columns, *map(source.near, parts) if source.ConsumeBool() else parts)


@atheris.instrument_func
def unpack_sub1(source: Source) -> None:
    packed = sub1(source, source.ConsumeIntInRange(0, 3), source.size(), source.size())
    assert SubOneBit().unpack(packed).shape == packed.shape
    SubOneBit().check_values(packed)


@atheris.instrument_func
def multiply(source: Source) -> None:
    E, H, I = 2, 1 + source.size(), 1 + source.size()
    T = source.ConsumeIntInRange(0, 6) if source.ConsumeBool() else MOST  # panels and tile registers take many rows
    w1, w2 = (
        sub1(source, *shape)
        if (fmt := source.pick([SubOneBit(), *FORMATS])) == SubOneBit()
        else source.packed(fmt, *shape)
        for shape in ((E, 2 * I, H), (E, H, I))
    )
    routing = Routing(source.tensor(torch.int32, T, 2), torch.ones(T, 2), E)
    precision = source.pick(list(PRECISIONS))
    y = fused_experts_quantized(torch.ones(T, H), routing, w1, w2, precision=precision)
    assert y.shape == (T, H)


@atheris.instrument_func
def read(source: Source) -> None:
    """A matrix of another library's checkpoint."""
    config = source.pick(CONFIGS)
    layout = layout_of(config)
    dtypes = PART_DTYPES | ({"weight": torch.int8} if config["quant_method"] == "compressed-tensors" else {})
    parts = {}
    for name in layout.names:
        if source.ConsumeProbability() < 0.95:
            shape = (8 * source.ConsumeIntInRange(0, 8) for _ in range(source.pick([1, 2, 2, 3])))
            parts[name] = source.near(torch.empty(*shape, dtype=dtypes.get(name, torch.float16)))
    found = layout.read(parts, Int8(128)).packed
    assert found.format.unpack(found).shape == found.shape


@atheris.instrument_func
def read_blocks(source: Source) -> None:
    """Blocks of ggml's types, of the right size or another."""
    kind = source.pick(list(GGML))
    columns, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows, blocks = source.ConsumeIntInRange(0, 4), source.ConsumeIntInRange(0, MOST * 4 // columns + 2)
    stored = source.near(torch.empty(rows, blocks * size, dtype=torch.uint8))
    found = Ggml(kind).read({"blocks": stored}, source.pick([Int8(128), Int4(32)])).packed
    assert found.format.unpack(found).shape == found.shape


@atheris.instrument_func
def read_gguf(source: Source) -> None:
    """A file with one value and one tensor, then bytes of it changed, and its end cut off."""
    kind = GGMLQuantizationType[source.pick(list(GGML))]
    columns, size = GGML_QUANT_SIZES[kind]
    blocks, rows = source.ConsumeIntInRange(0, 2), source.ConsumeIntInRange(0, 3)
    name = b"blk.0.ffn_up_exps.weight"
    file = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 17) + b"general.alignment"
    file += struct.pack("<II", source.ConsumeIntInRange(0, 13), 32)
    file += struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, blocks * columns, rows, int(kind), 0)
    file = bytearray(
        file + bytes(-len(file) % 32) + source.ConsumeBytes(blocks * rows * size).ljust(blocks * rows * size)
    )
    for _ in range(source.ConsumeIntInRange(0, 4)):
        file[source.ConsumeIntInRange(0, len(file) - 1)] = source.ConsumeIntInRange(0, 255)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        path.write_bytes(file[: len(file) - (source.ConsumeIntInRange(0, 40) if source.ConsumeBool() else 0)])
        for _, found in gguf_experts(path):
            assert found.packed.format.unpack(found.packed).shape == found.packed.shape


@atheris.instrument_func
def read_header(source: Source) -> None:
    """A checkpoint's JSON and the header of its safetensors."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        config = source.ConsumeBytes(60) if source.ConsumeBool() else b'{"model_type": "mixtral"}'
        (directory / "config.json").write_bytes(config)
        length = source.ConsumeIntInRange(0, 2**64 - 1) if source.ConsumeBool() else 40
        (directory / "model.safetensors").write_bytes(length.to_bytes(8, "little") + source.ConsumeBytes(400))
        checkpoint.check_files(directory)


TARGETS = [unpack, unpack_sub1, multiply, read, read_blocks, read_gguf, read_header]


@atheris.instrument_func
def test_one_input(data: bytes) -> None:
    source = Source(data)
    try:
        source.pick(TARGETS)(source)
    except ERRORS as error:
        assert " must " in str(error), f"an error must say what is wrong: {type(error).__name__}: {error}"


def instrument(*modules: str) -> None:
    """The branches of these modules' functions are what an input reached."""
    for name in modules:
        held = list(vars(sys.modules[name]).values())
        held += [f for kind in held if isinstance(kind, type) and kind.__module__ == name for f in vars(kind).values()]
        for function in held:
            if isinstance(function, FunctionType) and function.__module__ == name:
                atheris.instrument_func(function)


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """As libFuzzer does it, and filled up with random bytes in front: sizes and choices are read from the end."""
    data = atheris.Mutate(data, len(data) + 8)[-most:]
    return np.random.default_rng(seed).bytes(max(0, most - len(data))) + data


if __name__ == "__main__":
    torch.set_num_threads(1)
    instrument(*(name for name in sys.modules if name.startswith(("moert.quant", "moert.cli.checkpoint"))))
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for i in range(64):
        (corpus / f"random-{i}").write_bytes(np.random.default_rng(i).bytes(LENGTH))
    options = ["-len_control=0", "-reduce_inputs=0", f"-max_len={LENGTH}"]
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:]], test_one_input, custom_mutator=mutate)
    atheris.Fuzz()
