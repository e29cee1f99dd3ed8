"""Facts about the machine and the process that belong beside every number that was measured."""

import contextlib
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine_facts(packages: tuple[str, ...] = ("torch", "transformers"), device: str = "cpu") -> dict:
    """Processor, cores this process may use, the GPU where that is the device, system, Python and package versions."""
    import moert

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "processor": processor_name(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "moert": moert.__version__,
    }
    if device == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return facts


def where(device: str, threads: int) -> str:
    """What a table says of the device."""
    return "on the GPU" if device == "cuda" else f"{threads} threads"


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def resident_bytes() -> int:
    """Memory of this process now, or its peak where the system does not tell."""
    return _status_bytes("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Largest resident memory of this process, since reset_peak where the system can forget it."""
    # Not getrusage where it can be avoided: a child inherits the peak of the process that started it.
    measured = _status_bytes("VmHWM")
    if measured:
        return measured
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class DeviceMemory:
    """What a model on this device takes: resident memory of the process, or what torch has allocated on the GPU."""

    def __init__(self, device: str):
        self.gpu = device == "cuda"

    def now(self) -> int:
        import torch

        return torch.cuda.memory_allocated() if self.gpu else resident_bytes()

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() if self.gpu else peak_bytes()

    def reset_peak(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats() if self.gpu else reset_peak()


def _status_bytes(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
