"""Files that are whole or absent when written, and arrays that are read from files of unknown origin."""

import io
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """write() makes a temporary file or directory beside path, which then takes path's place in one rename.

    A directory takes the place of a directory only; a file that was to take it is an IsADirectoryError, and nothing
    has moved.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the suffix, which writers look at
    replaced = path.with_name(f".{os.getpid()}.replaced.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if path.is_dir() and temporary.is_dir():
            os.replace(path, replaced)
        os.replace(temporary, path)
    finally:
        for leftover in (temporary, replaced):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            elif leftover.exists():
                leftover.unlink()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An npz file without compression, whose size then bounds what reading it takes."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a path, savez would add a suffix to it
            np.savez(file, allow_pickle=False, **arrays)

    write_atomically(path, write)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of such a file; a ValueError says what is wrong with one that is not.

    Nothing is unpickled, and the file's size bounds what is allocated.  One that cannot be read is an OSError.
    """
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > len(data) or any(m.compress_type for m in members):
                raise ValueError("arrays must be stored as they are, got compressed ones")
            if len({member.filename for member in members}) < len(members):
                raise ValueError("arrays must have names of their own, got one twice")
            return {m.filename.removesuffix(".npy"): _array(archive.read(m)) for m in members}
    except Exception as error:  # zipfile and NumPy's header reader have a dozen types for broken bytes
        raise ValueError(f"{path} must be an npz file of plain arrays, got {_words(error)}") from error


def _array(data: bytes) -> np.ndarray:
    """np.lib.format's reader trusts the shape that a header states; here it has to fit the bytes that follow."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject or dtype.kind not in "biufU":
        raise ValueError(f"dtype {dtype}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"{len(data) - stream.tell()} bytes for shape {list(shape)} of {dtype}")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
