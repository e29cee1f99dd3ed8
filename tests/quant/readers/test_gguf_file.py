"""GGUF files written by the gguf package: the same tensors and metadata, and errors for every broken byte."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moert.quant import Int4, Int8
from moert.quant.readers import GgufFile, gguf_experts

TYPES = {"blk.0.ffn_gate_exps.weight": "Q8_0", "blk.0.ffn_up_exps.weight": "Q4_0", "blk.0.ffn_down_exps.weight": "Q5_0"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_uint32("qwen3moe.expert_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ö", "c"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_float32("half", 0.5)
    rng = np.random.default_rng(0)
    for name, kind in TYPES.items():
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(rng.standard_normal((3, 4, 64), np.float32), kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.arange(5, dtype=np.float32))
    writer.add_tensor("half.weight", np.arange(6, dtype=np.float16).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_as_the_package_reads_it(file):
    mine, theirs = GgufFile(file), gguf.GGUFReader(file)
    assert mine.metadata["general.architecture"] == "qwen3moe" and mine.metadata["qwen3moe.expert_count"] == 3
    assert mine.metadata["tokenizer.ggml.tokens"] == ["a", "ö", "c"] and mine.metadata["numbers"] == [1, -2, 3]
    assert mine.metadata["half"] == 0.5 and set(mine.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data.copy(), tensor.tensor_type)).float()
        assert torch.equal(mine.unpack(tensor.name), expected)


def test_experts(file):
    found = dict(gguf_experts(file))
    assert list(found) == list(TYPES)
    for name, fmt in zip(TYPES, (Int8(32), Int4(32), Int8(128)), strict=True):
        packed = found[name].packed
        assert packed.format == fmt and packed.shape == (3, 4, 64)
        exact = GgufFile(file).unpack(name)
        assert (fmt.unpack(packed) - exact).norm() <= (0.012 * exact.norm() if name.startswith("blk.0.ffn_down") else 0)
    assert [read.changed for read in found.values()] == [
        "",
        "",
        "converted to Int8(group=128): no format has the numbers of Q5_0",
    ]
    assert dict(gguf_experts(file, "int4"))["blk.0.ffn_down_exps.weight"].packed.format == Int4(32)


def everything(path):
    file = GgufFile(path)
    for name in file.tensors:
        file.read(name, Int8()) if len(file.tensors[name].shape) > 1 else file.unpack(name)


def test_every_truncation_is_an_error(file):
    whole = file.read_bytes()
    everything(file)
    for length in [*range(0, 400, 7), len(whole) // 2, len(whole) - 33]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"must .*got"):
            everything(file)


def test_flipped_bytes(file):
    whole = file.read_bytes()

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1) | st.integers(0, 700), st.integers(0, 255)), min_size=1))
    def flip(changes):
        octets = bytearray(whole)
        for place, octet in changes:
            octets[place] = octet
        file.write_bytes(octets)
        try:
            everything(file)
        except (ValueError, RuntimeError) as error:
            assert " must " in str(error) and "got" in str(error)

    flip()


def test_lies_about_lengths(file):
    whole = file.read_bytes()
    for at, message in [(8, "must hold the .* entries that it says"), (16, "must hold the .* entries that it says")]:
        file.write_bytes(whole[:at] + b"\xff" * 7 + b"\x0f" + whole[at + 8 :])
        with pytest.raises(ValueError, match=message):
            GgufFile(file)
    at = whole.index(b"numbers") + len("numbers") + 8
    file.write_bytes(whole[:at] + b"\xff" * 7 + b"\x0f" + whole[at + 8 :])
    with pytest.raises(ValueError, match="must hold the .* entries that it says, got"):
        GgufFile(file)


def test_errors(file, tmp_path):
    with pytest.raises(ValueError, match="name must be a tensor of .*model.gguf, got x"):
        GgufFile(file).read("x", Int8())
    whole = file.read_bytes()
    for change, message in [
        (b"GGML" + whole[4:], "must be a GGUF file, got another beginning"),
        (whole[:4] + b"\x07" + whole[5:], "must be GGUF of version 2 or 3, got 7"),
        (b"", "must be a GGUF file, got an empty one"),
        (whole.replace(b"numbers\x09", b"numbers\x63"), "must have metadata of known types, got type 99, 0 deep"),
        (whole.replace(b"ffn_gate_exps", b"ffn_gate_expt").replace(b"half.weight", b"half.weighu"), None),
        (whole.replace("ö".encode(), b"\xff\xff"), "must have names and texts in UTF-8"),
        (whole.replace(b"ffn_gate_exps", b"ffn_down_exps"), "must name every tensor once, got 4 names of 5|ffn_down"),
    ]:
        file.write_bytes(change)
        if message is None:
            assert len(GgufFile(file).tensors) == 5
            continue
        with pytest.raises(ValueError, match=message):
            GgufFile(file)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("x", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"must hold tensors blk.\*.ffn_\*_exps.weight, got none"):
        dict(gguf_experts(file))


def test_sizes_of_zero(file):
    """Rows without columns cost a file nothing, and a reader without end."""
    whole = file.read_bytes()
    at = whole.index(b"half.weight") + len("half.weight") + 4
    for sizes in ([0, 2**40], [3, 0]):
        file.write_bytes(whole[:at] + np.array(sizes, np.uint64).tobytes() + whole[at + 16 :])
        with pytest.raises(ValueError, match=r"half.weight must have sizes from 1 on .* got sizes \["):
            GgufFile(file)


def test_a_name_for_two_values(file):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint32("number1", 1)
    writer.add_uint32("number2", 2)
    writer.add_tensor("x", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.write_bytes(file.read_bytes().replace(b"number2", b"number1"))
    with pytest.raises(ValueError, match="must name every value once, got 2 names of 3"):
        GgufFile(file)
