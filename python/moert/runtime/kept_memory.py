"""Whether memory that is freed goes back to the system, which hands it out again page by page."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_memory() -> None:
    """From now on large memory that this process frees stays with it for the next allocation.

    By default glibc gives a large tensor's memory back at once and takes fresh pages for the next: a training step
    waits for as many as it has gradients.  This is a setting of malloc, for torch's tensors and all else in the
    process, and it stays.  What is kept is the heap at its largest: that may be more than was in use at once (twice as
    much of a lone tensor), and the first few steps may still get fresh pages.  Only the main thread keeps tensors of
    more than 64 MiB, the size of another thread's heap.  Where another malloc is loaded it does nothing.  The same in
    the environment, before the process starts: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4611686018427387904.
    """
    set_option = _function("mallopt", "keep_memory")
    if not set_option(M_MMAP_MAX, 0) or not set_option(M_TRIM_THRESHOLD, -1):
        raise RuntimeError("malloc must take M_MMAP_MAX=0 and M_TRIM_THRESHOLD=-1, got a refusal")


def release_memory() -> bool:
    """Gives free memory that this process keeps back to the system, whole pages of it; whether there was any."""
    return bool(_function("malloc_trim", "release_memory")(ctypes.c_size_t(0)))


def _function(name: str, caller: str):
    library = ctypes.CDLL(None)
    if not hasattr(library, name):
        raise RuntimeError(f"{caller} must run on Linux with glibc, got a C library without {name}")
    return getattr(library, name)
