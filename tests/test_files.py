import io
import zipfile

import numpy as np
import pytest

from moert.files import read_arrays, write_arrays, write_atomically

ARRAYS = {
    "a": np.arange(6).reshape(2, 3),
    "b": np.array(["x", "yz"]),
    "c": np.zeros((0, 4), dtype=np.float32),
    "d": np.asfortranarray(np.arange(6.0).reshape(3, 2)),
    "e": np.array(True),
}


def test_arrays_come_back(tmp_path):
    write_arrays(tmp_path / "x.npz", ARRAYS)
    found = read_arrays(tmp_path / "x.npz")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x"
    path.write_text("before")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def member(path, name, data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr(name, data)


def header(shape, dtype="<i8", version=b"\x01\x00"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


def test_hostile_files_are_one_kind_of_error(tmp_path):
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    bombs = {
        "terabytes": header("(2**40,)".replace("2**40", str(2**40))) + bytes(8),
        "overflow": header(f"({2**32}, {2**32})"),
        "negative": header("(-1, -1)") + bytes(8),
        "object": objects.getvalue(),
        "cut": header("(1,)") + bytes(7),
        "long": header("(1,)") + bytes(9),
        "version": header("(1,)", version=b"\x09\x00") + bytes(8),
        "code": header("__import__('os').getpid()") + bytes(8),
        "void": header("(1,)", dtype="|V8") + bytes(8),
        "empty": b"",
    }
    for name, data in bombs.items():
        path = tmp_path / f"{name}.npz"
        member(path, "a.npy", data)
        with pytest.raises(ValueError, match=f"{name}.npz must be an npz file of plain arrays, got "):
            read_arrays(path)
    packed = tmp_path / "packed.npz"
    member(packed, "a.npy", header("(1000000,)") + bytes(8000000), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="got arrays must be stored as they are, got compressed ones"):
        read_arrays(packed)
    twice = tmp_path / "twice.npz"
    member(twice, "a.npy", header("(1,)") + bytes(8))
    with pytest.warns(UserWarning, match="Duplicate"):
        member(twice, "a.npy", header("(1,)") + bytes(8))
    with pytest.raises(ValueError, match="names of their own, got one twice"):
        read_arrays(twice)


def test_every_cut_and_every_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "x.npz"
    write_arrays(path, {"a": np.arange(5)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="must be an npz file"):
            read_arrays(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            found = read_arrays(path)  # in dates and permissions of the archive, which say nothing
        except ValueError as error:
            assert "must be an npz file" in str(error)
        else:
            assert [array.tolist() for array in found.values()] == [[0, 1, 2, 3, 4]]


def test_a_directory_is_not_lost_to_a_file(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "kept").write_text("mine")
    with pytest.raises(IsADirectoryError):
        write_arrays(tmp_path / "x", ARRAYS)
    assert (tmp_path / "x" / "kept").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_arrays_go_where_they_are_told(tmp_path):
    write_arrays(tmp_path / "no suffix", ARRAYS)
    assert [p.name for p in tmp_path.iterdir()] == ["no suffix"] and read_arrays(
        tmp_path / "no suffix"
    ).keys() == ARRAYS.keys()
