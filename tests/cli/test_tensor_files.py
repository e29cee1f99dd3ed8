import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moert.cli.errors import CommandError
from moert.cli.tensor_files import DTYPES, PIECE, Stored, TensorFiles, header, sha256, write_tensors


def tensors():
    """One of every dtype, one empty, one larger than a piece."""
    made = {f"t.{name}": torch.arange(12).view(3, 4).to(dtype) for name, dtype in DTYPES.items()}
    return made | {"empty": torch.empty(0, 3), "large": torch.randn(PIECE // 4 + 5), "scalar": torch.tensor(2.5)}


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def test_reads_what_the_library_writes(tmp_path):
    made = tensors()
    save_file(made, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert files.stored == {name: Stored.of(tensor) for name, tensor in made.items()}
    assert all(same(files.read(name), tensor) for name, tensor in made.items() if name != "scalar")
    assert files.read("scalar").item() == 2.5
    assert files.nbytes(made) == sum(tensor.nbytes for tensor in made.values())
    assert max(len(piece) for piece in files.pieces("large")) == PIECE


def test_the_library_reads_what_is_written(tmp_path):
    made = tensors()
    stored = {name: Stored.of(tensor) for name, tensor in made.items()}
    pieces = lambda name: [bytes(made[name].view(-1).view(torch.uint8).numpy())]  # noqa: E731
    made["scalar"] = made["scalar"].view(1)  # which has bytes; it is written as the scalar that it was
    checksum = write_tensors(tmp_path / "a.safetensors", stored, pieces)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == made.keys() and read["scalar"].shape == ()
    assert all(same(read[name].reshape(made[name].shape), tensor) for name, tensor in made.items())
    assert checksum == sha256(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert all(start % 8 == 0 for s, start in header(tmp_path / "a.safetensors").values() if s.dtype in ("F64", "I64"))


def test_a_write_that_fails_leaves_no_file(tmp_path):
    def pieces(name):
        yield b"1234"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_tensors(tmp_path / "a.safetensors", {"a": Stored("F32", (2,), 8)}, pieces)
    assert not (tmp_path / "a.safetensors").exists()


def test_first_float(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int32), "b": torch.zeros(2).half()}, tmp_path / "model.safetensors")
    assert TensorFiles(tmp_path).first_float() == torch.float16


def test_a_file_that_shrinks(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    files = TensorFiles(tmp_path)
    before = files.identity()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CommandError, match="model.safetensors must stay as it is while it is read, got 8 bytes less"):
        files.read("a")
    assert files.identity() != before


def test_what_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(1, dtype=torch.uint32)}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(CommandError, match="b must have a dtype of F64, .*, got U32"):
        TensorFiles(tmp_path).read("b")
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}))
    with pytest.raises(CommandError, match="2.safetensors must hold c as its index says, got none"):
        TensorFiles(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "2.safetensors")
    with pytest.raises(CommandError, match="a must be in one file, got 1.safetensors and 2.safetensors"):
        TensorFiles(tmp_path)
