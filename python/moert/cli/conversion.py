"""Streams a checkpoint into a packed one, file by file, so that a crash leaves the result absent or complete.

Files are written into OUT.partial, which becomes OUT at the end; its record says which are whole, and a later call with
the same input and options goes on from them.
"""

import contextlib
import fcntl
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import moert
from moert.cli.calibration import Calibration
from moert.cli.checkpoint import INDEX, check_files, class_of, has_interface, load_config, read_json, skeleton
from moert.cli.errors import CommandError, first_line
from moert.cli.tensor_files import Stored, TensorFiles, header, sha256, write_tensors
from moert.integrations.transformers.quantizer import MoertConfig
from moert.integrations.transformers.streaming import Layer, layers
from moert.quant.float_experts import LayerReport

RECORD = "moert_quantize.json"
COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md")
REST_BYTES = 1 << 29  # of the tensors that are copied, in one file


@dataclass
class Part:
    """A file of the result: a layer's experts, or tensors that are copied as they are.

    tensors: of sub1 with sizes that are a guess until the file is written.
    """

    file: str
    tensors: dict[str, Stored]
    sources: list[str]
    layer: Layer | None

    @property
    def title(self) -> str:
        return self.layer.name if self.layer else "all but experts"

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())


class Conversion:
    """All that the headers of the input tell to be wrong is an error here, before anything is written.

    calibration: what the codes are chosen by, which options.calibrated tells of; without it weights are rounded.
    reports: what calibrated experts saw, of those packed by this call.
    """

    def __init__(self, source: Path, target: Path, options: MoertConfig, calibration: Calibration | None = None):
        self.source, self.target, self.options, self.calibration = source, target, options, calibration
        self.reports: list[LayerReport] = []
        self.partial = target.with_name(target.name + ".partial")
        if target.exists() or target.is_symlink():
            raise CommandError(f"OUT must not exist, got {target}")
        if not target.parent.is_dir():
            raise CommandError(f"OUT must lie in a directory that exists, got {target}")
        check_files(source)
        self.config = read_json(source / "config.json")
        _check_is_float(self.config)
        self.files = TensorFiles(source)
        config = load_config(source)
        self.model = skeleton(config, class_of(config))
        if not has_interface(self.model):
            name = type(self.model).__name__
            raise CommandError(f"model must have experts that can be packed, got {name} without any")
        self.dtype = config.dtype or self.files.first_float()
        self.parts = self._plan()
        packed = [part.layer for part in self.parts if part.layer]
        self._layerwise = calibration and calibration.start(source, self.files, self.dtype, packed)

    @property
    def nbytes(self) -> int:
        """Of the input's tensors."""
        return self.files.nbytes(self.files.stored)

    @property
    def work(self) -> int:
        """What advance hears of in all: the input's bytes, tensors that two parts are made of twice."""
        return sum(self.files.nbytes(part.sources) for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Of the experts that are packed, scales included."""
        packed = [part for part in self.parts if part.layer]
        return 8 * sum(part.nbytes for part in packed) / sum(
            prod(self.files.stored[name].shape) for part in packed for name in part.sources
        )  # fmt: skip

    def run(self, advance: Callable[[str, int], None], taken: Callable[[str, int], None] | None = None) -> None:
        """Writes OUT; advance is told what is worked on, and how many bytes of the input are done since.

        taken (else advance) is told the same of what an earlier call has done.
        """
        if (self.partial.exists() or self.partial.is_symlink()) and not self.partial.is_dir():
            raise CommandError(f"{self.partial} must come from moert quantize, got a file")
        self.partial.mkdir(exist_ok=True)
        with _locked(self.partial), _no_empty(self.partial):
            done = self._done()
            whole = {p.file for p in self.parts if p.file in done and self._is_whole(p, done[p.file])}
            self._check_space(sum(part.nbytes for part in self.parts if part.file not in whole))
            for part in self.parts:
                if part.file in whole:
                    self._take(part)
                    (taken or advance)(part.title, self.files.nbytes(part.sources))
                    continue
                done[part.file] = self._write(part, lambda nbytes, title=part.title: advance(title, nbytes))
                self._write_json(RECORD, self._record(done))
            self._finish()

    def _plan(self) -> list[Part]:
        try:
            packed = layers(self.model, self.options, self.files.stored)
        except ValueError as error:
            raise CommandError(first_line(error)) from error
        made = {source for layer in packed for source in layer.sources}
        groups = list(self._groups(name for name in self.files.stored if name not in made))
        count = len(groups) + len(packed)
        names = (f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count))
        parts = [Part(next(names), {n: self.files.stored[n] for n in group}, group, None) for group in groups]
        for layer in packed:
            tensors = {name: Stored.of(tensor) for name, tensor in layer.empty().items()}
            parts.append(Part(next(names), tensors, layer.sources, layer))
        return parts

    def _groups(self, names: Iterable[str]) -> Iterator[list[str]]:
        group, size = [], 0
        for name in names:
            nbytes = self.files.nbytes([name])
            if group and size + nbytes > REST_BYTES:
                yield group
                group, size = [], 0
            group.append(name)
            size += nbytes
        if group:
            yield group

    def _record(self, done: dict[str, str]) -> dict:
        config = json.dumps(self.config, sort_keys=True)
        made_of = {"input": self.files.identity(), "config": config, "options": self.options.to_dict()}
        return {"moert": moert.__version__, **made_of, "done": done}

    def _done(self) -> dict[str, str]:
        """The files that an earlier call has finished, and their checksums."""
        if not (self.partial / RECORD).exists():
            if {path.suffix for path in self.partial.iterdir()} <= {".unfinished"}:
                return {}  # ended before its first file was whole
            raise CommandError(f"{self.partial} must come from moert quantize, got no {RECORD} in it")
        record = read_json(self.partial / RECORD)
        done = record.get("done")
        if not isinstance(done, dict) or record != self._record(done):
            raise CommandError(f"{self.partial} must come from the same input and options: remove it to start again")
        return done

    def _is_whole(self, part: Part, checksum: str) -> bool:
        path = self.partial / part.file
        return path.is_file() and sha256(path) == checksum

    def _check_space(self, wanted: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if free < wanted:
            raise CommandError(f"the disk of OUT must have {wanted / 1e9:.3f} GB free, got {free / 1e9:.3f} GB")

    def _write(self, part: Part, advance: Callable[[int], None]) -> str:
        """The checksum of the part's file."""

        def read(name: str) -> Tensor:
            tensor = self.files.read(name)
            advance(tensor.nbytes)
            return tensor

        def copied(name: str) -> Iterator[bytes]:
            for piece in self.files.pieces(name):
                advance(len(piece))
                yield piece

        if part.layer is None:
            return write_tensors(self.partial / part.file, part.tensors, copied)
        if self._layerwise:
            packed = self._calibrated(part, advance)
        else:
            try:
                with torch.no_grad():
                    packed = part.layer.pack(self.dtype, read)
            except (ValueError, TypeError, RuntimeError) as error:  # sizes that do not fit, weights that are not finite
                raise CommandError(f"{part.layer.name} must be experts of this config: {first_line(error)}") from error
        part.tensors = {name: Stored.of(tensor) for name, tensor in packed.items()}
        return write_tensors(self.partial / part.file, part.tensors, lambda name: _bytes(packed.pop(name)))

    def _calibrated(self, part: Part, advance: Callable[[int], None]) -> dict[str, Tensor]:
        """advance hears of bytes as experts are done: to read them takes no time beside that."""
        E, nbytes, done = part.layer.num_experts, self.files.nbytes(part.sources), 0

        def on_experts(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            advance(nbytes * done // E - nbytes * before // E)

        try:
            packed, report = self._layerwise.pack(part.layer, on_experts)
        except (CommandError, OSError):
            raise
        except Exception as error:  # whatever the weights, the text and a class of transformers can provoke
            got = f"{type(error).__name__}: {first_line(error)}"
            raise CommandError(f"model must run on the text layer by layer, got {got}") from error
        self.reports.append(report)
        return packed

    def _take(self, part: Part) -> None:
        """A part that an earlier call has written."""
        path = self.partial / part.file
        part.tensors = {name: stored for name, (stored, _) in header(path).items()}
        if self._layerwise and part.layer:
            self._layerwise.take(part.layer, functools.partial(load_file, path))

    def _finish(self) -> None:
        """The small files, then the name; OUT without the record's is complete as well."""
        for path in sorted(self.source.iterdir()):
            if path.suffix in COPIED and path.is_file() and path.name not in ("config.json", INDEX, RECORD):
                _on_disk(shutil.copyfile(path, self.partial / path.name))
        dtype = str(self.dtype).removeprefix("torch.")
        packed = {**self.options.to_dict(), **self._sizes(), "made_of": self.files.fingerprint()}
        self._write_json("config.json", {"dtype": dtype, **self.config, "quantization_config": packed})
        weight_map = {name: part.file for part in self.parts for name in sorted(part.tensors)}
        total = {"total_size": sum(part.nbytes for part in self.parts)}
        self._write_json(INDEX, {"metadata": total, "weight_map": weight_map})
        for path in self.partial.glob("*.unfinished"):
            path.unlink()
        _on_disk(self.partial)
        self.partial.rename(self.target)
        _on_disk(self.target.parent)
        (self.target / RECORD).unlink()

    def _sizes(self) -> dict:
        """What the format leaves open (MoertConfig.experts)."""
        packed = [part for part in self.parts if part.layer]
        shapes = {name: stored.shape for part in packed for name, stored in part.tensors.items()}
        entries = {part.layer.name: part.layer.entry(shapes) for part in packed}
        return {"experts": entries} if all(entries.values()) else {}

    def _write_json(self, name: str, value: dict) -> None:
        unfinished = self.partial / f"{name}.unfinished"
        unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        _on_disk(unfinished)
        unfinished.replace(self.partial / name)


def _check_is_float(config: dict) -> None:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if found := part.get("quantization_config"):
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise CommandError(f"model must have float weights, got quantized ones ({method})")


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    yield memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _on_disk(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextlib.contextmanager
def _no_empty(directory: Path):
    """An error before the first file leaves nothing."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            directory.rmdir()
        raise


@contextlib.contextmanager
def _locked(directory: Path):
    """The kernel drops the lock with the process, however that ends."""
    opened = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise CommandError(f"{directory} must not be another call's at work") from error
    finally:
        os.close(opened)
