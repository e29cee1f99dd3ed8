"""Memory in pages of 2 MiB, where it is large: a CPU reads them up to a third faster than pages of 4 KiB."""

from torch import Tensor

from moert import _C


def in_large_pages(fresh: Tensor) -> Tensor:
    """fresh itself, which nobody has written yet: asks for large pages, where it is on the CPU and takes megabytes.

    What the system does not grant changes nothing.  moert.runtime.huge_pages_ moves what has been written.
    """
    if type(fresh) is Tensor and fresh.device.type == "cpu":
        _C.advise_huge_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh
